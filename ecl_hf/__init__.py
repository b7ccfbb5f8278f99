"""Effective Collaborative Learning for long-tailed image recognition, on timm and Hugging Face."""

import importlib
import pkgutil
from types import ModuleType

from transformers import AutoConfig, AutoModelForImageClassification

from ecl_hf.configuration_ecl import ECLConfig
from ecl_hf.heads import log_prior_shift
from ecl_hf.modeling_ecl import ECLForImageClassification

__version__ = "0.2.0"
__all__ = ["ECLConfig", "ECLForImageClassification", "log_prior_shift"]

AutoConfig.register(ECLConfig.model_type, ECLConfig, exist_ok=True)
AutoModelForImageClassification.register(ECLConfig, ECLForImageClassification, exist_ok=True)
ECLConfig.register_for_auto_class()
ECLForImageClassification.register_for_auto_class("AutoModelForImageClassification")

_SUBMODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__)) | {"training"}


def __getattr__(name: str) -> ModuleType:
    """Import a submodule at its first use, so that inference does not pay for training."""
    if name in _SUBMODULES:
        return importlib.import_module(f"ecl_hf.{name}")
    raise AttributeError(f"module 'ecl_hf' has no attribute {name!r}")
