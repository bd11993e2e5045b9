"""Progress: what goes where on a terminal, in a pipe and in a notebook."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from rich.console import Console

from flowdistill.report.progress import Bars


def walk(bars: Bars) -> None:
    bars.say("before")
    bars.begin("kd resnet8", 6)
    for epoch in (1, 2):
        for _ in range(3):
            bars.step()
        print("mine")
        bars.epoch(f"epoch {epoch}/2, best {epoch}0.00 %")
    bars.end()


def test_in_a_pipe_a_line_an_epoch_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    walk(Bars())
    said = capsys.readouterr()
    assert said.out == "mine\nmine\n"
    assert said.err == "before\nkd resnet8: epoch 1/2, best 10.00 %\nkd resnet8: epoch 2/2, best 20.00 %\n"


def test_a_bar_on_a_terminal_leaves_stdout_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    walk(Bars())
    said = capsys.readouterr()
    assert said.out == "mine\nmine\n", "what the caller prints is not put beside the bar"
    assert "epoch 2/2, best 20.00 %" in said.err


def test_in_a_notebook_one_line_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[str]] = []

    class Handle:
        def __init__(self, line: str) -> None:
            self.lines = [line]
            shown.append(self.lines)

        def update(self, data: dict[str, str], *, raw: bool) -> None:
            assert raw
            self.lines.append(data["text/plain"])

    def display(data: Any, *, raw: bool = False, display_id: bool = False) -> Any:
        assert raw
        assert display_id
        return Handle(data["text/plain"])

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))  # type: ignore[arg-type]
    bars = Bars()
    bars.say = lambda line: None  # type: ignore[method-assign]
    bars.console.is_jupyter = True
    walk(bars)
    assert len(shown) == 1, "one line a cohort"
    assert shown[0][0] == "kd resnet8: 0 %"
    assert shown[0][-1].startswith("kd resnet8: 100 %")
    assert shown[0][-1].endswith("epoch 2/2, best 20.00 %")
    assert len(shown[0]) == 3, "six quick steps are drawn with their epochs alone"
