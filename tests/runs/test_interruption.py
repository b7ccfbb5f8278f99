"""Signals that come where no step can be finished first."""

import signal

import pytest

from ecl_hf.runs.interruption import STOPPED, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_stops_at_once_says_how_to_go_on(number, capsys):
    with pytest.raises(SystemExit) as stopped, StopRequest():
        signal.raise_signal(number)
    assert stopped.value.code == STOPPED
    assert "--resume goes on from the last checkpoint" in capsys.readouterr().err
