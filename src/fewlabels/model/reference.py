"""SimCLRv2 checkpoints written by TensorFlow as our encoder, projection head and classifier.

What the network is (depth, width, selective kernels, stem) is found out from the shapes; which layer of the head the
classifier sits on, which no shape tells, from the published folders' names and step numbers.
Source: google-research/simclr at 383d414.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewlabels.errors import DataError, UsageError
from fewlabels.model import tensorbundle
from fewlabels.model.encoder import BLOCKS, SK_RATIO, ResNet, encoder
from fewlabels.model.heads import Classifier, ProjectionHead, ProjectionLayer
from fewlabels.model.layers import BatchNorm
from fewlabels.model.tensorbundle import Bundle

# Published checkpoints by what their folder is called or how many steps they made: layers below the classifier
TAP_BY_CATEGORY = {
    "finetuned_100pct": 0, "finetuned_10pct": 1, "finetuned_1pct": 1, "supervised": 0, "pretrained": 0,
    "distill_10pct": 0, "distill_1pct": 0,
}  # fmt: skip
TAP_BY_STEP = {250228: 0, 751: 1, 3754: 1, 37535: 0, 28151: 0}
BATCH_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_variance"}
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
FORTH, BACK = {4: (3, 2, 0, 1), 2: (1, 0)}, {4: (2, 3, 1, 0), 2: (1, 0)}  # HWIO <-> OIHW, (in, out) <-> (out, in)
# (kind, number) of conv2d_12 or sync_batch_normalization_3, in names of both versions of TensorFlow
NUMBERED = re.compile(r"(conv2d|(?:sync_)?batch_normalization)(?:_(\d+))?/(kernel|gamma|beta|moving_\w+)$")


@dataclass(frozen=True)
class Reference:
    """A checkpoint as modules, in inference mode: `encoder, projection_head, classifier = fl.load_reference(path)`.

    encoder: (N, 3, H, W) in [0, 1] -> (N, D). projection_head: None where the file has none. classifier: the whole
    network (N, 3, H, W) -> logits (N, K), made of the same encoder and the first `tap` layers of the same head; None
    where the file has none. why: where the tap was known from. unread: variables that were not used. step: the number
    of updates, None where the file does not say. name: of the encoder. tensorflow: 1 or 2.
    """

    encoder: ResNet
    projection_head: ProjectionHead | None
    classifier: Classifier | None
    name: str
    tap: int
    why: str
    step: int | None
    tensorflow: int
    unread: tuple[str, ...]

    def __iter__(self) -> Iterator[nn.Module | None]:
        return iter((self.encoder, self.projection_head, self.classifier))


def load_reference(path: str | Path, *, ema: bool = False, tap: int | None = None) -> Reference:
    """A SimCLRv2 checkpoint of TensorFlow 1 or 2 (also the variables of a SavedModel), without TensorFlow.

    path: the folder, the prefix ("model.ckpt-250228") or one of the files. ema: take the moving averages of encoder
    and head where the file has them (the classifier has none in the published files). tap: layers of the projection
    head below the classifier; left out, it is known for the published models and 0 for others, as in the reference.
    Raises MissingInput where there is no checkpoint, DataError where it is damaged or of another network, UsageError
    for a tap that it does not have or averages that are not there.
    """
    bundle = tensorbundle.open_bundle(tensorbundle.find_prefix(Path(path).expanduser()))
    keys, version = _names(bundle)
    if ema:
        averages = {name.removeprefix("ema/"): key for name, key in keys.items() if name.startswith("ema/")}
        if not averages:
            raise UsageError(f"{bundle.prefix} has no moving averages", fix="leave out ema (--ema)")
        keys |= averages
    shapes = {name: bundle.entries[key].shape for name, key in keys.items()}
    empty = [f"{keys[plain]} is {shape}" for plain, shape in shapes.items() if 0 in shape]
    if empty or len(shapes.get("head_supervised/kernel", (1, 1))) != 2:
        raise _other(bundle.prefix, empty or ["the kernel of head_supervised has not two axes"])
    read = _Reader(bundle, keys)
    name = _encoder_name(shapes, bundle.prefix)
    step = read.step()
    kernel, classifier = shapes.get("head_supervised/kernel"), None
    with torch.device("meta"):  # until every shape was compared: a small file may claim a network of any size
        network = encoder(name)
        head = _head(shapes, network.feature_dim, bundle.prefix)
        tap, why = _tap(tap, head, shapes, Path(path), step, bundle.prefix)
        if kernel is not None:
            classifier = Classifier(network, head, tap=tap, num_classes=kernel[-1])
    assert isinstance(network, ResNet)
    read.check(_tensors(network, head, classifier))
    for part in filter(None, (network, head, classifier and classifier.linear)):
        part.to_empty(device="cpu")
    read.fill(_tensors(network, head, classifier))
    for module in filter(None, (network, head, classifier)):
        module.eval()
    return Reference(network, head, classifier, name, tap, why, step, version, read.unread())


# --- names -----------------------------------------------------------------------------------------------------


def _names(bundle: Bundle) -> tuple[dict[str, str], int]:
    """Our plain name of every variable of the model -> its key in the bundle; and TensorFlow's version.

    conv/K/kernel and norm/K/gamma of the encoder in order of creation, head/J/kernel and head/J/gamma,
    head_supervised/kernel and bias; the same under ema/. TensorFlow 2 keys are places in a graph of objects (or, in a
    SavedModel, in a list), so there the variables' own names count, which the file keeps beside the graph.
    """
    if GRAPH not in bundle.entries:
        return _plain({key: key for key in bundle.entries}), 1
    full = tensorbundle.object_graph(bundle.text(GRAPH), bundle.prefix)
    return _plain({name: key for key, name in full.items() if key in bundle.entries}), 2


def _plain(keys: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    encoder: dict[str, list[tuple[int, str, str]]] = {}  # kind, under ema/ or not: (number, variable, key)
    for name, key in keys.items():
        prefix = "ema/" if name.startswith("ema_model/") else ""
        place = name.removeprefix("ema_model/")
        leaf = place.split("/")[-1]
        layer = re.search(r"(?:^|/)(?:head_contrastive|projection_head)/nl_(\d+)/", place)
        numbered = NUMBERED.search(place)
        if name.endswith("/Momentum"):
            found |= {f"trained/{layer[1]}": key} if layer else {}
        elif layer:
            found[f"{prefix}head/{int(layer[1])}/{leaf}"] = key
        elif place.startswith("head_supervised/"):
            found[f"{prefix}head_supervised/{leaf}"] = key
        elif numbered and place.startswith(("base_model/", "resnet/")):
            kind = "conv" if numbered[1] == "conv2d" else "norm"
            encoder.setdefault(prefix + kind, []).append((int(numbered[2] or 0), numbered[3], key))
        elif leaf in ("global_step", "iter"):
            found["step"] = key
    for kind, members in encoder.items():
        # Keras goes on counting where a process built two models, so only the order of the numbers counts
        order = {number: k for k, number in enumerate(sorted({number for number, _, _ in members}))}
        found |= {f"{kind}/{order[number]}/{leaf}": key for number, leaf, key in members}
    return found


# --- what the network is ---------------------------------------------------------------------------------------


def _encoder_name(shapes: Mapping[str, tuple[int, ...]], prefix: Path) -> str:
    """The name of the only encoder of ours with these convolutions."""
    convs = [shapes.get(f"conv/{k}/kernel", ()) for k in range(sum(name.startswith("conv/") for name in shapes))]
    if len(convs) < 3 or any(len(shape) != 4 for shape in convs):
        raise _other(prefix, [f"{len(convs)} convolutions were found under base_model/ or resnet/"])
    small = convs[0][0] == 3 and convs[1][0] == 1  # a shortcut follows at once
    resnet_d = convs[0][0] == 3 and not small
    stem = convs[2 if resnet_d else 0][-1]
    norms = {name.split("/")[1] for name in shapes if name.startswith("norm/")}
    selective = len(norms) < len(convs)  # the mixing convolution has no batch norm
    basic = convs[4 if resnet_d else 2][0] == 3
    for depth, blocks in BLOCKS.items():
        count = (3 if resnet_d else 1) + 4 + sum(blocks) * (2 if depth < 50 else 5 if selective else 3)
        if count == len(convs) and (depth < 50) == basic:
            width = f"_{stem / 64:g}x" if stem != 64 else ""
            return f"resnet{depth}{width}{'_sk' if selective else ''}{'_small' if small else ''}"
    kind = "basic blocks" if basic else "bottlenecks"
    raise _other(prefix, [f"{len(convs)} convolutions, {kind}, {'with' if selective else 'without'} selective kernels"])


def _other(prefix: Path, faults: list[str]) -> DataError:
    return DataError(
        f"{prefix} is not a SimCLRv2 model that we know",
        details=faults,
        why=f"known are ResNets of depth {', '.join(map(str, BLOCKS))} of any width, plain or with selective kernels "
        f"of ratio {SK_RATIO:g}, as google-research/simclr builds them",
        fix="give a checkpoint of that code",
    )


def _head(shapes: Mapping[str, tuple[int, ...]], width: int, prefix: Path) -> ProjectionHead | None:
    layers = sorted({int(name.split("/")[1]) for name in shapes if name.startswith("head/")})
    if not layers:
        return None
    last = shapes.get(f"head/{layers[-1]}/kernel", ())
    if layers != list(range(len(layers))) or len(last) != 2 or len(layers) > 64:
        raise _other(prefix, [f"layers {layers[:9]} of the projection head, the last with a kernel of {last}"])
    return ProjectionHead(width, last[1], len(layers))


def _tap(
    asked: int | None, head: ProjectionHead | None, shapes: Mapping[str, tuple[int, ...]], path: Path,
    step: int | None, prefix: Path,
) -> tuple[int, str]:  # fmt: skip
    """Layers of the head below the classifier, and where that is known from."""
    layers = len(head.layers) if head is not None else 0
    kernel = shapes.get("head_supervised/kernel", ())
    widths = [head.width(k) for k in range(layers + 1)] if head is not None else kernel[:1]
    fitting = [k for k in range(layers + 1) if kernel[:1] in ((), (widths[k],))]
    trained = sum(f"trained/{k}" in shapes for k in range(layers))
    category = next((c for c in TAP_BY_CATEGORY if c in path.absolute().parts), "")
    if asked is not None:
        tap, why = asked, "as asked"
    elif len(fitting) == 1:
        tap, why = fitting[0], f"the only layer with {kernel[0]:,} features"
    elif 0 < trained < layers:  # TensorFlow 2 fine-tunes the layers below the classifier and no others
        tap, why = trained, f"the optimizer trained {trained} of {layers} layers of the head"
    elif step in TAP_BY_STEP:
        tap, why = TAP_BY_STEP[step], f"it made {step:,} steps, as the published models of that kind"
    elif category:
        tap, why = TAP_BY_CATEGORY[category], f"the folder is called {category}"
    else:
        tap, why = 0, "nothing in the file tells; 0 is the reference's own setting"
    tap = tap if layers else 0
    if tap not in fitting and kernel:
        raise UsageError(
            f"the classifier of {prefix} takes {kernel[0]:,} features, tap {tap} has "
            + (f"{widths[tap]:,}" if 0 <= tap <= layers else "none: there are only 0 to " + str(layers)),
            fix=f"use tap {' or '.join(map(str, fitting))}" if fitting else "give another checkpoint",
        )
    return tap, why


# --- weights ---------------------------------------------------------------------------------------------------


def _tensors(
    network: ResNet, head: ProjectionHead | None, classifier: Classifier | None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by its plain name; the encoder's modules are in the reference's order."""
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    for k, conv in enumerate(convs):
        yield f"conv/{k}/kernel", conv.weight
    for k, norm in enumerate(norms):
        yield from _norm_tensors(f"norm/{k}", norm)
    for j, layer in enumerate(head.layers if head is not None else ()):
        assert isinstance(layer, ProjectionLayer)
        yield f"head/{j}/kernel", layer.linear.weight
        yield from _norm_tensors(f"head/{j}", layer.norm)
    if classifier is not None:
        yield "head_supervised/kernel", classifier.linear.weight
        yield "head_supervised/bias", classifier.linear.bias


