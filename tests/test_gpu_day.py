"""benchmarks/gpu.py without a GPU: its rehearsal, its limits, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flowdistill import models
from flowdistill.bench.measure import ENGINES

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
NAMES = [
    *("start", "capturable", "kernels", "speed", "cifar100-teachers", "cifar100-students", "cifar100-students-on"),
    *("cifar10-teachers", "cifar10-students", "cifar10-students-on", "resnet110"),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; it takes the machine as it is, and waits half a second for what it ends."""
    found = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "gpu", script)
    found.loader.exec_module(script)
    monkeypatch.setattr(script, "GRACE", 0.5)
    monkeypatch.setattr(script, "_machine", lambda device, rehearsed: "a machine")
    return script


def of_size(gpu: ModuleType, size: Any, data: dict[str, str]) -> list[Any]:
    return gpu.stages(size, "cpu", Path("out"), Path("runs"), data)


def script(*words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.long
def test_a_rehearsal_goes_through_every_step_of_every_stage(gpu: ModuleType, tmp_path: Path) -> None:
    code, said, told = script("--rehearse", "--out", str(tmp_path))
    stages = of_size(gpu, gpu.TOY, dict.fromkeys(("cifar100", "cifar10"), "digits"))
    assert [stage.name for stage in stages] == NAMES
    for stage in stages:
        page = (tmp_path / f"{stage.name}.md").read_text()
        assert gpu.REHEARSED in page
        found = re.findall(r"^## (\S+): (\w+) \(exit status (-?\d+)\)", page, re.MULTILINE)
        assert found == [(step.name, "passed", "0") for step in stage.steps], page
        for step in stage.steps:
            if step.keeps:
                text = (tmp_path / f"{step.name}.{step.keeps}").read_text()
                assert all(json.loads(line) for line in (text.splitlines() if step.keeps == "jsonl" else [text]))
    different = {step.name for stage in stages for step in stage.steps}
    assert (code, said) == (0, f"{len(different)} steps, results in {tmp_path}: all passed\n"), told
    loops = [row["loop"] for row in json.loads((tmp_path / "bench.json").read_text())["pairs"][0]["rows"]]
    assert [loop.partition(",")[0] for loop in loops] == ["plain loop", "plain loop", "strong plain loop", "eager", "eager"]
    for name in ("cifar100", "cifar10"):
        header, *rows = map(json.loads, (tmp_path / f"{name}.ledger.jsonl").read_text().splitlines())
        assert header["kind"] == "ledger-export"
        assert Counter(row["run"]["method"] for row in rows) == {"base": 2 + 3, "fsp": 3, "at": 3}
        assert {row["run"]["status"] for row in rows} == {"finished"}


def test_the_steps_of_a_rehearsal_are_those_of_the_day(gpu: ModuleType) -> None:
    full, toy = (of_size(gpu, size, {"cifar100": "npz:a.npz", "cifar10": "npz:b.npz"}) for size in (gpu.FULL, gpu.TOY))
    assert [stage.name for stage in full] == [stage.name for stage in toy] == gpu.STAGES == NAMES
    for stage, small in zip(full, toy, strict=True):
        assert [(step.name, step.limit, step.command[:4]) for step in stage.steps] == [
            (step.name, step.limit, step.command[:4]) for step in small.steps
        ]
        assert sum(step.limit for step in stage.steps) < 600, stage.name
    steps = [step for stage in full for step in stage.steps]
    measures = {step.name: gpu.asked_of(*step.command[2:]) for step in steps if step.command[1] == str(SCRIPT)}
    for asked in measures.values():
        assert set(filter(None, asked.engines.split(","))) <= set(ENGINES)
        assert all(models.canonical(name) == name for name in filter(None, asked.pair.split(":")))
    assert {step.command[2] for step in steps if step.command[1] == str(SCRIPT)} == set(gpu.MEASURES) - {"machine", "method"}
    assert (measures["bench"].cohorts, measures["bench"].workers, measures["capturable"].methods) == ("3,8", 8, "all")
    assert measures["kernels-compiled"].engines == "graph+compiled"


def test_a_training_of_the_day_is_by_the_whole_recipe(gpu: ModuleType) -> None:
    (stage,) = (stage for stage in of_size(gpu, gpu.FULL, {"cifar100": "npz:c.npz"}) if stage.name == "cifar100-students")
    words = "--method base,fsp,at --student resnet20 --teacher resnet20 --seeds 0-2 --dataset npz:c.npz --precision bf16 --device cpu"
    assert " ".join(stage.steps[0].command[1:]) == f"-m flowdistill distill {words} --runs runs/cifar100"


def test_every_test_for_a_gpu_is_in_one_process(gpu: ModuleType) -> None:
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_gpu.py").read_text(), re.MULTILINE)
    (start,) = (stage for stage in of_size(gpu, gpu.FULL, {}) if stage.name == "start")
    chosen = {step.name: step.command[-1] for step in start.steps if "pytest" in step.command}
    alone = [chosen["tests-remembering"], chosen["tests-falling-back"]]
    assert [sum(name in test for test in tests) for name in alone] == [1, 1]
    assert sorted(chosen["tests"].removeprefix("not ").split(" and not ")) == sorted(alone)


def writing(path: Path, ending: str = "") -> list[str]:
    """A process whose child writes on and on, and which itself does not end, both deaf to Ctrl-C."""
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"{deaf}\nwhile True:\n    open({str(path)!r}, 'a').write('.')\n    time.sleep(0.02)"
    until = f"while not os.path.exists({str(path)!r}):\n    time.sleep(0.02)"
    code = f"{deaf}\nimport os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n{until}\nprint('begun', flush=True)\n"
    return [sys.executable, "-c", f"{code}{ending}\ntime.sleep(600)"]


def assert_nobody_writes(path: Path) -> None:
    before = path.stat().st_size
    time.sleep(0.3)
    assert path.stat().st_size == before > 0


def test_a_step_past_its_limit_is_ended_with_its_children_and_the_next_goes_on(gpu: ModuleType, tmp_path: Path) -> None:
    last = [sys.executable, "-c", "print('here', 6 * 7)"]
    stage = gpu.Stage("made-up", [gpu.Step("late", 2, writing(tmp_path / "beat")), gpu.Step("after", 60, last, keeps="jsonl")])
    found = gpu.perform([stage], tmp_path, "on nothing")
    assert_nobody_writes(tmp_path / "beat")
    assert [(name, one.how) for name, one in found.items()] == [("late", "cut"), ("after", "passed")]
    assert 2 <= found["late"].seconds < 10
    page = (tmp_path / "made-up.md").read_text()
    assert re.search(r"^## late: cut \(exit status -9\), \d\.\d s of 2\n(?s:.*?)^begun$(?s:.*?)^## after: passed", page, re.MULTILINE), page
    assert (tmp_path / "after.jsonl").read_text() == "here 42\n"


def test_what_a_step_leaves_running_ends_with_it(gpu: ModuleType, tmp_path: Path) -> None:
    stage = gpu.Stage("made-up", [gpu.Step("leaving", 60, writing(tmp_path / "beat", "sys.exit(0)"))])
    assert gpu.perform([stage], tmp_path, "")["leaving"].how == "passed"
    assert_nobody_writes(tmp_path / "beat")


def test_ctrl_c_ends_the_step_that_runs(gpu: ModuleType, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stage = gpu.Stage("made-up", [gpu.Step("late", 60, writing(tmp_path / "beat", "os.kill(os.getppid(), signal.SIGINT)"))])
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu.perform([stage], tmp_path, "")
    finally:
        signal.signal(signal.SIGINT, before)
    assert_nobody_writes(tmp_path / "beat")


@pytest.fixture
def made_up(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages: one step that fails and one that passes; then one that passes."""

    def step(name: str, code: str, keeps: str = "") -> Any:
        return gpu.Step(name, 60, [sys.executable, "-c", code], keeps)

    broken = step("broken", "import sys; print('half'); sys.exit('no such thing')", "jsonl")
    stages = [gpu.Stage("first", [broken, step("good", "print(1)")]), gpu.Stage("second", [step("last", "print(2)")])]
    monkeypatch.setattr(gpu, "stages", lambda *given: stages)
    monkeypatch.setattr(gpu, "STAGES", [stage.name for stage in stages])


def test_a_failing_step_is_told_and_stops_no_other(
    gpu: ModuleType, made_up: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--rehearse", "--out", str(tmp_path / "new" / "out")]) == 1
    out = tmp_path / "new" / "out"
    assert capsys.readouterr().out == f"3 steps, results in {out}: not passed: broken (failed)\n"
    page = (out / "first.md").read_text()
    assert "## broken: failed (exit status 1)" in page
    assert "\nhalf\n" in page
    assert "\nno such thing\n" in page
    assert "## good: passed (exit status 0)" in page
    assert (out / "second.md").exists()
    assert not (out / "broken.jsonl").exists(), "half a result is no result"
    assert gpu.main(["--rehearse", "--stages", "2", "--out", str(out)]) == 0
    assert (out / "second.md").read_text().count("## last: passed") == 2


def test_a_folder_that_cant_be_written_is_refused_before_anything_runs(gpu: ModuleType, made_up: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for name, why in (("file", "File exists"), ("file/below", "Not a directory")):
        out = str(tmp_path / name)
        with pytest.raises(gpu.RefusedError) as refused:
            gpu.main(["--rehearse", "--out", out])
        assert str(refused.value) == f"--out {out!r}: results can't be written there ({why}); name another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_images_only_their_stages_are_left_out(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []
    monkeypatch.setattr(gpu, "perform", lambda chosen, *_: run.extend(stage.name for stage in chosen) or {})
    (tmp_path / "c.npz").touch()
    assert gpu.main(["--out", str(tmp_path), "--cifar100", f"npz:{tmp_path / 'c.npz'}"]) == 0
    assert run == [name for name in NAMES if not name.startswith("cifar10-")]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--stages 1,99", f"--stages '1,99': no stage '99'; choose from {', '.join(f'{no} {name}' for no, name in enumerate(NAMES, 1))}"),
        ("--cifar10 npz:none.npz", "--cifar10 'npz:none.npz': no such file"),
        ("--stages 8", "--stages cifar10-teachers: give its images by --cifar10 npz:PATH (or cifar10, which torchvision downloads)"),
    ],
)
def test_a_mistake_is_one_line(words: str, line: str) -> None:
    assert script(*words.split()) == (2, "", f"gpu.py: {line}\n")


@pytest.mark.parametrize("device", ["cuda:99", "cpu", "tpu9"])
def test_a_device_that_is_not_there_is_one_line(device: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, told = script("--device", device, "--out", str(out))
    count = torch.cuda.device_count()
    found = f"finds {count or 'no'} CUDA GPU{'' if count == 1 else 's'} here; "
    line = f"torch {torch.__version__} {found}run this where there is one, or go through it on the CPU with --rehearse"
    line = "no device of torch; write cuda, or cuda:1 for the second GPU" if device == "tpu9" else line
    assert (code, said, told) == (2, "", f"gpu.py: --device {device!r}: {line}\n")
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    code, said, told = script("--out", str(tmp_path / "out"))
    assert (code, said, told.count("\n")) == (2, "", 1)
    assert told.startswith(f"gpu.py: --device 'cuda': torch {torch.__version__} finds no CUDA GPU")
    assert told.endswith("or go through it on the CPU with --rehearse\n")


def test_make_gpu_runs_it() -> None:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # make test runs this from make

    def planned(*words: str) -> str:
        return subprocess.run(
            ["make", "-n", "--no-print-directory", "gpu", *words], cwd=ROOT, env=alone, capture_output=True, text=True, check=True
        ).stdout

    assert planned().rstrip().endswith("/bin/python benchmarks/gpu.py")
    assert planned("PYTHON_GPU=python3", "GPU=--stages 1").strip() == "python3 benchmarks/gpu.py --stages 1"
