"""What methods are put together from: terms, parts, stages, heads, and steps after the last stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ecl_hf.aggregation import Aggregation
from ecl_hf.checks import require
from ecl_hf.data.samplers import Sampler, instance
from ecl_hf.methods.settings import Settings
from ecl_hf.modeling_ecl import ECLForImageClassification


@dataclass(frozen=True)
class Time:
    """How far a stage has come.

    Attributes:
        epoch: the running epoch of the stage, from 0.
        epochs: of the stage.
    """

    epoch: int = 0
    epochs: int = 1

    @property
    def progress(self) -> float:
        """Share of the stage's epochs that is done, in [0, 1)."""
        return self.epoch / self.epochs


@dataclass(frozen=True)
class ViewOutputs:
    """What the experts make of another view, of the second stream, or what a teacher makes of the same pictures.

    Attributes:
        logits: raw logits, [K, B, C].
        features: pooled features, [K, B, D].
    """

    logits: Tensor
    features: Tensor


@dataclass(frozen=True)
class TaskOutputs:
    """What one training forward offers to the terms; what no term of the stage needs is None or empty.

    Attributes:
        labels: [B].
        cls_logits: raw logits of the classification heads, [K, B, C].
        features: pooled backbone features, [K, B, D].
        branch_logits: what the heads' `branches` make of the encoders' last maps, [K, R, B, C].
        log_prior_shift: `log p_s - log p_t`, [C].
        log_class_counts: [C]; an empty class counts as one picture.
        ref_logits: raw logits of the reference heads, [K, B, C].
        queries: L2-normalised projections of the supervised view, [K, B, P].
        keys: L2-normalised keys of the contrastive view, [K, B, P].
        queues: negatives of each expert, [K, Q, P].
        queue_labels: class of each of these keys, [Q]; -1 where nothing was stored yet.
        indices: positions of the pictures in the training set, [B].
        time: of the stage.
        views: the stage's further views, in its order; they went through the experts in one batch with the first.
        partner: the second stream, where no mixing has used it up.
        partner_labels: its labels, [B].
        teacher: outputs of the frozen teacher for the same input, [J, B, C] and [J, B, D]; no gradient.
        heads: the experts' classification heads.
        router: the ensemble's, where it has one.
        parts: train-only module of each term that has one, by the term's name.
    """

    labels: Tensor
    cls_logits: Tensor
    features: Tensor
    log_prior_shift: Tensor
    log_class_counts: Tensor
    branch_logits: Tensor | None = None
    ref_logits: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    queues: Tensor | None = None
    queue_labels: Tensor | None = None
    indices: Tensor | None = None
    time: Time = Time()
    views: tuple[ViewOutputs, ...] = ()
    partner: ViewOutputs | None = None
    partner_labels: Tensor | None = None
    teacher: ViewOutputs | None = None
    heads: tuple[nn.Module, ...] = ()
    router: nn.Module | None = None
    parts: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def class_counts(self) -> Tensor:
        """Training images of each class, [C]; an empty class counts as one."""
        return self.log_class_counts.exp().round()


@dataclass(frozen=True)
class PerImage:
    """A loss that is a mean over images: `sum_i w[y_i] l_i / sum_i w[y_i]`.

    The task takes the mean, so that it is that of the whole optimiser step: of all processes and micro-batches.

    Attributes:
        losses: [B]; or [M, B], several such means, which are added.
        class_weights: w, [C], or [M, C]; all ones when None. A mean without any weight in the step is 0.
    """

    losses: Tensor
    class_weights: Tensor | None = None


Loss = Callable[[TaskOutputs, Any], "Tensor | PerImage"]
"""Unweighted loss of a forward under the method's settings: [] or a loss per image."""


@dataclass(frozen=True)
class PartsContext:
    """What a term's part is built from.

    Attributes:
        model: the ensemble to train.
        settings: of the method.
        class_counts: training images of each class, [C], int64.
        labels: of the training pictures, [N], int64; None for a stream.
    """

    model: ECLForImageClassification
    settings: Any
    class_counts: Tensor
    labels: Tensor | None

    @property
    def width(self) -> int:
        """Channels of the pooled features, D."""
        return self.model.experts[0].head.in_features


@dataclass(frozen=True)
class EpochContext:
    """What the hooks of a part may look at.

    Attributes:
        time: of the stage.
        model: the ensemble.
        settings: of the method.
        class_counts: [C], int64.
        predict: runs the training set through the model in evaluation mode and view; the same in every process:
            labels [N], raw logits [N, K, C], features [N, K, D], on the CPU. Pictures that can't be decoded have the
            label -1.
        teacher: the same of the teacher, None without one.
    """

    time: Time
    model: ECLForImageClassification
    settings: Any
    class_counts: Tensor
    predict: Callable[[], tuple[Tensor, Tensor, Tensor]]
    teacher: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None


