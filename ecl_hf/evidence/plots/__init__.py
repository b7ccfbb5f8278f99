"""The paper's figures from arrays, each its own function `plot_*(...) -> Figure`; several runs by name, in one style.

Classes are drawn from the largest to the smallest training class. Nothing else in `ecl_hf` imports this package, which
needs matplotlib (`pip install 'ecl-hf[figures]'`).
"""

from ecl_hf.evidence.plots.classes import (
    plot_class_accuracy,
    plot_class_histogram,
    plot_confusion,
    plot_feature_distance,
    plot_transfer,
    plot_tsne,
)
from ecl_hf.evidence.plots.models import (
    plot_expert_number,
    plot_landscape,
    plot_loss_weights,
    plot_methods,
    plot_posthoc,
    plot_reliability,
    plot_shifted,
    plot_training,
)

__all__ = [
    "plot_class_accuracy",
    "plot_class_histogram",
    "plot_confusion",
    "plot_expert_number",
    "plot_feature_distance",
    "plot_landscape",
    "plot_loss_weights",
    "plot_methods",
    "plot_posthoc",
    "plot_reliability",
    "plot_shifted",
    "plot_training",
    "plot_transfer",
    "plot_tsne",
]
