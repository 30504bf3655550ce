"""fewlabels: many unlabeled images and a few labels into an accurate, compact classifier (SimCLRv2, arXiv 2006.10029).

    import fewlabels as fl
    run = fl.fit("photos/", labels="labels.csv", out="run")
    run.model.predict(["new.jpg"])

To read the code in the order of the method: data/sources.py, data/pixels.py, data/views.py -> model/encoder.py,
model/heads.py, model/losses.py, model/optim.py, model/muon.py -> stages/pretrain.py, finetune.py, distill.py,
loop.py -> asked.py, prepare.py, prepared.py, worker.py, pipeline.py -> use/.

Names are resolved on first use, so that `import fewlabels` and `fewlabels --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Threads of GNU's OpenMP, which torch has on Linux, spin when they have nothing to do: the threads of our views then
# waited for a core (on 2 cores 12 ms in place of 8 for 32 views of 224 px), and two programs slow each other down up to
# thirtyfold. So many turns and no more cost a step nothing (119 ms, as before). Read when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_HOMES = {
    "fit": "fewlabels.pipeline",
    "Run": "fewlabels.pipeline",
    "load": "fewlabels.use.predict",
    "Model": "fewlabels.use.predict",
    "load_reference": "fewlabels.model.reference",
    "FewLabelClassifier": "fewlabels.estimator",
    "resnet": "fewlabels.model.encoder",
    "encoder": "fewlabels.model.encoder",
    "ProjectionHead": "fewlabels.model.heads",
    "nt_xent": "fewlabels.model.losses",
    "distillation_loss": "fewlabels.model.losses",
    "LARS": "fewlabels.model.optim",
    "views": "fewlabels.data.views",
}

__all__ = ["__version__"]
__all__ += list(_HOMES)

if TYPE_CHECKING:
    from fewlabels.data import views as views
    from fewlabels.estimator import FewLabelClassifier as FewLabelClassifier
    from fewlabels.model.encoder import encoder as encoder
    from fewlabels.model.encoder import resnet as resnet
    from fewlabels.model.heads import ProjectionHead as ProjectionHead
    from fewlabels.model.losses import distillation_loss as distillation_loss
    from fewlabels.model.losses import nt_xent as nt_xent
    from fewlabels.model.optim import LARS as LARS
    from fewlabels.model.reference import load_reference as load_reference
    from fewlabels.pipeline import Run as Run
    from fewlabels.pipeline import fit as fit
    from fewlabels.use.predict import Model as Model
    from fewlabels.use.predict import load as load


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewlabels' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return home if name == "views" else getattr(home, name)


def __dir__() -> list[str]:
    return __all__
