"""M2m: major-to-minor translation (Kim, Jeong, Shin, CVPR 2020).

After 80 % of the epochs batches are class-balanced, and most pictures of rare classes in them are made anew: a picture
of a frequent class is changed, by the gradient of a finished classifier, until that takes it for the rare class, while
the network in training has to forget the class it came from.

Read: alinlab/M2m@42d08a5 train.py, config.py, utils.py, data_loader.py, run.sh. Code and paper differ: seeds come from
the same batch, not from the whole set; this is the code's form. Departures: the largest class is found, where the code
takes class 0; the starting noise has its norm for each picture, where the code bounds each channel over the whole
batch; other sizes than 32 pixels scale step and noise with the side of the picture, which nobody published.

Published top-1 (ResNet-32, 200 epochs, crop and flip; epoch by 10 % of the test pictures, accuracy of the rest): with
cross-entropy CIFAR-100-LT at imbalance 10/100 58.2/42.9, CIFAR-10-LT 87.9/78.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.checks import require
from ecl_hf.data.samplers import class_balanced, deferred
from ecl_hf.losses import full_precision
from ecl_hf.methods.base import Experts, Method, MixingContext, Stage
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import CROSS_ENTROPY
from ecl_hf.modeling_ecl import ECLForImageClassification

Classifier = Callable[[Tensor], Tensor]
"""Pictures in 0..1, [G, 3, H, W], to raw logits, [G, C]."""

SIDE = 32
"""Pictures of this side have the published step and noise."""

START = 0.8
"""Share of the training after which batches are class-balanced and pictures are made: epoch 160 of 200."""


@dataclass(kw_only=True)
class M2mSettings(Settings):
    """Of major-to-minor translation; the paper chose beta, seed_weight and confidence by validation."""

    beta: float = 0.999
    """Base of the chance that a seed is accepted, `1 - beta^(n_seed - n_target)`: of 0.9, 0.99, 0.999."""
    seed_weight: float = 0.5
    """Weight of the seed's logit of the network in training: of 0.01, 0.1, 0.5."""
    confidence: float = 0.9
    """Probability that the teacher must give the target class: of 0.9, 0.99."""
    step: float = 0.1
    """L2 norm of a step, for pictures in 0..1 of 32 x 32 pixels."""
    iterations: int = 10
    """Steps of a translation."""
    noise: float = 0.5
    """L2 norm of the noise that a translation starts with, for pictures in 0..1 of 32 x 32 pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta <= 1, f"loss.beta must lie in 0..1, got {self.beta}")
        require(self.confidence >= 0, f"loss.confidence must not be negative, got {self.confidence}")
        for name in ("step", "iterations"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")
        for name in ("seed_weight", "noise"):
            require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")


def replacement_probabilities(class_counts: Tensor, labels: Tensor) -> Tensor:
    """Share of a class's pictures that are to be made anew, `1 - n_y / n_max`; [C], [B] -> [B]."""
    return 1 - class_counts[labels] / class_counts.max()


def seed_probabilities(class_counts: Tensor, seeds: Tensor, targets: Tensor, beta: float) -> Tensor:
    """How well a seed's class serves a target class: `1 - beta^(n_seed - n_target)`, and 0 if it is not the larger.

    Args:
        class_counts: [C].
        seeds: class indices of the pictures to choose from, [B].
        targets: class indices of the pictures to make, [G].
        beta: in 0..1; 1 accepts nothing, 0 every larger class alike.

    Returns:
        [G, B].
    """
    surplus = (class_counts[seeds] - class_counts[targets][:, None]).clamp_min(0)
    return 1 - beta**surplus


def starting_noise(pictures: Tensor, norm: float, generator: torch.Generator | None = None) -> Tensor:
    """Noise of this norm for each picture, with a uniform distribution before it is scaled; like [G, 3, H, W].

    The generator is one on the CPU.
    """
    noise = torch.rand(pictures.shape, generator=generator).to(pictures) - 0.5
    return norm * F.normalize(noise.flatten(1), dim=1).view_as(noise)


