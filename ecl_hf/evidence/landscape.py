"""Loss and accuracy around a trained model's weights (Fig. 8), after Li et al., NeurIPS 2018."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


def filter_normalised_direction(parameters: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A Gaussian direction whose every filter has the norm of the weights' filter.

    A filter is a slice along the first axis of a tensor with two axes at least. One-axis tensors (biases, the affine
    part of normalisation layers) are not perturbed, as in the published tool.

    Args:
        parameters: by name.
        seed: of the direction; drawn on the CPU, so that it is the same on every device.

    Returns:
        Tensors of the same names and shapes.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, weight in parameters.items():
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        if weight.ndim < 2:
            direction[name] = torch.zeros_like(weight)
            continue
        norm, target = (tensor.flatten(1).norm(dim=1) for tensor in (noise, weight))
        scale = target / norm.clamp_min(torch.finfo(weight.dtype).tiny)
        direction[name] = noise * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return direction


@torch.no_grad()
def landscape(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], magnitudes: Sequence[float], seeds: Sequence[int]
) -> dict[str, Tensor]:
    """Cross-entropy and accuracy of the ensemble at `weights + magnitude * direction`.

    The model's weights are never touched: perturbed copies are passed to its forward. BatchNorm keeps its trained
    running statistics (evaluation mode), as in the published tool.

    Args:
        model: returns `logits`, [B, C]; its mode is restored afterwards.
        batches: dictionaries with `pixel_values` and `labels`, on the model's device; read once for each point.
        magnitudes: M multiples of the direction; 0 is the model itself.
        seeds: one for each of S directions.

    Returns:
        `loss` and `accuracy`, [S, M], float64.
    """
    was_training = model.training
    model.eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    loss = torch.zeros(len(seeds), len(magnitudes), dtype=torch.float64)
    hits, images = torch.zeros_like(loss), torch.zeros_like(loss)
    for s, seed in enumerate(seeds):
        direction = filter_normalised_direction(parameters, seed)
        for m, magnitude in enumerate(magnitudes):
            moved = {name: weight + magnitude * direction[name] for name, weight in parameters.items()}
            for batch in batches:
                logits = functional_call(model, moved, (batch["pixel_values"],)).logits.double()
                loss[s, m] += F.cross_entropy(logits, batch["labels"], reduction="sum").item()
                hits[s, m] += (logits.argmax(-1) == batch["labels"]).sum().item()
                images[s, m] += len(batch["labels"])
    model.train(was_training)
    return {"loss": loss / images, "accuracy": hits / images}
