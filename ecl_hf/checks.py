"""Checks that the sections of a recipe share; a ValueError names the key."""

import math
from dataclasses import fields
from typing import Any


def check_values(section: Any, prefix: str) -> None:
    """Refuse an empty value where one is needed, and numbers that are not finite."""
    for item in fields(section):
        value = getattr(section, item.name)
        require(value is not None or "None" in str(item.type), f"{prefix}{item.name} has no value")
        require(
            not isinstance(value, float) or math.isfinite(value), f"{prefix}{item.name} must be finite, got {value}"
        )


def require(holds: bool, message: str) -> None:
    """Raise a ValueError with this message unless something holds."""
    if not holds:
        raise ValueError(message)
