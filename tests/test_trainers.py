"""The pages on Lightning and on the Hugging Face Trainer run, and what they say of checkpoints is so."""

from __future__ import annotations

import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

DOCS = Path(__file__).parent.parent / "docs"
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]  # those libraries warn of themselves


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    (folder / "page.py").write_text("".join(re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)))
    return runpy.run_path("page.py")


def assert_student_once_and_no_teacher(state: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    student = names["student"].state_dict()
    assert len(state) == len(student)
    for name, value in student.items():
        (held,) = [of_file for key, of_file in state.items() if key.endswith(f".{name}")]
        assert torch.equal(held, value), name
    shapes = {tuple(value.shape) for value in state.values()}
    assert (32, 1, 3, 3) not in shapes
    assert (8, 1, 3, 3) in shapes


def test_the_page_on_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="pip install lightning")
    names = run_page("LIGHTNING.md", tmp_path, monkeypatch)
    assert float(names["trainer"].callback_metrics["accuracy"]) > 0.2
    assert {"loss", "task", "kd"} <= names["trainer"].callback_metrics.keys()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_student_once_and_no_teacher(state, names)
    for name, value in names["again"].distiller.student.state_dict().items():
        assert torch.equal(value, names["module"].distiller.student.state_dict()[name]), name


def test_the_page_on_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="pip install transformers accelerate")
    pytest.importorskip("accelerate", reason="pip install transformers accelerate")
    names = run_page("HUGGINGFACE_TRAINER.md", tmp_path, monkeypatch)
    assert names["trainer"].evaluate()["eval_accuracy"] > 0.2
    assert not names["teacher"].training
    newest = max((tmp_path / "trainer").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert_student_once_and_no_teacher(load_file(newest / "model.safetensors"), names)
    before = {name: value.clone() for name, value in names["student"].state_dict().items()}
    torch.nn.init.zeros_(names["student"].fc.weight)
    names["trainer"].train(resume_from_checkpoint=True)
    assert all(torch.equal(value, before[name]) for name, value in names["student"].state_dict().items())
