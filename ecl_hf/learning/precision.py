"""Whether a CPU computes in bfloat16 what it does in float32, and faster: many don't have it and only imitate it."""

import copy
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

LOSS_TOLERANCE = 0.05
"""Relative error of the loss; bfloat16 has 8 significant bits, 0.4 %."""

LEAST_COSINE = 0.3
"""Of the gradients in both precisions, all parameters as one vector: where it is lower, rounding makes more noise than
the choice of a batch does."""


def bfloat16_fault(task: nn.Module, batch: dict[str, Tensor], clock: Callable[[], float] = time.perf_counter) -> str:
    """What speaks against bfloat16 on this CPU; an empty string if nothing does.

    Forward and backward of a batch are run in both precisions, and where the first times are close once more, on a copy
    of the task with the same random numbers: task and random numbers are afterwards as they were.

    Args:
        task: as it is trained; returns a dictionary with `loss`.
        batch: its arguments.
        clock: seconds.
    """
    trial = copy.deepcopy(task)
    seconds = {False: math.inf, True: math.inf}
    losses, gradients = {}, {}
    for _ in range(2):
        for half in (False, True):
            started = clock()
            losses[half], gradients[half] = _loss_and_gradient(trial, batch, half)
            seconds[half] = min(seconds[half], clock() - started)
            trial.load_state_dict(task.state_dict())
        if seconds[True] > 2 * seconds[False]:
            break
    expected, found = losses[False], losses[True]
    if not math.isfinite(found) or abs(found - expected) > LOSS_TOLERANCE * abs(expected):
        return f"the loss of the first batch is {found:.4g} instead of {expected:.4g}"
    cosine = torch.cosine_similarity(gradients[False], gradients[True], dim=0).item()
    if not cosine >= LEAST_COSINE:
        return f"the gradient of the first batch points elsewhere (its cosine with that in float32 is {cosine:.2f})"
    images = len(batch["labels"])
    if seconds[True] >= seconds[False]:
        speeds = [f"{images / seconds[half]:.0f}" for half in (True, False)]
        return f"this CPU trains {speeds[0]} images/s with it, and {speeds[1]} without"
    return ""


def _loss_and_gradient(task: nn.Module, batch: dict[str, Tensor], half: bool) -> tuple[float, Tensor]:
    """Loss of a batch and its gradient as one vector, in double precision."""
    task.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = task(**batch)["loss"]
        loss.backward()
    found = [parameter.grad.flatten().double() for parameter in task.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat(found)