def _norm_tensors(plain: str, norm: BatchNorm) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in BATCH_NORM.items():
        if getattr(norm, ours) is not None:
            yield f"{plain}/{theirs}", getattr(norm, ours)


class _Reader:
    """Takes variables out of a bundle and remembers which."""

    def __init__(self, bundle: Bundle, keys: Mapping[str, str]) -> None:
        self.bundle, self.keys, self.used = bundle, keys, {GRAPH}

    def check(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """That all of them are there in their shapes; one error names every fault."""
        faults = []
        for plain, tensor in tensors:
            key, shape = self.keys.get(plain), tuple(tensor.permute(BACK.get(tensor.dim(), (0,))).shape)
            if key is None:
                faults.append(f"{plain} is missing")
            elif self.bundle.entries[key].shape != shape:
                faults.append(f"{key} is {self.bundle.entries[key].shape}, the network has {shape}")
        if faults:
            raise _other(self.bundle.prefix, faults)

    @torch.no_grad()
    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the variables into these tensors."""
        faults = []
        for plain, tensor in tensors:
            key = self.keys[plain]
            array = self.bundle.read(key)
            self.used.add(key)
            tensor.copy_(torch.from_numpy(array).permute(FORTH.get(array.ndim, (0,))))
            if not torch.isfinite(tensor).all():
                faults.append(f"{key} has values that are not finite")
        if faults:
            raise _other(self.bundle.prefix, faults)

    def step(self) -> int | None:
        key = self.keys.get("step")
        if key is None or self.bundle.entries[key].shape != () or self.bundle.entries[key].dtype == "text":
            return None
        self.used.add(key)
        return int(self.bundle.read(key)[()])

    def unread(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.bundle.entries) - self.used))
