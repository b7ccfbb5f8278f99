"""LoRA (Hu et al., ICLR 2022): low-rank additions to layers of frozen encoders, which merge into them at the end."""

from typing import Any

import torch
from torch import Tensor, nn

from ecl_hf.modeling_ecl import ECLForImageClassification


class LowRank(nn.Module):
    """What is added to a layer, `B A x`; zero at the start, since B is.

    Args:
        layer: linear, or a dense convolution: A is one of its kind then, and B one of 1x1.
        rank: of the addition.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        kind: dict[str, Any] = {"bias": False, "device": layer.weight.device, "dtype": layer.weight.dtype}
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, **kind)
            self.up = nn.Linear(rank, layer.out_features, **kind)
        else:
            shape = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **shape, **kind)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, **kind)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The addition to the layer's output."""
        return self.up(self.down(x))

    def product(self) -> Tensor:
        """B A, the addition to the layer's weight, of its number of entries."""
        return self.up.weight.flatten(1).double() @ self.down.weight.flatten(1).double()


class LowRankLinear(nn.Linear):
    """Linear layer with a low-rank addition."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer whose weight is W + B A."""
        return super().forward(x) + self.low_rank(x)


class LowRankConv2d(nn.Conv2d):
    """Convolution with a low-rank addition."""

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution whose weight is W + B A."""
        return super().forward(x) + self.low_rank(x)


# A layer changes its class and back again: its weights keep their names, and timm finds in it what it expects.
ADDED = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}
PLAIN = {added: plain for plain, added in ADDED.items()}


@torch.no_grad()
def find_layers(model: ECLForImageClassification) -> list[nn.Linear | nn.Conv2d]:
    """Layers of the encoders that can take an addition, in the order in which they run.

    Those are linear layers and dense convolutions that are called as such (some of timm's code only takes their
    weights), but for the one that sees the picture. Depthwise convolutions have few weights, and stay.

    Raises:
        ValueError: there is none.
    """
    image = torch.zeros(1, *model.config.pretrained_cfg["input_size"], device=model.device, dtype=model.dtype)
    found: dict[nn.Module, None] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if inputs[0].shape != image.shape:
            found[layer] = None

    parts = [part.backbone for part in (*model.experts, *filter(None, [model.trunk]))]
    layers = [layer for part in parts for layer in part.modules() if type(layer) in ADDED]
    hooks = [layer.register_forward_hook(note) for layer in layers if getattr(layer, "groups", 1) == 1]
    training = model.training
    model.eval()(image)
    model.train(training)
    for hook in hooks:
        hook.remove()
    if not found:
        raise ValueError(
            f"model.tune lora: {model.config.architecture} has no linear layer or dense convolution behind its first; "
            "take norm_bias"
        )
    return list(found)


def add_low_rank(layers: list[nn.Linear | nn.Conv2d], rank: int) -> None:
    """Give layers a low-rank addition each, as far as their sizes allow the rank."""
    for layer in layers:
        layer.low_rank = LowRank(layer, min(rank, len(layer.weight), layer.weight[0].numel()))
        layer.__class__ = ADDED[type(layer)]


@torch.no_grad()
def merge_low_rank(model: nn.Module) -> None:
    """Put all low-rank additions into the weights; the layers are plain ones again, which compute the same."""
    for layer in [module for module in model.modules() if type(module) in PLAIN]:
        total = layer.weight.double() + layer.low_rank.product().view_as(layer.weight)
        layer.weight.copy_(total)
        del layer.low_rank
        layer.__class__ = PLAIN[type(layer)]
