"""Small real data and a quiet machine for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from flowdistill.ledger import Ledger

torch.set_num_threads(1)
pytest.register_assert_rewrite("command")


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 + 150 real digits of 8x8 as an npz file."""
    bunch = load_digits()
    images, labels = (bunch.images * 15).astype(np.uint8), bunch.target
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, x_train=images[:300], y_train=labels[:300], x_test=images[300:450], y_test=labels[300:450])
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger."""
    ledger = Ledger(tmp_path / "runs", create=True)
    yield ledger
    ledger.close()


@pytest.fixture(autouse=True)
def _leave_torch_as_found() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
