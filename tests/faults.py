"""What can happen to a training, as patches that a child process applies to itself."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def _before(owner: type, name: str, call: int, action: Callable[..., None], after: bool = False) -> None:
    """Do something before (or after) the n-th call of a method, counted from 1."""
    original, calls = getattr(owner, name), []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call and not after:
            action(*args)
        result = original(*args, **kwargs)
        if len(calls) == call and after:
            action(*args)
        return result

    setattr(owner, name, wrapper)


def _send(number: int) -> Callable[..., None]:
    return lambda *_: os.kill(os.getpid(), number)


def kill_in_step(step: int) -> None:
    """SIGKILL between the optimiser's move and that of the momentum encoders."""
    from ecl_hf.learning.task import CollaborativeTask

    _before(CollaborativeTask, "follow", step, _send(signal.SIGKILL))


def kill_in_write(checkpoint: int) -> None:
    """SIGKILL when the weights of a checkpoint are written, but not yet the rest."""
    import accelerate.accelerator
    import accelerate.checkpointing

    original, calls = accelerate.checkpointing.save, []

    def save(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2 * checkpoint - 1:  # weights and optimizer
            os.kill(os.getpid(), signal.SIGKILL)

    accelerate.checkpointing.save = save


def kill_in_seal(checkpoint: int) -> None:
    """SIGKILL when all of a checkpoint is written, but it has not got its name."""
    import ecl_hf.runs.checkpoints

    _before(ecl_hf.runs.checkpoints, "discard", checkpoint, _send(signal.SIGKILL))


def kill_between_epochs(checkpoint: int) -> None:
    """SIGKILL just after a checkpoint is published."""
    from ecl_hf.runs.folder import RunFolder

    _before(RunFolder, "publish_checkpoint", checkpoint, _send(signal.SIGKILL), after=True)


def kill_between_stages(call: int) -> None:
    """SIGKILL when a stage has been built, before its first step: 1 for the first stage, 2 for the one after it."""
    from ecl_hf.session import Session

    _before(Session, "_prepare", call, _send(signal.SIGKILL), after=True)


def kill_in_finish() -> None:
    """SIGKILL when the method's last steps have rewritten the heads, but the model is not written."""
    from train import Training

    _before(Training, "finish", 1, _send(signal.SIGKILL), after=True)


def kill_in_log(epoch: int) -> None:
    """SIGKILL between the line of an epoch and its checkpoint."""
    from ecl_hf.runs.folder import RunFolder

    _before(RunFolder, "log", epoch, _send(signal.SIGKILL), after=True)


def ask_to_stop(step: int, number: int = signal.SIGTERM) -> None:
    """SIGTERM to the process and, as batch systems do, to its loading processes."""
    from ecl_hf.learning.task import CollaborativeTask

    def tell_all(*_: object) -> None:
        for child in torch.multiprocessing.active_children():
            os.kill(child.pid, number)
        os.kill(os.getpid(), number)

    _before(CollaborativeTask, "forward", step, tell_all)


def kill_loading_process(step: int) -> None:
    """SIGKILL to a loading process, as the kernel does when the memory is full."""
    from ecl_hf.learning.task import CollaborativeTask

    def kill_one(*_: object) -> None:
        os.kill(torch.multiprocessing.active_children()[0].pid, signal.SIGKILL)

    _before(CollaborativeTask, "forward", step, kill_one)


def kill_while_connecting(store: bool) -> None:
    """SIGKILL before the process looks for the others, or when it knows their store, but not them."""
    from torch.distributed import distributed_c10d

    name = "_new_process_group_helper" if store else "init_process_group"
    _before(distributed_c10d if store else torch.distributed, name, 1, _send(signal.SIGKILL))


def hang(step: int) -> None:
    """Stop answering."""
    from ecl_hf.learning.task import CollaborativeTask

    _before(CollaborativeTask, "forward", step, _send(signal.SIGSTOP))


def infinite_loss(step: int) -> None:
    """One picture of the step's batch is not a number."""
    from ecl_hf.learning.task import CollaborativeTask

    original, calls = CollaborativeTask.forward, []

    def forward(self: nn.Module, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == step:
            pixel_values[0, 0, 0, 0] = torch.nan
        return original(self, pixel_values, *args, **kwargs)

    CollaborativeTask.forward = forward


def infinite_gradient(step: int) -> None:
    """The loss of the step is finite, and its gradient is not."""
    from ecl_hf.learning.task import CollaborativeTask

    original, calls = CollaborativeTask.forward, []

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        calls.append(1)
        out = original(self, *args, **kwargs)
        if len(calls) == step:
            bias = self.model.experts[0].head.bias
            out["loss"] = out["loss"] + (bias - bias.detach()).abs().sqrt().sum()  # 0, with an infinite slope
        return out

    CollaborativeTask.forward = forward


def vanish(folder: Path, step: int) -> None:
    """The data directory is gone, and no picture was kept."""
    import ecl_hf.data.loaders
    from ecl_hf.learning.task import CollaborativeTask

    ecl_hf.data.loaders.DECODED_LIMIT = 0
    _before(CollaborativeTask, "forward", step, lambda *_: shutil.rmtree(folder))


def full_disk(checkpoint: int) -> None:
    """No space is left when a checkpoint's optimiser state is written."""
    import accelerate.checkpointing

    original, calls = accelerate.checkpointing.save, []

    def save(state: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2 * checkpoint:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        original(state, file, *args, **kwargs)

    accelerate.checkpointing.save = save


def small_files(checkpoint: int) -> None:
    """From the first checkpoint on, the system refuses to write files beyond 100 kB: a writer fails half-way."""
    import resource

    from ecl_hf.runs.folder import RunFolder

    def limit(*_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    _before(RunFolder, "publish_checkpoint", checkpoint - 1, limit, after=True)
