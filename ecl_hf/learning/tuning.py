"""What of a pretrained model moves, and features that a frozen encoder gives once and for all."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf.backbones import AdaptFormer, adaptable_blocks, add_adapters
from ecl_hf.files import check_regular, replacing
from ecl_hf.heads import ECLCosineHead, ECLHead
from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.low_rank import LowRank, add_low_rank, find_layers
from ecl_hf.learning.optimiser import NORMS
from ecl_hf.methods.base import Method, Stage
from ecl_hf.modeling_ecl import ECLForImageClassification

TUNERS = {"lora": LowRank, "adapter": AdaptFormer}
"""What `begin_tuning` puts into the encoders, and what moves of them then."""


def parameters_to_tune(task: nn.Module, tune: str) -> Callable[[str], bool]:
    """Whether a parameter of the task moves, by its name.

    Args:
        task: holds the ensemble as `model`.
        tune: `all`; `norm_bias`: of the encoders, normalisation layers and biases; `lora` or `adapter`: what was added
            to them; `head`: nothing of the encoders. Heads, side branches and train-only modules always move.
    """
    if tune == "all":
        return lambda _: True
    light = set()
    for prefix, module in task.named_modules():
        if tune in TUNERS:
            if isinstance(module, TUNERS[tune]):
                light.update(f"{prefix}.{name}" for name, _ in module.named_parameters())
        elif tune == "norm_bias":
            own = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
            light.update(own if isinstance(module, NORMS) else (name for name in own if name.endswith(".bias")))

    def moves(name: str) -> bool:
        encoder = ".backbone." in name or name.startswith("model.trunk.")
        return name in light or name.startswith("model.sides.") or not encoder

    return moves


def begin_tuning(model: ECLForImageClassification, config: ModelConfig) -> None:
    """Put low-rank additions or AdaptFormers into the encoders, where the recipe asks for them.

    They add nothing at the start. The former go by `merge_low_rank`, the latter are a part of the published model.

    Raises:
        ValueError: the encoders aren't pretrained, or are of a kind that can't have them.
    """
    if config.tune not in TUNERS:
        return
    if not config.pretrained:
        raise ValueError(
            f"model.tune {config.tune} leaves the weights of the encoder as they are: set model.pretrained"
        )
    classifier = model.config.num_labels * model.experts[0].head.in_features
    parts = [part.backbone for part in (*model.experts, *filter(None, [model.trunk]))]
    if config.tune == "lora":
        layers = find_layers(model)
        per_rank = sum(len(layer.weight) + layer.weight[0].numel() for layer in layers) / len(model.experts)
        add_low_rank(layers, config.rank or lift_rank(classifier, per_rank))
        return
    try:
        widths = [block.norm2.normalized_shape[-1] for part in parts for block in adaptable_blocks(part)]
        rank = config.rank or lift_rank(classifier, 2 * sum(widths) / len(model.experts))
        with unchanged_outputs(model):
            for part in parts:
                add_adapters(part, rank)
    except ValueError as error:
        raise ValueError(f"model.tune adapter: {error}; take lora, norm_bias or head") from error
    model.config.adapter_rank = rank


def lift_rank(classifier: int, per_rank: float) -> int:
    """The largest power of two with which what is added has no more weights than the classifier; at least 1.

    With AdaptFormers in L blocks it is LIFT's `2^floor(log2(C / (2 L)))`, with low-rank additions to queries and values
    LIFT+'s `2^floor(log2(C / (4 L)))`, for C classes (Shi et al., ICML 2024 and 2025).

    Args:
        classifier: its weights.
        per_rank: weights that each unit of the rank adds to an encoder.
    """
    return 2 ** max(0, math.floor(math.log2(classifier / max(per_rank, 1))))


@contextmanager
def unchanged_outputs(model: ECLForImageClassification) -> Iterator[None]:
    """See that what is done to a model within changes none of its features; ValueError if it does."""
    with torch.random.fork_rng():
        image = torch.randn(1, *model.config.pretrained_cfg["input_size"], device=model.device, dtype=model.dtype)
    training = model.training
    with torch.no_grad():
        before = model.eval()(image, output_features=True).features
        yield
        try:
            same = torch.allclose(model.eval()(image, output_features=True).features, before, rtol=1e-3, atol=1e-4)
        except RuntimeError:  # of shapes that don't fit
            same = False
    model.train(training)
    if not same:
        raise ValueError(f"the blocks of {model.config.architecture} don't add the MLP of a normalised input to it")


def check_kept_features(method: Method, name: str, *, pretrained: bool | str, streaming: bool) -> None:
    """See that a method can be trained on the features of one frozen encoder.

    Raises:
        ValueError: says what it needs that kept features don't have.
    """
    if not pretrained:
        raise ValueError("model.tune head trains heads on a pretrained encoder: set model.pretrained")
    if streaming:
        raise ValueError("model.tune head keeps the features of all training pictures, which a stream does not allow")
    reasons = {"teacher": "shows its pictures to a teacher", "branches": "reads what lies before the features"}
    for stage in method.stages:
        lacking = ["mixes pictures"] if stage.mixing else [reasons[need] for need in reasons if need in stage.needs]
        if lacking:
            raise ValueError(f"model.tune head keeps features instead of pictures, but {name} {lacking[0]}")


class FrozenEncoder:
    """The encoder that all experts of a model start from, outside of the model while heads are trained.

    In the model it gives way to identities, so that the model takes features [B, D] for pictures; what trains,
    checkpoints and counts parameters sees heads alone.

    Args:
        model: whose experts have the same encoder weights.
    """

    def __init__(self, model: ECLForImageClassification) -> None:
        self.trunk, self.backbones = model.trunk, [expert.backbone for expert in model.experts]
        for part in filter(None, [self.trunk, *self.backbones]):
            part.requires_grad_(False).eval()
        model.trunk = None
        for expert in model.experts:
            expert.backbone = nn.Identity()

    def put_into(self, model: ECLForImageClassification) -> None:
        """Let a model that takes features, the one it was taken from or a copy, take pictures again."""
        model.trunk = self.trunk
        device = next(model.experts[0].head.parameters()).device
        for expert, backbone in zip(model.experts, self.backbones, strict=True):
            expert.backbone = backbone.to(device)
        if self.trunk is not None:
            self.trunk.to(device)

    def digest(self) -> bytes:
        """SHA-256 over all weights."""
        found = hashlib.sha256()
        for part in filter(None, [self.trunk, self.backbones[0]]):
            for tensor in part.state_dict().values():
                found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.digest()

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Features of pictures, [B, 3, H, W] -> [B, D]."""
        for part in filter(None, [self.trunk, self.backbones[0]]):
            part.to(pixel_values.device)
        return self.backbones[0](pixel_values if self.trunk is None else self.trunk(pixel_values)).float()


