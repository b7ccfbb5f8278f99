"""How a card is filled: what strangers named or wrote is text on the page, and does nothing there."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ecl_hf.names import fenced, in_code, in_markdown


def fill(template: Path, **values: Any) -> str:
    """A template of `hub_cards/` with values.

    What an expression gives stands there as plain text of one line (`in_markdown`), unless the template says what else
    it is: `| code` within a code span or a program, `| fenced("yaml")` a block of code, `| safe` Markdown that is to
    be so.

    Raises:
        UndefinedError: a value is asked for part of what it has not.
    """
    environment = jinja2.Environment(finalize=_as_text)
    environment.filters |= {"code": lambda value: Markup(in_code(str(value))), "fenced": lambda *a: Markup(fenced(*a))}
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def _as_text(value: Any) -> Any:
    return value if isinstance(value, Markup | int | float) else in_markdown(str(value))
