"""Memory of a training step: activations computed twice rather than kept, and pages that stay with the process.

Both ways to keep fewer activations give the gradients of the plain step with every method: nothing is detached, and the
losses know nothing of them.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ecl_hf.learning.batchnorm import statistics
from ecl_hf.modeling_ecl import ECLForImageClassification

try:
    import resource
except ImportError:  # not on Windows
    resource = None


def checkpoint_blocks(model: ECLForImageClassification) -> None:
    """Keep only what enters the blocks of the encoders (timm's gradient checkpointing).

    Raises:
        ValueError: timm has none for this architecture.
    """
    try:
        for part in (*model.experts, *filter(None, [model.trunk])):
            part.backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        name = model.config.architecture
        raise ValueError(
            f"train.gradient_checkpointing: timm has none for {name}; train.experts_one_by_one works with every one"
        ) from error


def checkpoint_experts(model: ECLForImageClassification) -> None:
    """Keep nothing of an expert's forward but features and logits.

    The losses, which need those of all experts, are computed as ever. Backward then repeats the forward of one expert,
    goes through it, forgets its activations, and turns to the next.
    """
    for expert in model.experts:
        expert.forward = partial(checkpoint, expert.forward, use_reentrant=False)


@contextmanager
def counted_once(module: nn.Module) -> Iterator[None]:
    """Restore the running statistics at the end: a repeated forward would count its batch for the second time."""
    tensors = list(statistics(module).values())
    before = [tensor.clone() for tensor in tensors]
    yield
    with torch.no_grad():
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)


def keep_freed_memory() -> None:
    """Let this process keep the memory of a step for the next one, where the C library can.

    A step on a CPU frees hundreds of megabytes, which glibc gives back to the system and then fetches page by page: 5 %
    of the time of a step.
    """
    trim_threshold, mmap_max = -1, -4  # glibc's names for its options
    with suppress(AttributeError, OSError, TypeError):  # of another C library
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, -1)  # never
        library.mallopt(mmap_max, 0)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on a GPU what PyTorch allocated there, else resident memory.

    0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
