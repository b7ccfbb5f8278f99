"""What to train, by name in `METHODS`; one file per paper, and `base.py` with what methods are put together from.

`README.md` has a row for each.
"""

from ecl_hf.methods import (
    balms,
    ckt,
    class_balanced,
    decoupling,
    disalign,
    dro_lt,
    ecl,
    focal,
    gcl,
    lade,
    ldam,
    logit_adjustment,
    mislas,
    prior_lt,
    tde,
    tde_idr,
    weight_balancing,
)
from ecl_hf.methods.base import Loss, Method, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings

PAPERS = (
    ecl,
    balms,
    ckt,
    class_balanced,
    decoupling,
    disalign,
    dro_lt,
    focal,
    gcl,
    lade,
    ldam,
    logit_adjustment,
    mislas,
    prior_lt,
    tde,
    tde_idr,
    weight_balancing,
)
METHODS: dict[str, Method] = {name: method for paper in PAPERS for name, method in paper.METHODS.items()}

__all__ = ["METHODS", "Loss", "Method", "Settings", "Stage", "TaskOutputs", "Term"]