class Part(nn.Module):
    """Train-only module of a term: its parameters are trained, its buffers are in the checkpoint."""

    @property
    def picture_weights(self) -> Tensor | None:
        """What the sampler `by_weights` draws pictures by, [N]; None for all alike."""
        return None

    def before_epoch(self, context: EpochContext) -> None:
        """Called before each epoch of the stage; not when a run goes on within one."""

    def after_epoch(self, context: EpochContext) -> None:
        """Called at the end of each epoch, before the model is validated."""

    def after_step(self) -> None:
        """Called after each optimiser step, before an average of the weights follows."""


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes of the run, in each of them; for the hooks of parts."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
    return tensor


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes of the run, in each of them; gradient does not pass."""
    tensor = tensor.detach()
    connected = torch.distributed.is_available() and torch.distributed.is_initialized()
    return sum_over_processes(tensor) / torch.distributed.get_world_size() if connected else tensor


Branch = Literal["reference", "momentum", "teacher", "branches"]


@dataclass(frozen=True)
class Term:
    """One addend of the loss.

    Attributes:
        name: key in the logs.
        loss: unweighted loss of a forward.
        weight: of the addend: name of a setting, or a function of outputs and settings; None for 1.
        needs: train-only branches that it reads; of the heads, where these have some.
        part: makes the train-only module of the term, `TaskOutputs.parts[name]`.
        two_labels: the loss is linear in the label (as every cross-entropy is): where a mixing gives pictures two
            labels, it is computed for both.
        whole_batch: the loss is no mean over images, so that it needs the batch in one piece: no accumulation, and one
            process.
        across_processes: the loss adds up over the processes itself: there may be several.
    """

    name: str
    loss: Loss
    weight: str | Callable[[TaskOutputs, Any], float] | None = None
    needs: frozenset[Branch] = frozenset()
    part: Callable[[PartsContext], Part] | None = None
    two_labels: bool = False
    whole_batch: bool = False
    across_processes: bool = False


@dataclass(frozen=True)
class Trains:
    """Which parameters a stage moves. What stays is in evaluation mode.

    Attributes:
        parameters: whether a parameter of the task moves, by its name: `model.trunk.`, `model.sides.K.`,
            `model.experts.K.backbone.`, `model.experts.K.head.`, `model.router.`, `references.K.`, `projectors.K.`,
            `parts.TERM.`.
        statistics: BatchNorm layers that stay keep counting (their running statistics move to the stage's sampler).
    """

    parameters: Callable[[str], bool]
    statistics: bool | Callable[[Any], bool] = False

    def counts_on(self, settings: Any) -> bool:
        """Whether running statistics of frozen layers move."""
        return self.statistics(settings) if callable(self.statistics) else self.statistics


def is_backbone(name: str) -> bool:
    """Whether a parameter of the task belongs to an encoder."""
    return ".backbone." in name


ALL = Trains(lambda _: True)
HEADS = Trains(lambda name: not is_backbone(name))
"""Heads and train-only modules; encoders stay."""
BACKBONES = Trains(lambda name: ".head." not in name)
"""Encoders and train-only modules; classification heads stay."""


@dataclass(frozen=True)
class HeadContext:
    """What a train-only head is built from: the method's settings, class counts [C], and the model that it is for."""

    settings: Any
    class_counts: Tensor
    model: ECLForImageClassification | None = None


@dataclass(frozen=True)
class MixingContext:
    """What a mixing may look at.

    Attributes:
        settings: of the method.
        time: of the stage.
        generator: on the CPU, seeded by seed, epoch, batch and process.
        task: the task with model and teacher, not wrapped for several processes.
        class_counts: [C], int64.
    """

    settings: Any
    time: Time
    generator: torch.Generator
    task: nn.Module
    class_counts: Tensor


Mixing = Callable[[dict[str, Tensor], MixingContext], dict[str, Tensor]]
"""Changes a batch before the forward. May set `mixed_labels` [B] and `share`, the weight of `labels`, [] or [B]; takes
`partner_pixel_values` and `partner_labels` out of it if the stage has a second stream."""


@dataclass(frozen=True)
class Stage:
    """One phase of a training, with an optimiser and a schedule of its own.

    Attributes:
        terms: addends of the loss.
        name: in logs and progress bar.
        sampler: which picture comes next.
        partners: sampler of a second stream; None for none.
        apart: the first expert sees the pictures, and the second those of the second stream.
        views: further views with gradient: names of `data.views`.
        mixing: what becomes of a batch before the forward.
        trains: which parameters move.
        heads: classification heads at the start: `keep`, `new` ones, or a function that puts a train-only head around
            each. What it makes has `fold()`: the published head that computes the same, put in its place at the end.
        share: of the recipe's epochs.
        lr: factor on the recipe's learning rate.
        schedule: another course of the learning rate than the recipe's, without its warm-up; None for the recipe's.
        lr_factor: a factor of its own for each parameter, by name, settings and the ensemble.
        trunk_from: whose gradient reaches the stages that the experts share.
        weight_decay: another one than the recipe's, from the settings.
    """

    terms: tuple[Term, ...]
    name: str = "training"
    sampler: Sampler = instance
    partners: Sampler | None = None
    apart: bool = False
    views: tuple[Literal["supervised", "contrastive", "plain", "rotated"], ...] = ()
    mixing: Mixing | None = None
    trains: Trains = ALL
    heads: Literal["keep", "new"] | Callable[[nn.Module, HeadContext], nn.Module] = "keep"
    share: float = 1.0
    lr: float = 1.0
    schedule: Literal["cosine", "step", "constant"] | None = None
    lr_factor: Callable[[str, Any, ECLForImageClassification], float] | None = None
    trunk_from: Literal["all", "first"] = "all"
    weight_decay: Callable[[Any], float] | None = None

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        require(len(names) == len({*names}) > 0, f"stage {self.name!r} needs terms of different names, got {names}")
        require(self.share > 0, f"stage {self.name!r}: share must be positive, got {self.share}")
        require(self.partners or not self.apart, f"stage {self.name!r}: experts see a stream each, but there is one")
        if self.mixing and (single := [term.name for term in self.terms if not term.two_labels]):
            raise ValueError(
                f"stage {self.name!r} mixes pictures of two classes, but its term {single[0]!r} takes one label"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Train-only branches of all terms."""
        return frozenset().union(*(term.needs for term in self.terms))


@dataclass(frozen=True)
class HeadKind:
    """A classification head as the published configuration names it; see `ECLConfig`.

    Attributes:
        kind: `classifier` there.
        scale: `classifier_scale`.
        bias: `classifier_bias`.
        chunks: `classifier_chunks`.
        neck: `classifier_neck` in multiples of the encoder's features.
    """

    kind: str = "linear"
    scale: float = 16.0
    bias: bool = True
    chunks: int = 1
    neck: int = 0


@dataclass(frozen=True)
class Experts:
    """How many experts a method trains, and what of their encoders is one for all of them.

    Attributes:
        default: how many by itself.
        least: how many at least.
        most: how many at most; None for any number.
        shared: `share_stages` and `share_blocks` for an encoder, where the recipe does not give them.
        side_branches: each has one, from the shared stages in turn, where whole stages are shared.
    """

    default: int = 3
    least: int = 1
    most: int | None = None
    shared: Callable[[nn.Module], tuple[int, int]] | None = None
    side_branches: bool = False


@dataclass(frozen=True)
class FinishContext:
    """What the steps after the last stage may look at: see `EpochContext`; they change the model's heads in place."""

    model: ECLForImageClassification
    settings: Any
    class_counts: Tensor
    predict: Callable[[], tuple[Tensor, Tensor, Tensor]]


Finish = Callable[[FinishContext], None]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        stages: one after the other; their shares of the epochs add up to 1.
        settings: constants with the published defaults; the recipe's section `loss`.
        head: kind of the classification heads; None for the recipe's choice.
        experts: how many it is made for.
        teacher: method whose finished model is asked for.
        finish: rewrites the heads after the last stage; can be repeated.
        aggregation: how the experts' logits make the ensemble's, from class counts [C], settings and K; their mean when
            None. See `ECLConfig`.
        logit_prior: class prior that the published raw logits carry: `uniform`, `train`, or log priors [C] from class
            counts [C], settings and K; see `ECLConfig`.
    """

    stages: tuple[Stage, ...]
    settings: type[Settings] = Settings
    head: HeadKind | None = None
    experts: Experts = Experts()
    teacher: str | None = None
    finish: tuple[Finish, ...] = ()
    aggregation: Callable[[Tensor, Any, int], Aggregation] | None = None
    logit_prior: Literal["uniform", "train"] | Callable[[Tensor, Any, int], Tensor] = "uniform"

    def __post_init__(self) -> None:
        total = sum(stage.share for stage in self.stages)
        require(abs(total - 1) < 1e-9, f"the shares of a method's stages must add up to 1, not {total:g}")

    def num_experts(self, asked: int | None) -> int:
        """Number of experts to train; ValueError if the method is not made for so many."""
        least, most = self.experts.least, self.experts.most
        number = self.experts.default if asked is None else asked
        if number < least or (most is not None and number > most):
            made_for = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            experts = "expert" if least == most == 1 else "experts"
            raise ValueError(
                f"this method trains {made_for} {experts}, but the model has {number}: take --model.num_experts "
                f"{least if number < least else most}"
            )
        return number

    def stage_epochs(self, epochs: int) -> list[int]:
        """Epochs of each stage, at least one each, in proportion to the shares.

        Raises:
            ValueError: fewer epochs than stages.
        """
        require(epochs >= len(self.stages), f"this method has {len(self.stages)} stages, but there are {epochs} epochs")
        ends, done = [], 0.0
        for position, stage in enumerate(self.stages, start=1):
            done += stage.share
            least, most = position, epochs - (len(self.stages) - position)
            ends.append(min(max(round(done * epochs), least), most))
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]
