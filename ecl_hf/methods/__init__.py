"""What to train: each method is a tuple of loss terms, by its name in `METHODS`; one file per paper.

`base.py` says what a term and a method are, `settings.py` has the recipe's section `loss`.
"""

from ecl_hf.methods.base import Loss, Method, TaskOutputs, Term
from ecl_hf.methods.ecl import METHODS

__all__ = ["METHODS", "Loss", "Method", "TaskOutputs", "Term"]
