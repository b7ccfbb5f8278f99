"""Encoders: any timm model, and the CIFAR ResNets of the long-tailed literature, registered with timm.

The CIFAR ResNet (He et al. 2016, Sec. 4.2) has a 3x3 stem, three stages of widths 16/32/64 and parameter-free
shortcuts (option A: subsample, then zero-pad the channels). ResNet-32 has 463,504 parameters without classifier; the
"ResNet-32" of some published tables is 16 times as large.
"""

import difflib
from collections.abc import Callable
from typing import Any, Literal

import timm
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions with an option-A shortcut."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.pad = (width - in_width) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, width, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        out += x
        return F.relu(out, inplace=True)


class CifarResNet(nn.Module):
    """ResNet for small pictures with timm's model interface; depth is 6 * blocks + 2."""

    def __init__(
        self,
        blocks: int = 5,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = 64
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": f"layer{i + 1}"} for i, width in enumerate((16, 32, 64))
        ]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.global_pool, self.fc = create_classifier(64, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_width: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = CifarBlock(in_width, width, stride)
        return nn.Sequential(first, *(CifarBlock(width, width, 1) for _ in range(blocks - 1)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training computes a block's activations anew instead of keeping them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The final linear layer, or an identity."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace pooling and classifier."""
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(64, num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 64, H / 4, W / 4]."""
        x = self.act1(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and self.training else stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 64, h, w] -> [B, 64] with `pre_logits` or without classifier, else [B, C]."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C], or [B, 64] without classifier."""
        return self.forward_head(self.forward_features(x))


default_cfgs = {
    f"resnet{depth}_cifar": {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    for depth in (20, 32, 44, 56)
}


def _register(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register with timm, once: a model repository brings its own copy of this file along."""
    return entrypoint if timm.is_model(entrypoint.__name__) else register_model(entrypoint)


@_register
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-20, 0.27 M parameters."""
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, blocks=3, **kwargs)


@_register
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-32, 0.46 M parameters: the paper's backbone for CIFAR-LT."""
    return build_model_with_cfg(CifarResNet, "resnet32_cifar", pretrained, blocks=5, **kwargs)


@_register
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-44, 0.66 M parameters."""
    return build_model_with_cfg(CifarResNet, "resnet44_cifar", pretrained, blocks=7, **kwargs)


@_register
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-56, 0.85 M parameters."""
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, blocks=9, **kwargs)


def create_encoder(architecture: str, **model_args: Any) -> nn.Module:
    """A timm model without classifier: [B, 3, H, W] -> [B, D], D = `head_hidden_size`.

    Args:
        architecture: name known to `timm.create_model`, with or without a weight tag.
        **model_args: passed on to `timm.create_model`.

    Raises:
        ValueError: timm does not know the name, or the model shares modules so that it can't be stored.
    """
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see timm.list_models()"
        raise ValueError(f"timm has no model named {architecture!r}{hint}")
    encoder = timm.create_model(architecture, num_classes=0, **model_args)
    if len(list(encoder.parameters())) != len(list(encoder.named_parameters(remove_duplicate=False))):
        raise ValueError(f"{architecture} uses one module in two places; safetensors can't store it. Use another name")
    return encoder


def stage_names(encoder: nn.Module) -> list[str]:
    """Names of an encoder's stages in their order: the places of timm's `feature_info` but stems and single layers."""
    info = getattr(encoder, "feature_info", [])
    names = [stage["module"] for stage in (info.get_dicts() if hasattr(info, "get_dicts") else info)]
    known = {name: module for name, module in encoder.named_modules() if name and "stem" not in name}
    return [n for n in names if n in known and any(True for c in known[n].children() for _ in c.parameters())]


def cut_encoder(encoder: nn.Module, stages: int, keep: Literal["first", "rest"]) -> nn.Module:
    """Leave an encoder its stem and first stages, or what comes after them.

    Empty sequences take the other places: they pass on what they get, and timm can go through their blocks. The names
    of what is left stay, so that the two parts' state dicts together are the whole encoder's.

    Args:
        encoder: whose modules run in the order of their definition, each once; it is changed.
        stages: how many.
        keep: which part.

    Raises:
        ValueError: the encoder has not more stages than that.
    """
    names = stage_names(encoder)
    if not 0 < stages < len(names):
        architecture = encoder.pretrained_cfg["architecture"]
        can = (
            f"of {architecture}'s {len(names)} stages at most {len(names) - 1} can be shared"
            if names
            else f"{architecture} has none; ResNets, ConvNeXt and Swin do, for instance"
        )
        raise ValueError(f"share_stages is {stages}: {can}")
    parent = encoder
    for part in names[stages - 1].split("."):
        children = [name for name, _ in parent.named_children()]
        place = children.index(part)
        for name in children[:place] if keep == "rest" else children[place + 1 :]:
            parent.add_module(name, nn.Sequential())
        last, parent = parent, parent.get_submodule(part)
    if keep == "rest":
        last.add_module(part, nn.Sequential())
    return encoder
