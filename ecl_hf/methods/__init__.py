"""What to train, by name in `METHODS`; one file per paper, and `base.py` with what methods are put together from.

Every file of this folder that has a dictionary `METHODS` counts; `README.md` has a row for each of its entries.
"""

from importlib import import_module
from pkgutil import iter_modules

from ecl_hf.methods.base import Loss, Method, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings

METHODS: dict[str, Method] = {}
PAPERS: dict[str, str] = {}
"""What each method is, with its paper: the first sentence of its file, or what the file's own `PAPERS` says."""
for _file in iter_modules(__path__):
    _module = import_module(f"{__name__}.{_file.name}")
    _found = getattr(_module, "METHODS", {})
    METHODS |= _found
    PAPERS |= dict.fromkeys(_found, (_module.__doc__ or "").partition("\n")[0].partition(". ")[0].rstrip("."))
    PAPERS |= getattr(_module, "PAPERS", {})

__all__ = ["METHODS", "PAPERS", "Loss", "Method", "Settings", "Stage", "TaskOutputs", "Term"]
