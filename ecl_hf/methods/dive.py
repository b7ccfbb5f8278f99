"""DiVE: distilling the virtual examples of a balanced teacher (Li, Wang, Wu, ICCV 2021).

A picture is a "virtual example" of each class to the extent that the teacher takes it for one. The teacher is a
finished `bc` run with the same encoder and recipe; its probabilities are made flatter, so that rare classes have more
such examples.

Read: zhangyongshun/BagofTricks-LT@ce7859a (lib/loss/loss_impl/kld_loss.py, lib/core/combiner.py,
configs/cao_cifar/DiVE), where the authors published the loss and the CIFAR recipe. Temperature 3 is said to be the
paper's for CIFAR-100-LT; the configurations have 2. With power 0.5 the teacher's temperature is doubled, and the
student's is not.

Published (CIFAR-LT: ResNet-32, 200 epochs, crop and flip; best epoch on the test set): CIFAR-100-LT 62.0, 51.1 and 45.4
for imbalance 10, 50 and 100; ImageNet-LT 53.1 (ResNeXt-50); iNaturalist 2018 71.7.
"""

from torch import Tensor

from ecl_hf import losses


def virtual_example_losses(student: Tensor, teacher: Tensor, temperature: float, power: float = 1.0) -> Tensor:
    """Divergence of the student from the teacher's virtual examples, `T^2 KL(normalised p_t^a || p_s)`.

    `p` are softmaxes at the temperature T. Taking the power a and normalising is a softmax of `a z / T`.

    Args:
        student: raw logits, [B, C].
        teacher: raw logits, [B, C]; carries no gradient.
        temperature: T.
        power: a, of the teacher's probabilities.

    Returns:
        [B].
    """
    return losses.soft_label_losses(student, power * teacher, temperature)
