"""The scikit-learn face: fit(X, y) with y == -1 for unlabeled images, then predict, predict_proba, transform, score."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.validation import check_is_fitted

from fewlabels.data.told import class_of
from fewlabels.errors import DataError, Stopped, UsageError
from fewlabels.pipeline import fit
from fewlabels.use.predict import Model


class FewLabelClassifier(ClassifierMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Pretrain, fine-tune and distill behind scikit-learn's contract.

    recipe: name of a recipe. student: encoder to deploy, None = the same network, or that of a run begun in out.
    random_state: the seed, None = 0. out: the run folder; None = a temporary one that lives as long as the fitted model
    needs it.

    Learned: classes_ (K,), model_, run_dir_ (only where out was given), n_features_in_ is not set: X are images,
    uint8 (N, H, W[, 3]).
    """

    def __init__(
        self, recipe: str = "auto", student: str | None = None, random_state: int | None = 0, out: str | None = None
    ) -> None:
        self.recipe = recipe
        self.student = student
        self.random_state = random_state
        self.out = out

    def fit(self, X: npt.NDArray[np.uint8], y: Any) -> FewLabelClassifier:
        """X: uint8 (N, H, W) or (N, H, W, 3); y: (N,) labels, -1 (or None, NaN, "") = unlabeled. A signal that stops it
        is a KeyboardInterrupt, from Stopped.
        """
        if y is None:
            raise UsageError("y is missing", fix="give a label an image, -1 where there is none")
        labels = np.asarray(y, dtype=object)
        labels = (column_or_1d(labels, warn=True) if labels.shape[1:] == (1,) else labels).tolist()
        by_name = dict(zip(_names(labels), labels, strict=True))
        seed = 0 if self.random_state is None else self.random_state
        place = tempfile.TemporaryDirectory(prefix="fewlabels-") if self.out is None else nullcontext(self.out)
        try:
            with place as out:
                self.model_ = fit(X, labels, out=out, recipe=self.recipe, student=self.student, seed=seed).model
        except Stopped as error:  # an Exception is a bad score to GridSearchCV, which goes on
            raise KeyboardInterrupt(error.what) from error
        if self.out is not None:
            self.run_dir_ = Path(self.out)
        else:
            self.model_.path = None
        # scikit-learn's metrics take columns for sorted values of y; the model has "c2" before "c10"
        values = np.asarray([by_name[name] for name in self.model_.classes])
        self._columns = np.argsort(values, kind="stable")
        self.classes_ = values[self._columns]
        return self

    def predict(self, X: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """(N,) class of each image, as the values of y."""
        columns = self.predict_proba(X).argmax(axis=1)
        return self.classes_[columns]  # type: ignore[no-any-return]

    def predict_proba(self, X: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(N, K) probabilities, columns as in classes_."""
        return self._model(X).predict_proba(X)[:, self._columns]

    def score(self, X: npt.NDArray[np.uint8], y: Any, sample_weight: Any = None) -> float:
        """Accuracy on the images that have a label in y; without one (-1, None, NaN, "") they do not count."""
        y = column_or_1d(np.asarray(y, dtype=object))
        check_consistent_length(X, y, sample_weight)
        told, found = (np.asarray(_names(values), dtype=object) for values in (y, self.predict(X)))
        known = np.flatnonzero([name is not None for name in told])
        weights = None if sample_weight is None else np.asarray(sample_weight)[known]
        return float(np.average((told == found)[known], weights=weights))

    def transform(self, X: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(N, D) features of the deployed network."""
        return self._model(X).features(X)

    def _model(self, X: npt.NDArray[np.uint8]) -> Model:
        check_is_fitted(self, "model_")
        if isinstance(X, np.ndarray) and X.ndim < 3 and X.dtype.kind not in "OSU":
            raise UsageError(f"{X.shape} are rows, and no images", fix="give an array (N, H, W) or (N, H, W, 3)")
        return self.model_


def _names(y: Any) -> list[str | None]:
    """The class of each label, None = unlabeled; a faulty label has its fault for a name, which is no class's."""
    read = [class_of(value, None) for value in np.asarray(y, dtype=object).tolist()]
    if not any(name or fault for name, fault in read):
        raise DataError("y holds no label, only -1", fix="label some images; -1 means unlabeled")
    return [name or fault or None for name, fault in read]
