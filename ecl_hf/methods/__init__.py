"""What to train, by name in `METHODS`; one file per paper, and `base.py` with what methods are put together from.

`README.md` has a row for each.
"""

from ecl_hf.methods import (
    balms,
    bcl,
    cam,
    cbd,
    ckt,
    class_balanced,
    cmo,
    decoupling,
    disalign,
    dive,
    dro_lt,
    ecl,
    focal,
    gcl,
    hybrid,
    kcl,
    lade,
    ldam,
    logit_adjustment,
    m2m,
    mislas,
    paco,
    prior_lt,
    tde,
    tde_idr,
    tsc,
    weight_balancing,
)
from ecl_hf.methods.base import Loss, Method, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings

PAPERS = (
    ecl,
    balms,
    bcl,
    cam,
    cbd,
    ckt,
    class_balanced,
    cmo,
    decoupling,
    disalign,
    dive,
    dro_lt,
    focal,
    gcl,
    hybrid,
    kcl,
    lade,
    ldam,
    logit_adjustment,
    m2m,
    mislas,
    paco,
    prior_lt,
    tde,
    tde_idr,
    tsc,
    weight_balancing,
)
METHODS: dict[str, Method] = {name: method for paper in PAPERS for name, method in paper.METHODS.items()}

__all__ = ["METHODS", "Loss", "Method", "Settings", "Stage", "TaskOutputs", "Term"]
