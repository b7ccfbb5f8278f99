"""Whether the numbers of an optimiser step are finite, found out before the optimiser moves."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ecl_hf.learning.batchnorm import statistics

SHOWN = 5
"""Names in a message, of many."""


class StepCheck:
    """Collects the micro-batches of a step, judges them, and knows what to say about bad ones.

    A step is judged by all processes together, with one reduction and one wait for the device; a request to stop
    travels with it, so that all processes stop after the same step.

    Args:
        task: its gradients are looked at, and its running statistics restored when a step is left out.
        reduce: sum of a tensor over all processes.
        gradients: look at the gradients; a loss scaler does so itself.
        undo: keep what is needed to leave a step out.
    """

    def __init__(
        self, task: nn.Module, reduce: Callable[[Tensor], Tensor], gradients: bool = True, undo: bool = False
    ) -> None:
        self.task = task
        self.reduce = reduce
        self.gradients = gradients
        self.undo = undo
        self.begin()

    def begin(self) -> None:
        """Forget the last step."""
        self.values: list[dict[str, Tensor]] = []
        self.keys: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.pictures: list[Tensor] = []
        self._statistics = {}
        if self.undo:
            self._statistics = {name: buffer.clone() for name, buffer in statistics(self.task).items()}

    def add(self, out: dict[str, Any], keys: tuple[Tensor, Tensor] | None, pictures: Tensor) -> None:
        """Take a micro-batch.

        Args:
            out: what the task returned for it.
            keys: of all processes, [B, K, P], and their labels, [B].
            pictures: positions of this process's pictures in the data set, [B].
        """
        self.values.append({"loss": out["loss"].detach(), **out["terms"]})
        self.pictures.append(pictures)
        if keys is not None:
            self.keys.append(keys[0])
            self.labels.append(keys[1])

    def judge(self, stop: bool = False) -> tuple[bool, bool]:
        """Whether losses and gradients are finite in all processes, and whether any of them was asked to stop."""
        losses = torch.stack([value["loss"] for value in self.values])
        good = losses.isfinite().all()
        if self.gradients:
            good = good & norm(parameter.grad for parameter in self.task.parameters()).isfinite()
        flags = torch.stack([(~good).float(), torch.full_like(losses[0], float(stop), dtype=torch.float32)])
        bad, stop = self.reduce(flags).tolist()
        return bad == 0, stop > 0

    def leave_out(self) -> None:
        """Put the running statistics back, which a batch with bad numbers has spoilt."""
        for name, buffer in statistics(self.task).items():
            buffer.copy_(self._statistics[name])

    @property
    def sums(self) -> dict[str, Tensor]:
        """Loss and terms, summed over the micro-batches."""
        return {name: torch.stack([value[name] for value in self.values]).sum() for name in self.values[0]}

    def message(self, step: int, gather: Callable[[list], list]) -> str:
        """What is not finite and the training pictures that led there, of all processes; all of them must call it.

        Args:
            step: its number.
            gather: joins the lists of all processes.
        """
        found = [text for text in gather([self._losses()]) if text] or gather([self._gradients()])
        return (
            f"step {step} was not taken: {'; '.join(found)}. Earlier checkpoints are kept; "
            "train.on_nonfinite skip leaves such steps out"
        )

    def _losses(self) -> str | None:
        for value, pictures in zip(self.values, self.pictures, strict=True):
            if not value["loss"].isfinite():
                terms = {name: term.item() for name, term in value.items() if name != "loss" and not term.isfinite()}
                named = ", ".join(f"{name} is {number}" for name, number in terms.items()) or "its terms are"
                return f"the loss is not finite ({named}) for training pictures {pictures.tolist()}"
        return None

    def _gradients(self) -> str:
        parameters = self.task.named_parameters()
        names = [name for name, value in parameters if value.grad is not None and not norm([value.grad]).isfinite()]
        pictures = torch.cat(self.pictures).tolist()
        return f"the gradient of {some(names)} is not finite, though the loss is, for training pictures {pictures}"


def norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """Euclidean norm over all, []; not finite if any value is not, or if values are beyond any use (1e19)."""
    return torch.nn.utils.get_total_norm([tensor.detach() for tensor in tensors if tensor is not None])


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} others" if len(names) > SHOWN else "")


def check_weights(task: nn.Module) -> None:
    """Raise a FloatingPointError with the names of parameters or running statistics that are not finite."""
    tensors = dict(task.named_parameters()) | {n: b for n, b in statistics(task).items() if b.is_floating_point()}
    if not norm(tensors.values()).isfinite():
        names = [name for name, value in tensors.items() if not norm([value]).isfinite()]
        raise FloatingPointError(f"the weights are not finite and were not saved: {some(names)}")


def check_saved(file: Path, task: nn.Module) -> None:
    """See that saved weights are of the task's types, which loading would silently change; ValueError names one."""
    expected = {name: tensor.dtype for name, tensor in task.state_dict().items()}
    with safe_open(file, "pt") as saved:
        for name in expected.keys() & set(saved.keys()):
            tensor = saved.get_tensor(name)
            if tensor.dtype != expected[name]:
                raise ValueError(f"{file.name} holds {name} as {tensor.dtype}, not {expected[name]}")
