"""BalPoE: a balanced product of experts that take different shares of the prior, with mixup (Aimar et al., CVPR 2023).

Read: emasa/BalPoE-CalibratedLT@ca607ae model/loss.py 8-62, utils/combiner.py 37-100, utils/util.py 325-350, README,
configs/mixup. Expert k learns by cross-entropy of `z_k + tau_k log pi`; the loss is the mean over the experts. The mean
logits suit a uniform test set iff the mean of the strengths is 1: so with (0, 1, 2) on CIFAR and (-1, 1, 3) on
iNaturalist, but not with (0, 1.25, 2.5) on ImageNet-LT. The paper writes `1 - tau_k`, with mean 0.

Readings: other numbers of experts have strengths at equal distances between the same limits; a single one has the
middle.

Published, last epoch, means of 5 seeds: CIFAR-100-LT, ResNet-32, imbalance 100: 52.0 after 200 epochs, 55.9 to 56.3
after 400 with AutoAugment; CIFAR-10-LT, imbalance 100, 400 epochs: 86.8; ImageNet-LT, ResNeXt-50, 400 epochs: 62.0;
iNaturalist 2018, ResNet-50: 75.0 after 100 epochs, 76.9 after 400. Not all of them could be read at their source.
"""


def spread(least: float, most: float, num_experts: int) -> list[float]:
    """Strengths of the experts at equal distances between two limits; the middle for a single expert; [K]."""
    if num_experts == 1:
        return [(least + most) / 2]
    return [least + (most - least) * k / (num_experts - 1) for k in range(num_experts)]
