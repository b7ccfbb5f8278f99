"""What to train, by name in `METHODS`; one file per paper, and `base.py` with what methods are put together from.

Every file of this folder that has a dictionary `METHODS` counts; `README.md` has a row for each of its entries.
"""

from importlib import import_module
from pkgutil import iter_modules

from ecl_hf.methods.base import Loss, Method, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings

METHODS: dict[str, Method] = {}
for _file in iter_modules(__path__):
    METHODS |= getattr(import_module(f"{__name__}.{_file.name}"), "METHODS", {})

__all__ = ["METHODS", "Loss", "Method", "Settings", "Stage", "TaskOutputs", "Term"]
