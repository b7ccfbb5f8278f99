"""Running statistics with several processes: BatchNorm over the images of all, or each process's own kept.

BatchNorm over all images is PyTorch's on GPUs; it has none for CPUs.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.nn.functional import all_reduce


class _SharedStatistics(nn.BatchNorm2d):
    """In training, normalises [B, C, H, W] by mean and variance over all processes, which have equally many images."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values, processes = x.float(), get_world_size()
        mean = all_reduce(values.mean((0, 2, 3))) / processes
        centred = values - mean[:, None, None]
        variance = all_reduce(centred.square().mean((0, 2, 3))) / processes
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            pixels = processes * x.numel() // x.shape[1]
            factor = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, factor)
            self.running_var.lerp_(variance * (pixels / (pixels - 1)), factor)
        normalised = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            normalised = normalised * self.weight[:, None, None] + self.bias[:, None, None]
        return normalised.to(x.dtype)


class _SharedStatisticsAct(BatchNormAct2d):
    """The same with timm's activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return self.act(self.drop(_SharedStatistics.forward(self, x)))


SHARED = {nn.BatchNorm2d: _SharedStatistics, BatchNormAct2d: _SharedStatisticsAct}


def synchronise_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm of a module, its key encoders' too, see the images of all processes; names stay as they are.

    Raises:
        ValueError: the module has no BatchNorm, or on CPUs one that is not over [B, C, H, W].
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        raise ValueError("train.sync_batchnorm: the architecture has no BatchNorm")
    if device.type == "cuda":
        return convert_sync_batchnorm(module)
    for layer in layers:
        if type(layer) in SHARED.values():
            continue
        if type(layer) not in SHARED:
            raise ValueError(f"train.sync_batchnorm has no {type(layer).__name__} for {device.type}")
        layer.__class__ = SHARED[type(layer)]
    return module


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Running statistics of normalisation layers by name: the state that differs between processes."""
    buffers = module.named_buffers()
    return {name: buffer for name, buffer in buffers if name.rpartition(".")[2].startswith(("running_", "num_batches"))}


def save_statistics(module: nn.Module, folder: Path, process: int) -> None:
    """Keep a process's running statistics beside the weights, which hold those of the main process."""
    if tensors := statistics(module):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _statistics_file(process))


def load_statistics(module: nn.Module, folder: Path, process: int) -> None:
    """Restore them; a process that was not there when they were saved keeps those of the main process."""
    file = folder / _statistics_file(process)
    if file.exists():
        saved = load_file(file)
        for name, buffer in statistics(module).items():
            buffer.copy_(saved[name])


def _statistics_file(process: int) -> str:
    return f"statistics_{process}.safetensors"