def translate(
    pictures: Tensor,
    targets: Tensor,
    seeds: Tensor,
    teacher: Classifier,
    student: Classifier,
    seed_weight: float,
    step: float,
    iterations: int,
) -> Tensor:
    """Change pictures until the teacher takes them for the target classes (Eq. 1).

    Steps of fixed length down the gradient of `CE(teacher(x), target) + seed_weight * student(x)[seed]`, in 0..1.

    Args:
        pictures: where to start, in 0..1, [G, 3, H, W].
        targets: class indices to reach, [G].
        seeds: class indices that the pictures came from, [G].
        teacher: the finished classifier.
        student: the network in training; both in evaluation mode, and without gradient to their parameters.
        seed_weight: of the student's raw logit of the seed's class.
        step: L2 norm of a picture's change.
        iterations: number of steps.

    Returns:
        Without gradient, [G, 3, H, W].
    """
    pictures = pictures.detach()
    for _ in range(iterations):
        pictures.requires_grad_()
        with torch.enable_grad():
            reached, kept = full_precision(teacher(pictures), student(pictures))
            loss = F.cross_entropy(reached, targets) + seed_weight * kept.gather(1, seeds[:, None]).mean()
        (gradient,) = torch.autograd.grad(loss, pictures)
        length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-10
        pictures = (pictures.detach() - step * gradient / length).clamp_(0, 1)
    return pictures


def is_convincing(logits: Tensor, targets: Tensor, confidence: float) -> Tensor:
    """Whether the teacher gives the target class at least this probability; [G, C], [G] -> [G], boolean."""
    (logits,) = full_precision(logits)
    return logits.softmax(1).gather(1, targets[:, None])[:, 0] >= confidence


def of_pixels(model: ECLForImageClassification) -> Classifier:
    """A model as a function of pictures in 0..1: normalised as it expects them."""
    config = model.config.pretrained_cfg

    def classify(pictures: Tensor) -> Tensor:
        mean, std = (pictures.new_tensor(config[key])[:, None, None] for key in ("mean", "std"))
        return model((pictures - mean) / std).logits

    return classify


def translate_batch(batch: dict[str, Tensor], context: MixingContext) -> dict[str, Tensor]:
    """Replace pictures of rare classes by translated ones of the batch's frequent classes; labels stay.

    Which seeds are accepted is drawn before they are translated, so that no translation is thrown away for it.
    """
    if context.time.progress < START:
        return batch
    settings, task = context.settings, context.task
    pixels, labels = batch["pixel_values"], batch["labels"]
    counts = context.class_counts.clamp_min(1).to(pixels)

    def happens(probabilities: Tensor) -> Tensor:
        return torch.rand(probabilities.shape, generator=context.generator).to(probabilities) < probabilities

    positions = happens(replacement_probabilities(counts, labels)).nonzero()[:, 0]
    chances = seed_probabilities(counts, labels, labels[positions], settings.beta)
    positions, chances = positions[chances.any(1)], chances[chances.any(1)]
    if len(positions):
        drawn = torch.multinomial(chances.cpu(), 1, generator=context.generator).to(labels.device)
        accepted = happens(chances.gather(1, drawn)[:, 0])
        positions, drawn = positions[accepted], drawn[accepted, 0]
    if not len(positions):
        return batch
    mean, std = (pixels.new_tensor(task.model.config.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    size = (pixels.shape[-2] * pixels.shape[-1]) ** 0.5 / SIDE
    pictures = pixels[drawn] * std + mean
    pictures = (pictures + starting_noise(pictures, settings.noise * size, context.generator)).clamp(0, 1)
    teacher, student = of_pixels(task.teacher), of_pixels(task.model)
    classes, steps = (labels[positions], labels[drawn]), (settings.seed_weight, settings.step * size)
    task.eval()
    pictures = translate(pictures, *classes, teacher, student, *steps, settings.iterations)
    with torch.no_grad():
        convincing = is_convincing(teacher(pictures), classes[0], settings.confidence)
    task.train()
    replaced = pixels.clone()
    replaced[positions[convincing]] = ((pictures - mean) / std)[convincing]
    return batch | {"pixel_values": replaced}


METHODS = {
    "m2m": Method(
        (Stage((CROSS_ENTROPY,), sampler=deferred(class_balanced(), START), mixing=translate_batch),),
        M2mSettings,
        experts=Experts(1, most=1),
        teacher="ce",
    )
}
