# ruff: noqa: T201  (printing is what is tested)
"""What scripts say, to a terminal that would obey, to readers that are gone, and to a full disk."""

import errno
import io
import os
import sys
import warnings
from importlib import import_module
from weakref import WeakSet

import pytest
from tqdm import tqdm

from ecl_hf import terminal
from ecl_hf.cli import COMMANDS
from ecl_hf.terminal import LastingStream, speaking

EVIL = "\x1b]0;own\x07\x1b[2J\x9b31m\u202eno\x08\x7fsuch"
"""Sets a window's title, clears the screen, colours in one byte, turns the direction of writing, deletes."""
COMMANDS_OF_TERMINALS = set("\x1b\x07\x08\x7f\x9b\u202e")
FLAGS = {
    "train": ["--recipe", EVIL, "--output_dir", "run"],
    "evaluate": ["--run", EVIL],
    "predict": ["--run", EVIL, EVIL],
    "weigh": ["--model", EVIL, EVIL, "--output", "out"],
    "export": ["--run", EVIL, "--output", "out"],
    "figures": ["--run", EVIL],
    "data": ["verify", EVIL],
    "reproduce": ["comparison", "--recipes", EVIL],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_script_passes_on_what_a_terminal_would_obey(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        import_module(f"ecl_hf.training.{command}").main(FLAGS[command])
    captured = capsys.readouterr()
    said = captured.out + captured.err + str(end.value.code)
    assert "such" in said
    assert not COMMANDS_OF_TERMINALS & set(said)


def test_what_is_said_is_otherwise_as_it_was(capsys):
    table = "a  b\n\tc Größe 图 é ±\n\n"
    with speaking():
        print(table, end="")
        print(table, end="", file=sys.stderr)
    assert capsys.readouterr() == (table, table)


def test_progress_bars_are_drawn_as_ever(monkeypatch):
    def bars(stream):
        monkeypatch.setattr(tqdm, "_instances", WeakSet())  # where bars stand depends on those of other tests
        look = {"file": stream, "mininterval": 0, "miniters": 1, "ncols": 40, "bar_format": "{l_bar}{bar}"}
        for _ in tqdm(range(3), "epochs", **look):
            for _ in tqdm(range(2), "steps", **look):
                tqdm.write("a line above", stream)
        return stream.getvalue()

    def lasting(stream):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            with speaking():
                return bars(sys.stderr)

    drawn = lasting(io.StringIO())
    assert "\x1b[A" in drawn
    assert drawn == bars(io.StringIO())


class Failing(io.StringIO):
    """A stream in which only the first so many writings succeed."""

    def __init__(self, number, good):
        super().__init__()
        self.number, self.good = number, good

    def write(self, text):
        self.good -= 1
        if self.good < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


def test_reader_that_has_gone_ends_nothing(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        with speaking():
            for _ in range(10_000):
                print("a line", flush=True)
        monkeypatch.undo()
    # The closing of the stream, as at the interpreter's end, has not failed either


@speaking()
def script(ends):
    print("kept")
    print("lost")
    if not ends:
        sys.exit(75)
    ends.append(True)


def test_script_ends_before_it_says_that_the_disk_was_full(monkeypatch):
    full, ends = Failing(errno.ENOSPC, good=2), [False]
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit, match=r"not all output could be written: .*No space left"):
        script(ends)
    assert ends == [False, True]
    assert full.getvalue() == "kept\n"


def test_exit_code_of_a_script_comes_first(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC, good=0))
    with pytest.raises(SystemExit) as end:
        script([])
    assert end.value.code == 75


def test_encoding_without_a_character_ends_nothing(monkeypatch):
    stored = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stored, "ascii"))
    with speaking():
        print("图 is a picture")
    assert stored.getvalue() == b"? is a picture\n"


def test_program_without_a_terminal_says_nothing():
    nowhere = LastingStream(None)
    assert nowhere.write("text") == 4
    nowhere.flush()
    nowhere.settle()
    assert nowhere.error is None


def test_a_warning_of_the_package_is_a_sentence():
    before = warnings.formatwarning
    with speaking():
        assert warnings.formatwarning("few pictures", UserWarning, terminal.__file__, 3) == "warning: few pictures\n"
        assert warnings.formatwarning("slow", UserWarning, __file__, 3) == before("slow", UserWarning, __file__, 3)
        assert "DeprecationWarning" in warnings.formatwarning("old", DeprecationWarning, terminal.__file__, 3)
    assert warnings.formatwarning is before
