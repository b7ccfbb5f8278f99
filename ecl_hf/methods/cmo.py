"""CMO: context-rich minority oversampling (Park et al., CVPR 2022).

A box of a picture from a class-balanced second stream is pasted on a picture of the usual stream: rare objects in the
rich surroundings of frequent ones. The loss is shared between both labels by area.

Read: naver-ai/cmo@10d2d09 cifar_train.py, imagenet_train.py, imbalance_cifar.py, opts.py. As there, half of the batches
are mixed, and none in the first and last few epochs. CMO with RIDE is not in that repository; reading: RIDE's own
settings without its distillation and routing. Left out: a deferred switch that never comes on iNaturalist 2018, since
its epoch is that of CIFAR.

Published top-1, best test epoch: with RIDE of 3 experts (ECL prints 4) CIFAR-100-LT at imbalance 10/50/100
60.2/53.0/50.0, ImageNet-LT 56.2, iNaturalist 2018 72.8; with balanced softmax ImageNet-LT 52.3 (ResNet-50, 100 epochs),
58.0 (400 epochs), iNaturalist 2018 74.0 (400 epochs).
"""

import math


def pasted_box(height: int, width: int, share: float, row: int, column: int) -> tuple[slice, slice]:
    """The box that is pasted: of the picture's shape, `1 - share` of its area, cut off at the picture's border.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        share: of the area that the background is to keep, 0..1.
        row: of the box's centre, 0..height-1.
        column: of the box's centre, 0..width-1.

    Returns:
        Rows and columns.
    """

    def side(length: int, centre: int) -> slice:
        half = int(length * math.sqrt(1 - share)) // 2
        return slice(max(0, centre - half), min(length, centre + half))

    return side(height, row), side(width, column)


def background_share(height: int, width: int, box: tuple[slice, slice]) -> float:
    """Share of the area outside a box, which is the weight of the background's label."""
    rows, columns = box
    return 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
