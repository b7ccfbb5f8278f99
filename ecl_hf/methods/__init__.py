"""What to train, by name in `METHODS`; one file per paper, and `base.py` with what methods are put together from.

`README.md` has a row for each.
"""

from ecl_hf.methods import ecl
from ecl_hf.methods.base import Loss, Method, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings

METHODS: dict[str, Method] = {**ecl.METHODS}

__all__ = ["METHODS", "Loss", "Method", "Settings", "Stage", "TaskOutputs", "Term"]
