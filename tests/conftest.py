"""Small real data and a quiet machine for every test."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from flowdistill import trust
from flowdistill.data.dataset import ImageData
from flowdistill.data.sources import read_npz
from flowdistill.ledger import Ledger

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: as many workers as cores are busy already
pytest.register_assert_rewrite("helpers")
pytest_plugins = ["helpers.affected"]


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 + 150 real digits of 8x8 as an npz file."""
    bunch = load_digits()
    images, labels = (bunch.images * 15).astype(np.uint8), bunch.target
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, x_train=images[:300], y_train=labels[:300], x_test=images[300:450], y_test=labels[300:450])
    return path


@pytest.fixture(scope="module")
def data(small_npz: Path) -> ImageData:
    """What a run reads from that file."""
    return read_npz(small_npz)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger."""
    ledger = Ledger(tmp_path / "runs", create=True)
    yield ledger
    ledger.close()


@pytest.fixture(scope="session", autouse=True)
def _any_processor() -> Iterator[None]:
    """Precision auto is fp32 in the tests, whatever the processor computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowdistill.device._cpu_computes_bf16", lambda: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What trainings of the tests ran is recorded for this session alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(trust.STATE, str(tmp_path_factory.getbasetemp() / "state"))
        yield


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test has named no code yet, as a new process has not."""
    monkeypatch.setattr(trust, "_named", set())
    monkeypatch.setattr(trust, "_origins", {})


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile captures is run as it is: generating kernels takes seconds, and tests of its own hold those."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def own_code() -> Iterator[None]:
    """The test vouches for all code that it uses: it wrote it."""
    with trust.code(True):
        yield


@pytest.fixture(autouse=True)
def _leave_torch_as_found() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_finish() -> None:
    """What is there by now stays: no later collection of garbage needs to look at these millions of objects."""
    gc.collect()
    gc.freeze()


TABLES = {"planted bugs": ("bug", "check", "caught by"), "golden values": ("key", "expected", "relative error")}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What test_planted.py and test_golden.py recorded of each bug and value, in columns."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    for title, header in TABLES.items():
        told = [(report.outcome, row) for report in reports for name, row in report.user_properties if name == title]
        if not told:
            continue
        good = sum(outcome == "passed" for outcome, _ in told)
        terminalreporter.section(f"{title}: {good} of {len(told)} {'caught' if title == 'planted bugs' else 'met'}")
        rows = [header, *(row for _, row in told)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        for row in rows:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
