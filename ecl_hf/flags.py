"""The parser of the scripts' flags."""

import sys
from typing import Any, TextIO

from jsonargparse import ArgumentParser


class FlagParser(ArgumentParser):
    """jsonargparse's parser, whose message about a wrong flag is not led by sixty lines of all flags.

    Args:
        prog: name of the script; `ecl-hf COMMAND` where that started it.
        kwargs: of jsonargparse's parser.
    """

    def __init__(self, *, prog: str | None = None, **kwargs: Any) -> None:
        started = sys.argv[0]
        super().__init__(prog=started if prog and started.startswith("ecl-hf ") else prog, **kwargs)

    def print_usage(self, file: TextIO | None = None) -> None:
        """One line; `--help` shows all flags."""
        print(f"usage: {self.prog.replace(' [options]', '')} [flags]", file=file)
