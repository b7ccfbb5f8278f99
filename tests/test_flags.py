"""What a wrong flag is answered with."""

import importlib

import pytest

from tests.test_architecture import SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("started", [None, "ecl-hf"])
def test_wrong_flag_is_answered_in_a_few_lines(script, started, capsys, monkeypatch):
    name = f"{script}.py" if started is None else f"{started} {script}"
    monkeypatch.setattr("sys.argv", [name])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(script).main(["--nonsense=1"])
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"usage: {name} [flags]"
    assert len(said) <= 4
    assert any("error: " in line for line in said)
