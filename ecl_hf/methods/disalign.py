"""DisAlign, distribution alignment (Zhang et al., CVPR 2021).

After an ordinary run, encoder and classifier are frozen and a small calibration of the logits is learned: a scale and
an offset for each class, applied as much as a confidence that is computed from the image says (`heads.align_logits`).
Its loss is cross-entropy weighted by class. The confidence differs between images, so the calibration does not fold:
the head is published with it (`ECLDisAlignHead`).

Read: Megvii-BaseDetection/DisAlign@a2fc350 (classification/imagenetlt/resnext50, semantic_seg) and
Megvii-BaseDetection/cvpods@2deea5d (layers/wrappers.py, modeling/losses/grw_loss.py).

Reading: the classification code's calibration, `(1 + g s) z + g b` from s = 1, which does not start at the identity.
The paper's is the same with `s = a - 1` and starts at a = 1.
"""

from torch import Tensor


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
