"""DiVE: distilling the virtual examples of a balanced teacher (He, Wu, Wei, ICCV 2021).

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

from dataclasses import dataclass, replace

from torch import Tensor

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.methods.base import Experts, HeadKind, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import BALANCED_CROSS_ENTROPY


@dataclass(kw_only=True)
class DiVESettings(Settings):
    """Of the distillation of virtual examples."""

    alpha: float = 0.5
    """Share of the distillation in the loss; the rest is the balanced cross-entropy's."""
    temperature: float = 3.0
    """Temperature of teacher and student: the higher, the flatter the virtual examples lie over the classes."""
    power: float = 0.5
    """Power of the teacher's probabilities; below 1 it makes them flatter, without a change of the student's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, f"loss.alpha must lie in 0..1, got {self.alpha}")
        for name in ("temperature", "power"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")


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


def _virtual_examples(out: TaskOutputs, settings: DiVESettings) -> PerImage:
    teacher = out.teacher.logits.mean(0)
    return PerImage(virtual_example_losses(out.cls_logits[0], teacher, settings.temperature, settings.power))


def _rest(_: TaskOutputs, settings: DiVESettings) -> float:
    return 1 - settings.alpha


SUPERVISION = replace(BALANCED_CROSS_ENTROPY, weight=_rest)
VIRTUAL_EXAMPLES = Term("virtual_examples", _virtual_examples, "alpha", frozenset({"teacher"}))

METHODS = {
    "dive": Method(
        (Stage((SUPERVISION, VIRTUAL_EXAMPLES)),),
        DiVESettings,
        head=HeadKind("linear"),
        experts=Experts(1, most=1),
        teacher="bc",
    )
}
