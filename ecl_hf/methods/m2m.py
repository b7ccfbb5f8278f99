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

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.losses import full_precision

Classifier = Callable[[Tensor], Tensor]
"""Pictures in 0..1, [G, 3, H, W], to raw logits, [G, C]."""

SIDE = 32
"""Pictures of this side have the published step and noise."""


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


def starting_noise(pictures: Tensor, norm: float) -> Tensor:
    """Noise of this norm for each picture, with a uniform distribution before it is scaled; like [G, 3, H, W]."""
    noise = torch.rand_like(pictures) - 0.5
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
