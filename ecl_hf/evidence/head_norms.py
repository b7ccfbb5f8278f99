"""Whether weight decay has starved the rare classes: lengths of the classifier's rows against class sizes.

A row that hardly ever gets a gradient is pulled towards zero by weight decay, and a class with a short row loses every
comparison of logits, however good the features are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecl_hf.heads import ECLHead
from ecl_hf.modeling_ecl import ECLForImageClassification

STARVED = 0.5
"""Length of the rarest classes' rows over that of the largest ones' below which the tail is called starved: 0.31 where
the paper's printed recipe left few-shot classes at 8 % (`training/results/README.md`)."""


@torch.no_grad()
def head_norms(model: ECLForImageClassification) -> Tensor | None:
    """Mean length of each class's row over the experts' linear heads, [C]; None for heads that ignore lengths."""
    heads = [expert.head for expert in model.experts if isinstance(expert.head, ECLHead)]
    return torch.stack([head.weight.float().norm(dim=-1) for head in heads]).mean(0) if heads else None


def tail_to_head(norms: Tensor, class_counts: Sequence[int]) -> float:
    """Mean length of the rows of the rarest tenth of the classes over that of the largest tenth."""
    order = torch.tensor(class_counts).argsort(stable=True)
    part = max(1, len(order) // 10)
    return (norms[order[:part]].mean() / norms[order[-part:]].mean()).item()


def diagnose(model: ECLForImageClassification) -> str | None:
    """A sentence about a starved tail and what helps; None where there is nothing to say.

    Classes of equal size have no tail.
    """
    norms, counts = head_norms(model), model.config.class_counts
    if norms is None or counts is None or min(counts) == max(counts):
        return None
    ratio = tail_to_head(norms, counts)
    if ratio >= STARVED:
        return None
    return (
        f"the classifier's rows of the rarest classes are {ratio:.2f} times as long as those of the largest: weight "
        "decay has starved the tail. What helps: --method tau_norm or crt, or less decay (--optim.no_decay [head])"
    )
