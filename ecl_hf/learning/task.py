"""The collaborative task: an ensemble, and whatever exists only to train it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf.heads import create_head, log_prior_shift
from ecl_hf.learning.momentum import KeyQueue, MomentumEncoder, create_projector, follow, frozen_copy
from ecl_hf.learning.tuning import TUNERS, parameters_to_tune
from ecl_hf.losses import full_precision
from ecl_hf.methods.base import Method, Part, PartsContext, PerImage, Stage, TaskOutputs, Time, ViewOutputs
from ecl_hf.modeling_ecl import ECLForImageClassification

TWO_PASSES = "mtia.disable_welford_reduction"
"""Inductor's switch for variances in two passes, made for another device. The usual single pass (Welford's) keeps a CPU
calculating for longer than it takes to read the activations twice."""

CUDA_GRAPHS = "triton.cudagraphs"
"""Inductor's switch for recorded kernels."""


class CollaborativeTask(nn.Module):
    """Joint training of K experts by the terms of a method's stage (Eq. 11); export `task.model`.

    All trainable work happens in one `forward`, so that distributed wrappers see it. `forward` changes no state of the
    momentum branch: the loop calls `enqueue` after each batch and `follow` after each optimiser step.

    Args:
        model: the ensemble; its config's `class_counts` give the prior of the training set.
        method: what to train.
        settings: constants of the method; its defaults when None.
        stage: position of the stage; only the branches and parts that its terms need are built.
        labels: of the training pictures, [N]; for parts that keep something for each picture.
        teacher: finished model of the method's teacher; it is used, never trained, and no part of the saved state.
        tune: what of the encoders moves, see `parameters_to_tune`; a stage may leave more in its place.

    Raises:
        ValueError: the model does not know its class counts, has more or fewer experts than the method is made for, or
            the stage has a teacher that is missing.
    """

    def __init__(
        self,
        model: ECLForImageClassification,
        method: Method,
        settings: Any = None,
        stage: int = 0,
        labels: Tensor | None = None,
        teacher: ECLForImageClassification | None = None,
        tune: str = "all",
    ) -> None:
        super().__init__()
        if model.config.class_counts is None:
            raise ValueError("the model's config needs class_counts: the training images of each class")
        num_experts = method.num_experts(len(model.experts))
        self.model = model
        self.method = method
        self.stage: Stage = method.stages[stage]
        self.settings = settings = settings or method.settings()
        self.time = Time()
        self._teacher = [teacher.eval().requires_grad_(False)] if teacher is not None else []  # hidden from state_dict
        if "teacher" in self.stage.needs and not self._teacher:
            raise ValueError(f"stage {self.stage.name!r} needs a teacher: a finished model of {method.teacher}")
        self.register_buffer("log_prior_shift", log_prior_shift(model.config.class_counts), persistent=False)
        counts = torch.tensor(model.config.class_counts, dtype=torch.float32).clamp_min(1)
        self.register_buffer("log_class_counts", counts.log(), persistent=False)

        width = model.experts[0].head.in_features
        self.references = self.projectors = self.momentum = self.momentum_trunk = self.queue = None
        if "reference" in self.stage.needs:
            self.references = nn.ModuleList(create_head(model.config, width) for _ in range(num_experts))
        if "momentum" in self.stage.needs:
            self.projectors = nn.ModuleList(create_projector(width, settings) for _ in range(num_experts))
            pairs = zip(model.experts, self.projectors, strict=True)
            self.momentum = nn.ModuleList(MomentumEncoder(expert.backbone, projector) for expert, projector in pairs)
            if model.trunk is not None:
                self.momentum_trunk = frozen_copy(model.trunk)
            self.queue = KeyQueue(num_experts, settings.queue_size, settings.projection_dim)
        context = PartsContext(model, settings, torch.tensor(model.config.class_counts), labels)
        self.parts = nn.ModuleDict({term.name: term.part(context) for term in self.stage.terms if term.part})
        self.average: ModelEmaV3 | None = None
        self.best: ECLForImageClassification | None = None
        self.tune = tune
        self._recorded = False  # whether a GPU replays the encoders' kernels
        self._freeze()

    def keep_average(self, decay: float) -> None:
        """Keep an average of the model's weights, `average.module`, which follows after each optimiser step."""
        self.average = ModelEmaV3(self.model, decay=decay).requires_grad_(False)

    def keep_best(self) -> None:
        """Make room for the model of the best epoch, `best`, which the loop fills by `load_state_dict`."""
        self.best = frozen_copy(self.model)

    def _freeze(self) -> None:
        """Let those parameters move that the stage trains; what stays for good is in evaluation mode."""
        tuned = parameters_to_tune(self, self.tune)
        for name, parameter in self.named_parameters():
            if not name.startswith(("momentum.", "momentum_trunk.", "average.", "best.")):
                parameter.requires_grad_(self.stage.trains.parameters(name) and tuned(name))
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"stage {self.stage.name!r} trains no parameter of this model")

    @contextmanager
    def _trunk_learns(self) -> Iterator[None]:
        """Within, gradient reaches what the experts share from those experts only that the stage names."""
        others = self.model.experts[1:] if self.stage.trunk_from == "first" else ()
        hooks = [expert.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),)) for expert in others]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def train(self, mode: bool = True) -> "CollaborativeTask":
        """Training mode for what the stage trains; encoders and heads that stay are in evaluation mode."""
        super().train(mode)
        if mode and not self.stage.trains.counts_on(self.settings):
            pieces = [piece for expert in self.model.experts for piece in (expert.backbone, expert.head)]
            pieces += self.model.sides or ()
            for piece in filter(None, [self.model.trunk, *pieces]):
                if not any(parameter.requires_grad for parameter in piece.parameters()):
                    piece.eval()
            if self.tune in TUNERS:  # small additions don't call for other statistics
                parts = [*(expert.backbone for expert in self.model.experts), self.model.trunk, self.momentum_trunk]
                parts += [key.encoder for key in self.momentum or ()]
                for layer in (layer for part in filter(None, parts) for layer in part.modules()):
                    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                        layer.eval()
        return self

    def adopt(self, earlier: "CollaborativeTask") -> None:
        """Go on with the train-only modules of the stage before that this stage has too."""
        for name in ("references", "projectors", "momentum", "momentum_trunk", "queue"):
            if getattr(self, name) is not None and getattr(earlier, name) is not None:
                setattr(self, name, getattr(earlier, name))
        for name in self.parts.keys() & earlier.parts.keys():
            if type(self.parts[name]) is type(earlier.parts[name]):
                self.parts[name] = earlier.parts[name]
        self._freeze()

    @property
    def teacher(self) -> ECLForImageClassification | None:
        """The finished model that this one learns from."""
        return self._teacher[0] if self._teacher else None

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor,
        contrast_pixel_values: Tensor | None = None,
        partner_pixel_values: Tensor | None = None,
        partner_labels: Tensor | None = None,
        mixed_labels: Tensor | None = None,
        share: Tensor | None = None,
        indices: Tensor | None = None,
        label_counts: Tensor | None = None,
        **views: Tensor,
    ) -> dict[str, Tensor | dict[str, Tensor] | None]:
        """Loss of one batch.

        Args:
            pixel_values: supervised view, [B, 3, H, W]; one forward serves classification and queries.
            labels: class indices, [B].
            contrast_pixel_values: second view, [B, 3, H, W]; read by methods with a momentum branch.
            partner_pixel_values: pictures of the second stream, [B, 3, H, W], where the stage has one.
            partner_labels: theirs, [B].
            mixed_labels: the other class of each picture, [B], where the pictures are mixed.
            share: of `labels` in them, [] or [B].
            indices: positions of the pictures in the training set, [B].
            label_counts: how often each class occurs among `labels`, and among `mixed_labels`, [2, C]: the mean over
                all processes and micro-batches of the step. This batch's own when None.
            **views: `view_0`, ...: the stage's further views, [B, 3, H, W].

        Returns:
            `loss` (Eq. 11, []), `terms` (the unweighted terms by name, []), and `keys` ([B, K, P] or None) for
            `enqueue`.
        """
        if self._recorded:
            torch.compiler.cudagraph_mark_step_begin()  # what the encoders gave for the last batch is used up
        inputs = [pixel_values, *(views[f"view_{n}"] for n in range(len(self.stage.views)))]
        if partner_pixel_values is not None:
            inputs.append(partner_pixel_values)
        others, branch_logits = [], None
        if self.stage.apart:
            logits, features = self._run_apart(inputs)
        elif "branches" in self.stage.needs:
            logits, features, branch_logits = self._run_with_branches(pixel_values)
        else:
            with self._trunk_learns():
                output = self.model(inputs[0] if len(inputs) == 1 else torch.cat(inputs), output_features=True)
            logits, features = output.expert_logits.transpose(0, 1), output.features.transpose(0, 1)
            if len(inputs) > 1:
                pairs = zip(logits.split(len(labels), dim=1), features.split(len(labels), dim=1), strict=True)
                (logits, features), *others = pairs
        ref_logits = queries = keys = None
        if self.references is not None:
            ref_logits = torch.stack([head(v) for head, v in zip(self.references, features, strict=True)])
        if self.momentum is not None:
            queries = torch.stack([project(v) for project, v in zip(self.projectors, features, strict=True)])
            inputs = contrast_pixel_values
            if self.momentum_trunk is not None:
                with torch.no_grad():
                    inputs = self.momentum_trunk(inputs)
            keys = torch.stack([encoder(inputs) for encoder in self.momentum])
        taught = self._ask_teacher(pixel_values) if "teacher" in self.stage.needs else None
        with torch.autocast(pixel_values.device.type, enabled=False):
            outputs = TaskOutputs(
                labels=labels,
                cls_logits=logits,
                features=features,
                branch_logits=branch_logits,
                log_prior_shift=self.log_prior_shift,
                log_class_counts=self.log_class_counts,
                ref_logits=ref_logits,
                queries=None if queries is None else F.normalize(*full_precision(queries), dim=-1),
                keys=keys,
                queues=None if self.queue is None else self.queue.keys,
                queue_labels=None if self.queue is None else self.queue.labels,
                indices=indices,
                time=self.time,
                views=tuple(ViewOutputs(*other) for other in others[: len(self.stage.views)]),
                partner=ViewOutputs(*others[-1]) if others and partner_pixel_values is not None else None,
                partner_labels=partner_labels,
                teacher=taught,
                heads=tuple(expert.head for expert in self.model.experts),
                router=self.model.router,
                parts=dict(self.parts.items()),
            )
            counts = (None, None) if label_counts is None else label_counts.unbind()
            terms = self._terms(outputs, share, counts[0])
            if mixed_labels is not None:
                rest = self._terms(replace(outputs, labels=mixed_labels), 1 - share, counts[1])
                terms = {name: value + rest[name] for name, value in terms.items()}
            loss = sum(self._weight(term.weight, outputs) * terms[term.name] for term in self.stage.terms)
        return {
            "loss": loss,
            "terms": {name: value.detach() for name, value in terms.items()},
            "keys": None if keys is None else keys.transpose(0, 1),
        }

    def _run_apart(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [K, B, C] and features [K, B, D] of experts that see a stream each; what they share sees all."""
        model = self.model
        inputs = streams if model.trunk is None else [model.trunk(stream) for stream in streams]
        features, logits = zip(*(expert(x) for expert, x in zip(model.experts, inputs, strict=True)), strict=True)
        return torch.stack(logits), torch.stack(features)

    def _run_with_branches(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [K, B, C], features [K, B, D], and logits of the heads' branches on the encoders' last maps."""
        model = self.model
        inputs = pixel_values if model.trunk is None else model.trunk(pixel_values)
        logits, features, branches = [], [], []
        for expert in model.experts:
            maps = expert.backbone.forward_features(inputs)
            features.append(expert.backbone.forward_head(maps, pre_logits=True))
            logits.append(expert.head(features[-1]))
            branches.append(expert.head.branches(maps))
        return torch.stack(logits), torch.stack(features), torch.stack(branches)

    @torch.no_grad()
    def _ask_teacher(self, pixel_values: Tensor) -> ViewOutputs:
        output = self.teacher(pixel_values, output_features=True)
        return ViewOutputs(*(x.transpose(0, 1).float() for x in (output.expert_logits, output.features)))

    def _terms(self, outputs: TaskOutputs, share: Tensor | None, counts: Tensor | None) -> dict[str, Tensor]:
        """Every term for one of the pictures' labels, times its share."""
        losses = {term.name: term.loss(outputs, self.settings) for term in self.stage.terms}
        return {name: mean_loss(value, outputs.labels, share, counts) for name, value in losses.items()}

    def compile_encoders(self) -> None:
        """Have `torch.compile` make faster code of all encoders at their first forward; the rest of a step is little.

        One graph serves the experts and one the key encoders, so that compiling takes a fraction of the time that it
        takes for the whole forward. On a GPU their kernels are recorded and replayed (CUDA graphs): small encoders wait
        for Python to launch them otherwise. Only `torch.compiler.set_stance` turns it all off again.
        """
        device, options = self.log_prior_shift.device.type, {}
        if device == "cuda":
            options[CUDA_GRAPHS] = self._recorded = True
        elif device == "cpu" and TWO_PASSES in torch._inductor.list_options():
            options[TWO_PASSES] = True
        encoders = [expert.backbone for expert in self.model.experts]
        if self.momentum is not None:
            encoders += [key.encoder for key in self.momentum]
        for encoder in filter(None, [self.model.trunk, self.momentum_trunk, *encoders]):
            encoder.compile(options=options)

    def _weight(self, weight: Any, outputs: TaskOutputs) -> float:
        if isinstance(weight, str):
            return getattr(self.settings, weight)
        return 1.0 if weight is None else weight(outputs, self.settings)

    def enqueue(self, keys: Tensor, labels: Tensor) -> None:
        """Put keys [B, K, P] and labels [B] of all processes into the queues; call it after each batch."""
        self.queue.enqueue(keys, labels)

    def follow(self) -> None:
        """Let all that goes after the experts do so; call it once after each optimiser step.

        First the parts, which may bring the experts' heads up to date, then momentum encoders and average.
        """
        for part in self.parts.values():
            part: Part
            part.after_step()
        if self.average is not None:
            self.average.update(self.model)
        if self.momentum is not None:
            for expert, projector, key in zip(self.model.experts, self.projectors, self.momentum, strict=True):
                key.follow(expert.backbone, projector, self.settings.key_momentum)
        if self.momentum_trunk is not None:
            follow([self.momentum_trunk], [self.model.trunk], self.settings.key_momentum)


def mean_loss(
    value: Tensor | PerImage, labels: Tensor, share: Tensor | None = None, label_counts: Tensor | None = None
) -> Tensor:
    """A term's loss as one number.

    Args:
        value: what the term returned.
        labels: of the pictures, [B].
        share: of these labels in mixed pictures, [] or [B]; a factor on the loss.
        label_counts: pictures of each class in the whole step, divided by its micro-batches and processes, [C]: their
            weights divide the loss, so that the mean over all of them is the weighted mean of the whole step.

    Raises:
        ValueError: a finished loss, and a share for each picture.
    """
    if isinstance(value, Tensor):
        if share is not None and share.ndim:
            raise ValueError("a share for each picture needs terms that return a loss for each picture")
        return value if share is None else share * value
    losses = value.losses if share is None else share * value.losses
    if value.class_weights is None:
        return losses.mean(-1).sum()
    weights = value.class_weights.to(losses)
    of_images = weights[..., labels]
    total = of_images.sum(-1) if label_counts is None else (weights * label_counts).sum(-1)
    return ((of_images * losses).sum(-1) / total.clamp_min(torch.finfo(total.dtype).tiny)).sum()
