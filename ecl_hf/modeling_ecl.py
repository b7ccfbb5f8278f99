"""K independent experts behind one Hugging Face model: everything that inference needs, and nothing else.

- An expert is a timm encoder without classifier plus a classification head (Sec. V-E keeps just these two).
- The ensemble's logits are the mean of the experts' raw logits.
- Saved with one safetensors file per expert, so that one expert can be read without the others.
- timm's own initialisation is kept: `_init_weights` touches the heads alone.
"""

import copy
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .backbones import create_encoder
from .configuration_ecl import ECLConfig

DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def log_prior_shift(
    class_counts: Sequence[int] | Tensor, target_prior: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Gap of the log priors of training and test set, `log p_s - log p_t` (Eq. 2).

    Args:
        class_counts: training images of each class, [C]; a zero is counted as one, with a warning.
        target_prior: class probabilities (or weights) of the test set, [C]; uniform when None.

    Returns:
        [C], float32.

    Raises:
        ValueError: a negative or non-finite entry, or lengths that differ.
    """
    counts = torch.as_tensor(class_counts).to("cpu", torch.float64)
    if counts.ndim != 1 or not len(counts) or not counts.isfinite().all() or counts.min() < 0:
        raise ValueError("class_counts must be one non-negative number for each class")
    if empty := (counts == 0).nonzero().flatten().tolist():
        warnings.warn(f"{len(empty)} classes have no training image and are counted as one: {empty[:10]}", stacklevel=2)
        counts = counts.clamp_min(1)
    source = counts / counts.sum()
    if target_prior is None:
        return (source.log() + math.log(len(counts))).float()
    target = torch.as_tensor(target_prior).to("cpu", torch.float64)
    if target.shape != counts.shape:
        raise ValueError(f"target_prior has shape {list(target.shape)}, but there are {len(counts)} classes")
    if not target.isfinite().all() or target.min() < 0 or target.sum() == 0:
        raise ValueError("target_prior must hold non-negative finite numbers, not all of them zero")
    target = (target / target.sum()).clamp_min(torch.finfo(torch.float32).tiny)  # a zero would give infinite logits
    return (source.log() - target.log()).float()


class ECLHead(nn.Linear):
    """Linear classifier, [B, D] -> [B, C]."""


class ECLCosineHead(nn.Linear):
    """Cosine classifier, `scale * cos(v, w_c) + b_c`; [B, D] -> [B, C]."""

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale

    def reset_parameters(self) -> None:
        """Uniform weights and a zero bias."""
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        cosine = F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))
        return self.scale * cosine + self.bias


def create_head(config: ECLConfig, in_features: int) -> nn.Linear:
    """A freshly initialised classifier of the configured kind."""
    if config.classifier == "cosine":
        return ECLCosineHead(in_features, config.num_labels, config.classifier_scale)
    return ECLHead(in_features, config.num_labels)


def data_config(pretrained_cfg: dict[str, Any], model_args: dict[str, Any] | None = None) -> dict[str, Any]:
    """What an image processor must know of timm's `pretrained_cfg`, for a model built with these arguments."""
    known = {key: pretrained_cfg[key] for key in DATA_KEYS if pretrained_cfg.get(key) is not None}
    channels, height, width = known["input_size"]
    size = (model_args or {}).get("img_size", (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    known["input_size"] = ((model_args or {}).get("in_chans", channels), height, width)
    return known


class Expert(nn.Module):
    """One expert: encoder and classification head."""

    def __init__(self, config: ECLConfig) -> None:
        super().__init__()
        self.backbone = create_encoder(config.architecture, **(config.model_args or {}))
        self.head = create_head(config, self.backbone.head_hidden_size)


@dataclass
class ECLImageClassifierOutput(ModelOutput):
    """What the model returns; batch first everywhere.

    Attributes:
        loss: mean over experts of the cross-entropy that fits `config.logit_prior`, when labels are given.
        logits: mean of the experts' raw logits, adjusted to `target_prior` if one is given; [B, C].
        expert_logits: raw logits of each expert, [B, K, C].
        features: pooled backbone features of each expert, [B, K, D], when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    expert_logits: Tensor | None = None
    features: Tensor | None = None


class ECLForImageClassification(PreTrainedModel):
    """An ensemble of K timm encoders with their classification heads."""

    config_class = ECLConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False

    def __init__(self, config: ECLConfig) -> None:
        super().__init__(config)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))
        if config.pretrained_cfg is None:
            config.pretrained_cfg = data_config(self.experts[0].backbone.pretrained_cfg, config.model_args)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # No super(): it would draw timm's weights anew. Non-persistent buffers are garbage after loading on `meta`.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        elif isinstance(module, ECLHead | ECLCosineHead):
            module.reset_parameters()

    def get_input_embeddings(self) -> None:
        """Pictures have no embedding table."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        target_prior: Sequence[float] | Tensor | None = None,
        output_features: bool = False,
        return_dict: bool | None = None,
    ) -> ECLImageClassifierOutput | tuple[Tensor, ...]:
        """Classify a batch.

        Args:
            pixel_values: normalised images, [B, 3, H, W].
            labels: class indices, [B]; asks for the loss.
            target_prior: class probabilities of the data to be classified, [C]; moves the logits from the prior that
                they carry (`config.logit_prior`) to this one (Eq. 2 and 4, tau = 1).
            output_features: return the pooled features too.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: `target_prior` does not hold one non-negative number for each class.
        """
        features = torch.stack([expert.backbone(pixel_values) for expert in self.experts], dim=1)
        expert_logits = torch.stack([e.head(v) for e, v in zip(self.experts, features.unbind(1), strict=True)], dim=1)
        logits = expert_logits.mean(1)
        loss = None
        if labels is not None:
            shifted = expert_logits
            if self.config.logit_prior == "uniform" and self.config.class_counts is not None:
                shifted = expert_logits + log_prior_shift(self.config.class_counts).to(logits)
            loss = F.cross_entropy(shifted.flatten(0, 1), labels.repeat_interleave(len(self.experts)))
        if target_prior is not None:
            carried = self.config.class_counts if self.config.logit_prior == "train" else [1] * self.config.num_labels
            logits = logits - log_prior_shift(carried, target_prior).to(logits)
        output = ECLImageClassifierOutput(loss, logits, expert_logits, features if output_features else None)
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        experts: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> "ECLForImageClassification":
        """Load a saved ensemble, or some of its experts.

        Args:
            pretrained_model_name_or_path: directory or Hub repository.
            *args: passed on.
            experts: positions of the experts to load, in this order; only their files are read (or downloaded).
            **kwargs: as for every `PreTrainedModel`.

        Raises:
            ValueError: `experts` names one that is not there, none, or one twice; or encoder weights are missing.
        """
        with_info = kwargs.pop("output_loading_info", False)
        source = pretrained_model_name_or_path
        if experts is not None:
            hub = {key: kwargs.pop(key) for key in HUB_KEYS if key in kwargs}
            config = kwargs.pop("config", source)
            if not isinstance(config, PreTrainedConfig):
                config, kwargs = cls.config_class.from_pretrained(config, return_unused_kwargs=True, **hub, **kwargs)
            kwargs["state_dict"] = _read_experts(source, config.num_experts, experts, hub)
            kwargs["config"] = copy.deepcopy(config)
            kwargs["config"].num_experts = len(experts)
            source = None  # nothing more to read
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        # Left alone, these would be uninitialised memory.
        absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        if absent := sorted(key for key in absent if ".backbone." in key):
            raise ValueError(
                f"{pretrained_model_name_or_path} has no fitting weights for {len(absent)} encoder tensors of "
                f"{model.config.architecture}, such as {absent[0]}; it is incomplete or made for another architecture"
            )
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write config and weights, one file per expert; `max_shard_size` has no effect."""
        directory = Path(save_directory)
        if kwargs.get("is_main_process", True):
            for stale in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):  # loaders prefer a leftover single file
                (directory / stale).unlink(missing_ok=True)
        expert = self.experts[0].state_dict().values()
        kwargs["max_shard_size"] = max(1, sum(tensor.numel() * tensor.element_size() for tensor in expert))
        super().save_pretrained(save_directory, **kwargs)


def _read_experts(
    source: str | Path, num_experts: int, experts: Sequence[int], hub: dict[str, Any]
) -> dict[str, Tensor]:
    """State dict of the chosen experts, renumbered from 0; opens their files only."""
    wrong = [k for k in experts if k not in range(num_experts)]
    if wrong or not experts or len(set(experts)) < len(experts):
        raise ValueError(f"experts={list(experts)} must name different experts out of 0..{num_experts - 1} of {source}")
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    weight_map = json.loads(Path(index).read_text())["weight_map"] if index else None
    state = {}
    for position, k in enumerate(experts):
        prefix = f"experts.{k}."
        names = (
            {file for key, file in weight_map.items() if key.startswith(prefix)} if weight_map else {SAFE_WEIGHTS_NAME}
        )
        for name in sorted(names):
            with safe_open(cached_file(source, name, **hub), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (a safetensors file is not a mapping)
                    if key.startswith(prefix):
                        state[f"experts.{position}.{key.removeprefix(prefix)}"] = file.get_tensor(key)
    return state


__all__ = ["ECLForImageClassification", "ECLImageClassifierOutput"]
