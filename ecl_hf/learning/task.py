"""The collaborative task: an ensemble, and whatever exists only to train it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf.heads import create_head, log_prior_shift
from ecl_hf.learning.momentum import KeyQueue, MomentumEncoder, follow, frozen_copy
from ecl_hf.losses import full_precision
from ecl_hf.methods import Method, TaskOutputs
from ecl_hf.methods.settings import LossConfig
from ecl_hf.modeling_ecl import ECLForImageClassification

TWO_PASSES = "mtia.disable_welford_reduction"
"""Inductor's switch for variances in two passes, made for another device. The usual single pass (Welford's) keeps a CPU
calculating for longer than it takes to read the activations twice."""


class CollaborativeTask(nn.Module):
    """Joint training of K experts by a method's terms (Eq. 11); export `task.model`.

    All trainable work happens in one `forward`, so that distributed wrappers see it. `forward` changes no state of the
    momentum branch: the loop calls `enqueue` after each batch and `follow` after each optimiser step.

    Args:
        model: the ensemble; its config's `class_counts` give the prior of the training set.
        method: what to train; only the branches that its terms need are built.
        config: weights and constants of the terms.

    Raises:
        ValueError: the model does not know its class counts, or a method for one expert meets several.
    """

    def __init__(self, model: ECLForImageClassification, method: Method, config: LossConfig | None = None) -> None:
        super().__init__()
        config = config or LossConfig()
        if model.config.class_counts is None:
            raise ValueError("the model's config needs class_counts: the training images of each class")
        num_experts = len(model.experts)
        if method.max_experts is not None and num_experts > method.max_experts:
            raise ValueError(f"this method trains {method.max_experts} expert, but the model has {num_experts}")
        self.model = model
        self.method = method
        self.loss_config = config
        self.register_buffer("log_prior_shift", log_prior_shift(model.config.class_counts), persistent=False)
        counts = torch.tensor(model.config.class_counts, dtype=torch.float32).clamp_min(1)
        self.register_buffer("log_class_counts", counts.log(), persistent=False)

        width = model.experts[0].head.in_features
        self.references = self.projectors = self.momentum = self.momentum_trunk = self.queue = None
        if "reference" in method.needs:
            self.references = nn.ModuleList(create_head(model.config, width) for _ in range(num_experts))
        if "momentum" in method.needs:
            self.projectors = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.projection_dim))
                for _ in range(num_experts)
            )
            pairs = zip(model.experts, self.projectors, strict=True)
            self.momentum = nn.ModuleList(MomentumEncoder(expert.backbone, projector) for expert, projector in pairs)
            if model.trunk is not None:
                self.momentum_trunk = frozen_copy(model.trunk)
            self.queue = KeyQueue(num_experts, config.queue_size, config.projection_dim)

    def forward(
        self, pixel_values: Tensor, labels: Tensor, contrast_pixel_values: Tensor | None = None
    ) -> dict[str, Tensor | dict[str, Tensor] | None]:
        """Loss of one batch.

        Args:
            pixel_values: supervised view, [B, 3, H, W]; one forward serves classification and queries.
            labels: class indices, [B].
            contrast_pixel_values: second view, [B, 3, H, W]; read by methods with a momentum branch.

        Returns:
            `loss` (Eq. 11, []), `terms` (the unweighted terms by name, []), and `keys` ([B, K, P] or None) for
            `enqueue`.
        """
        output = self.model(pixel_values, output_features=True)
        features = output.features.transpose(0, 1)
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
        with torch.autocast(pixel_values.device.type, enabled=False):
            outputs = TaskOutputs(
                labels=labels,
                cls_logits=output.expert_logits.transpose(0, 1),
                features=features,
                log_prior_shift=self.log_prior_shift,
                log_class_counts=self.log_class_counts,
                ref_logits=ref_logits,
                queries=None if queries is None else F.normalize(*full_precision(queries), dim=-1),
                keys=keys,
                queues=None if self.queue is None else self.queue.keys,
            )
            terms = {term.name: term.loss(outputs, self.loss_config) for term in self.method.terms}
            loss = sum(self._weight(term.weight) * terms[term.name] for term in self.method.terms)
        return {
            "loss": loss,
            "terms": {name: value.detach() for name, value in terms.items()},
            "keys": None if keys is None else keys.transpose(0, 1),
        }

    def compile_encoders(self) -> None:
        """Have `torch.compile` make faster code of all encoders at their first forward; the rest of a step is little.

        One graph serves the experts and one the key encoders, so that compiling takes a fraction of the time that it
        takes for the whole forward. Only `torch.compiler.set_stance` turns it off again.
        """
        options = {}
        if self.log_prior_shift.device.type == "cpu" and TWO_PASSES in torch._inductor.list_options():
            options[TWO_PASSES] = True
        encoders = [expert.backbone for expert in self.model.experts]
        if self.momentum is not None:
            encoders += [key.encoder for key in self.momentum]
        for encoder in filter(None, [self.model.trunk, self.momentum_trunk, *encoders]):
            encoder.compile(options=options)

    def _weight(self, name: str | None) -> float:
        return 1.0 if name is None else getattr(self.loss_config, name)

    def enqueue(self, keys: Tensor) -> None:
        """Put the keys of all processes into the queues, [B, K, P]; call it after each batch."""
        self.queue.enqueue(keys)

    def follow(self) -> None:
        """Move the momentum encoders towards the experts; call it once after each optimiser step."""
        if self.momentum is not None:
            for expert, projector, key in zip(self.model.experts, self.projectors, self.momentum, strict=True):
                key.follow(expert.backbone, projector, self.loss_config.key_momentum)
        if self.momentum_trunk is not None:
            follow([self.momentum_trunk], [self.model.trunk], self.loss_config.key_momentum)