@torch.no_grad()
def encode(
    encoder: Callable[[Tensor], Tensor],
    batches: Iterable[dict[str, Tensor]],
    mirrored: bool,
    gather: Callable[[Any], Any] = lambda tensors: tensors,
) -> dict[str, Tensor]:
    """Features of all pictures in fixed views.

    Args:
        encoder: [B, 3, H, W] -> [B, D].
        batches: dictionaries with `pixel_values` in the evaluation view and `labels`, -1 for a broken picture.
        mirrored: also those of the mirror images.
        gather: joins tensors of all processes without the padding (`Accelerator.gather_for_metrics`).

    Returns:
        `features` [V, N, D], first the evaluation view; `there` [N], whether the picture could be decoded.

    Raises:
        ValueError: features that are not finite.
    """
    parts = []
    for batch in batches:
        pixels = batch["pixel_values"]
        views = [pixels, pixels.flip(-1)] if mirrored else [pixels]
        features = torch.stack([encoder(view) for view in views], dim=1)
        parts.append([tensor.cpu() for tensor in gather((features, batch["labels"] >= 0))])
    features, there = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    found = {"features": features.transpose(0, 1).contiguous(), "there": there}
    if not found["features"].isfinite().all():
        raise ValueError("the encoder gives features that are not finite")
    return found


def read_features(file: Path, fingerprint: str) -> dict[str, Tensor] | None:
    """Kept tensors, if the file is whole and has this fingerprint, of pictures, views and encoder; else None."""
    try:
        check_regular(file)
        with safe_open(file, "pt") as kept:
            if (kept.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            return {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 (no iterator)
    except (OSError, ValueError, RuntimeError, SafetensorError):  # RuntimeError: it can't be mapped
        return None


def write_features(file: Path, tensors: dict[str, Tensor], fingerprint: str) -> None:
    """Keep tensors, so that a reader sees all of them or no file."""
    with replacing(file) as new:
        save_file(tensors, new, {"fingerprint": fingerprint})


def bootstrap(labels: Tensor, seed: int) -> Tensor:
    """Positions of as many pictures of each class as there are, drawn with replacement (Breiman, "Bagging", 1996).

    Experts on one frozen encoder start at the class means of such draws: at equal means, and with equal batches, their
    gradients would be equal for ever, and terms between experts zero. It is a small difference, which the training of
    heads alone makes smaller still: more than one expert pays with a method that drives them apart, such as `ride` or
    `sade`, and not with one that trains each by the same loss.

    Args:
        labels: class indices, [N].
        seed: of the draws.

    Returns:
        [N]; a class of one picture has that one.
    """
    order, counts = labels.argsort(stable=True), labels.bincount()
    sorted_labels = labels[order]
    share = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    within = (share * counts[sorted_labels]).long()
    return order[(counts.cumsum(0) - counts)[sorted_labels] + within]


def takes_class_means(head: nn.Module, stage: Stage) -> bool:
    """Whether `start_at_class_means` gives a stage's head a start: cosine classifiers, and linear ones as they are.

    A linear head that the stage made itself has a start of its own: a bias with which every class is answered by no.
    """
    return isinstance(head, ECLCosineHead) or (type(head) is ECLHead and not callable(stage.heads))


@torch.no_grad()
def start_at_class_means(head: ECLCosineHead | ECLHead, features: Tensor, labels: Tensor, scale: float) -> None:
    """Set the rows of a cosine or linear classifier to the directions of the classes' mean directions.

    The rows of a linear classifier get the length with which its logits are those of a cosine classifier of this scale,
    on features of average length.

    Args:
        head: of an expert.
        features: of the training pictures, [N, D].
        labels: class indices, [N]; a class without pictures keeps the direction of its row.
        scale: of a cosine classifier that a linear one is to start as.
    """
    means = torch.zeros(head.weight.shape).index_add_(0, labels, F.normalize(features, dim=-1))
    seen = torch.bincount(labels, minlength=len(means)) > 0
    rows = torch.where(seen[:, None], F.normalize(means, dim=-1), F.normalize(head.weight.cpu(), dim=-1))
    head.weight.copy_(rows if isinstance(head, ECLCosineHead) else rows * scale / features.norm(dim=-1).mean())
    if head.bias is not None:
        head.bias.zero_()
