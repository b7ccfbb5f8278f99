"""The optimiser of a stage, by timm's names, and the course of its learning rate."""

import math
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from timm.models import group_parameters
from torch import nn
from torch.optim import SGD, Optimizer

from ecl_hf.learning.config import OptimConfig
from ecl_hf.methods.base import Stage
from ecl_hf.modeling_ecl import ECLForImageClassification

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def build_optimizer(
    task: nn.Module, config: OptimConfig, stage: Stage, settings: Any = None, fused: bool = True
) -> Optimizer:
    """The optimiser for those parameters of a task that take gradients.

    Each group has `lr_scale`, its factor on the learning rate that `learning_rate` gives.

    Args:
        task: holds the ensemble as `model`.
        config: the recipe's.
        stage: may have another weight decay, and learning rates by parameter.
        settings: of the method.
        fused: use PyTorch's fused SGD.

    Raises:
        ValueError: timm has no such optimizer, or no layers to decay over.
    """
    groups = parameter_groups(task, config, stage, settings)
    lr = config.lr * stage.lr
    if config.name == "sgd":
        return SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    try:
        return timm.optim.create_optimizer_v2(groups, opt=config.name, lr=lr, momentum=config.momentum)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"optim.name: timm has no optimizer {config.name!r}; some are {', '.join(timm.optim.list_optimizers()[:8])}"
        ) from error


def parameter_groups(task: nn.Module, config: OptimConfig, stage: Stage, settings: Any) -> list[dict[str, Any]]:
    """Parameters that take gradients, in groups of equal weight decay and `lr_scale`."""
    decay = config.weight_decay if stage.weight_decay is None else stage.weight_decay(settings)
    spared = {
        "norm": {id(weight) for layer in task.modules() if isinstance(layer, NORMS) for weight in layer.parameters()},
        "bias": {id(weight) for name, weight in task.named_parameters() if name.endswith(".bias")},
        "head": {id(weight) for name, weight in task.named_parameters() if ".head." in name},
    }
    without = set().union(*(spared[kind] for kind in config.no_decay))
    scales = {} if config.layer_decay is None else layer_scales(task.model, config.layer_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, weight in task.named_parameters():
        if weight.requires_grad:
            own = stage.lr_factor(name, settings, task.model) if stage.lr_factor else 1.0
            scale = scales.get(id(weight), 1.0) * own
            key = (0.0 if id(weight) in without else decay, scale)
            group = groups.setdefault(key, {"params": [], "weight_decay": key[0], "lr_scale": key[1]})
            group["params"].append(weight)
    return list(groups.values())


def layer_scales(model: ECLForImageClassification, decay: float) -> dict[int, float]:
    """Factor on the learning rate of each encoder weight, by its id: `decay` to the power of the layers above its own.

    Raises:
        ValueError: the experts share stages, or timm does not know the architecture's layers.
    """
    name = model.config.architecture
    if model.trunk is not None:
        raise ValueError("optim.layer_decay does not go with model.share_stages")
    scales = {}
    for expert in model.experts:
        if not hasattr(expert.backbone, "group_matcher"):
            raise ValueError(f"optim.layer_decay: timm does not know the layers of {name}")
        layers = group_parameters(expert.backbone, expert.backbone.group_matcher(coarse=False), reverse=True)
        top = max(layers.values())
        for key, weight in expert.backbone.named_parameters():
            scales[id(weight)] = decay ** (top - layers.get(key, top))
    return scales


def learning_rate(
    config: OptimConfig, steps_per_epoch: int, schedule: str | None = None
) -> Callable[[int, int], float]:
    """The factor on the learning rate in an optimiser step of a stage, from the step (from 0) and the stage's steps.

    Args:
        config: the recipe's.
        steps_per_epoch: optimiser steps.
        schedule: a stage's own course, which has no warm-up; the recipe's when None.

    Raises:
        ValueError: at a call, if the stage is no longer than the warm-up.
    """
    warmup = 0 if schedule else round(config.warmup_epochs * steps_per_epoch)
    schedule = schedule or config.schedule

    def factor(step: int, total: int) -> float:
        if total <= warmup:
            raise ValueError(f"optim.warmup_epochs {config.warmup_epochs:g} is all of a stage of {total} steps")
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "cosine":
            return cosine(step - warmup, total - warmup)
        if schedule == "step":
            return config.step_factor ** sum(step >= share * total for share in config.milestones)
        return 1.0

    return factor


def cosine(step: int, total: int) -> float:
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * step / total)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
