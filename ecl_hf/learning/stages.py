"""From one stage to the next: heads that are new, wrapped or folded; and what of a recipe a method can't use."""

import copy
from typing import Any

import torch

from ecl_hf.checks import require
from ecl_hf.data.samplers import instance
from ecl_hf.heads import HEADS, describe_head
from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.low_rank import merge_low_rank
from ecl_hf.learning.tuning import takes_class_means
from ecl_hf.methods.base import HeadContext, Method, Stage
from ecl_hf.modeling_ecl import ECLForImageClassification


def begin_heads(model: ECLForImageClassification, stage: Stage, settings: Any) -> None:
    """Give the experts the heads that a stage starts with."""
    if stage.heads == "keep":
        return
    context = HeadContext(settings, torch.tensor(model.config.class_counts), model)
    for expert in model.experts:
        if stage.heads == "new":
            expert.head.reset_parameters()
        else:
            expert.head = stage.heads(expert.head, context).to(expert.head.weight.device)
    _describe_heads(model)


def fold_heads(model: ECLForImageClassification) -> None:
    """Put published heads in the place of train-only ones, and their kind into the configuration."""
    for expert in model.experts:
        if hasattr(expert.head, "fold"):
            expert.head = expert.head.fold()
    _describe_heads(model)


def _describe_heads(model: ECLForImageClassification) -> None:
    """Put the kind of published heads into the configuration."""
    if isinstance(model.experts[0].head, HEADS):
        for name, value in describe_head(model.experts[0].head).items():
            setattr(model.config, name, value)


def published_copy(model: ECLForImageClassification) -> ECLForImageClassification:
    """The model as it would be published now: a copy with folded heads and merged low-rank additions."""
    copied = copy.deepcopy(model)
    merge_low_rank(copied)
    fold_heads(copied)
    return copied


def idle_keys(
    method: Method, name: str, config: ModelConfig, model: ECLForImageClassification, *, compiled: bool
) -> list[str]:
    """Sentences on keys that do nothing with a method; they may come from a recipe that was written for another one.

    Args:
        method: of the run.
        name: of the method.
        config: the recipe's model section.
        model: the fresh ensemble.
        compiled: whether the recipe asks for `train.compile`.
    """
    found = []
    if method.head is not None and config.classifier != "linear":
        found.append(
            f"model.classifier {config.classifier} does nothing: {name} has {method.head.kind} heads of its own"
        )
    if config.head_init == "class_means" and not takes_class_means(model.experts[0].head, method.stages[0]):
        found.append(f"model.head_init class_means does nothing: the heads of {name} have a start of their own")
    if compiled and (model.sides is not None or any("branches" in stage.needs for stage in method.stages)):
        found.append(f"train.compile does nothing: {name} looks into the encoders, which are compiled as a whole")
    return found


def check_stages(
    method: Method, *, streaming: bool, pieces: int, teacher: str | None, name: str, processes: int = 1
) -> None:
    """See before a run that its method's stages can be carried out.

    Args:
        method: of the run.
        streaming: whether the training pictures come as a stream.
        pieces: into which the batch of a step is cut: processes times micro-batches.
        teacher: what the recipe says.
        name: of the method.
        processes: that train together.

    Raises:
        ValueError: says what stands in the way.
    """
    if method.teacher is None:
        require(teacher is None, f"model.teacher: {name} learns from no teacher")
    elif teacher is None:
        raise ValueError(
            f"{name} learns from a finished {method.teacher} model: train one with `--method {method.teacher}` and "
            "name its run folder, or its Hub repository, in model.teacher"
        )
    for stage in method.stages:
        if streaming and (stage.sampler is not instance or stage.partners or any(term.part for term in stage.terms)):
            raise ValueError(f"data.streaming: {name} chooses its pictures itself, which a stream does not allow")
        for term in stage.terms:
            together = processes if term.across_processes else 1
            require(
                pieces == together or not term.whole_batch,
                f"the term {term.name!r} of {name} needs the batch in one piece: "
                f"{'' if term.across_processes else 'one process, and '}train.gradient_accumulation_steps 1",
            )
