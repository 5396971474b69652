"""What commands say on stderr while they work: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import sys

import pytest

from twinflow_rt.cli import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_there_are_plain_lines(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take a file for a terminal
    with progress.counting("making 40 images", 40) as advance:
        for k in range(40):
            advance(0, "evaluation 1 of 2") if k == 20 else None
            advance(1)
    with progress.counting("loading demo", 10**6, unit="bytes") as advance:
        for _ in range(1000):
            advance(1000, "vae")
    with progress.doing("measuring demo") as tell:
        tell("cold starts")
    lines = capsys.readouterr().err.split("\n")
    assert lines[:2] == ["making 40 images", "making 40 images: 4 of 40"] and len(lines) == 16
    assert "making 40 images: evaluation 1 of 2" in lines and "making 40 images: 40 of 40" in lines
    assert lines[12:14] == ["loading demo", "measuring demo"]
    assert re.fullmatch(r"measuring demo: cold starts, \d+ s after the start", lines[14])


@pytest.mark.parametrize("unit", ["", "bytes"])
def test_on_a_terminal_the_total_is_known(monkeypatch, unit):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress.counting("making images", 8, unit=unit) as advance:
        advance(8, "evaluation 1 of 2")
    assert re.search(r"making images: evaluation 1 of 2 .*8/8", screen.getvalue()) and "\x1b[" in screen.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with progress.doing("exporting demo"):
        pass
    assert screen.getvalue() == "exporting demo\n"
