"""DisAlign, distribution alignment (Zhang et al., CVPR 2021).

After an ordinary run, encoder and classifier are frozen and a small calibration of the logits is learned: a scale and
an offset for each class, applied as much as a confidence that is computed from the image says (`heads.align_logits`).
Its loss is cross-entropy weighted by class. The confidence differs between images, so the calibration does not fold:
the head is published with it (`ECLDisAlignHead`).

Read: Megvii-BaseDetection/DisAlign@a2fc350 (classification/imagenetlt/resnext50, semantic_seg) and
Megvii-BaseDetection/cvpods@2deea5d (layers/wrappers.py, modeling/losses/grw_loss.py).

Reading: the classification code's calibration, `(1 + g s) z + g b` from s = 1, which does not start at the identity.
The paper's is the same with `s = a - 1` and starts at a = 1. The second stage has a tenth of all epochs (published: 90
and 10). As published, the BatchNorm layers of the frozen encoder go on counting; `shift_statistics` turns it off.

Published top-1 on ImageNet-LT: ResNeXt-50 53.4, ResNet-50 52.9 (paper); the released ResNeXt-50 has 52.4, and 46.9
before the second stage.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ecl_hf.checks import require
from ecl_hf.heads import ECLDisAlignHead
from ecl_hf.losses import cross_entropies
from ecl_hf.methods.base import HeadContext, Method, PerImage, Stage, TaskOutputs, Term, Trains
from ecl_hf.methods.decoupling import ONE_LINEAR, FrozenEncoderSettings, representation, shifts_statistics


def generalised_weights(class_counts: Tensor, rho: float) -> Tensor:
    """Weights of the generalised re-weighting, `w_c ~ (1 / p_c)^rho`, which sum up to C.

    Args:
        class_counts: training images of each class, [C].
        rho: 0 weighs all classes alike, 1 by the inverse frequency.

    Returns:
        [C].
    """
    weights = (class_counts / class_counts.sum()) ** -rho
    return weights * (len(weights) / weights.sum())


@dataclass(kw_only=True)
class DisAlignSettings(FrozenEncoderSettings):
    """Of DisAlign."""

    rho: float = 1.2
    """Power of the inverse class frequency that weighs a class in the second stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rho >= 0, f"loss.rho must not be negative, got {self.rho}")


def _reweighted(out: TaskOutputs, settings: DisAlignSettings) -> PerImage:
    losses = cross_entropies(out.cls_logits, out.labels).mean(0)
    return PerImage(losses, generalised_weights(out.class_counts, settings.rho))


def _calibrated(head: nn.Linear, _: HeadContext) -> ECLDisAlignHead:
    """The same classifier with a calibration to be learned."""
    calibrated = ECLDisAlignHead(head.in_features, head.out_features)
    calibrated.load_state_dict(head.state_dict(), strict=False)
    return calibrated


CALIBRATION = Trains(lambda name: ".head.logit_" in name or ".head.confidence_" in name, shifts_statistics)

METHODS = {
    "disalign": Method(
        (
            representation(0.9),
            Stage(
                (Term("supervision", _reweighted, two_labels=True),),
                "calibration",
                trains=CALIBRATION,
                heads=_calibrated,
                share=0.1,
                schedule="cosine",
            ),
        ),
        DisAlignSettings,
        **ONE_LINEAR,
    )
}
