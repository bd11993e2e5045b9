"""How a process computes on a GPU, without one: which is current, what float32 is there, what is tried, and what a bad one is told."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from flowdistill.checks import UserError
from flowdistill.data.interfaces import at_once
from flowdistill.device import computing, describe, resolve_device, resolve_precision, settings

CPU, SECOND = torch.device("cpu"), torch.device("cuda:1")


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The GPUs that are current, the innermost last."""
    found: list[torch.device] = []

    @contextlib.contextmanager
    def device(one: torch.device) -> Iterator[None]:
        found.append(one)
        try:
            yield
        finally:
            found.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return found


def of_products() -> object:
    matmul = torch.backends.cuda.matmul
    return getattr(matmul, "fp32_precision", matmul.allow_tf32)


def test_inside_the_gpu_that_is_named_is_current_and_float32_is_float32(current: list[torch.device]) -> None:
    before = settings(SECOND), of_products(), torch.get_num_threads()
    with computing(SECOND, cores=1):
        assert current == [SECOND]
        assert settings(SECOND) == {"float32": "ieee", "cudnn.benchmark": "true"}
        assert of_products() in ("ieee", False)
        assert not torch.are_deterministic_algorithms_enabled()
        with computing(SECOND, deterministic=True, cores=1):
            assert settings(SECOND) == {"float32": "ieee", "cudnn.benchmark": "false"}, "what is tried is not the same each time"
            assert torch.are_deterministic_algorithms_enabled()
        assert settings(SECOND)["cudnn.benchmark"] == "true"
    assert current == []
    assert (settings(SECOND), of_products(), torch.get_num_threads()) == before
    assert before[0]["float32"] == "tf32", "PyTorch's own setting, which this is about"


def test_an_error_inside_puts_everything_back(current: list[torch.device]) -> None:
    before = settings(SECOND), of_products()
    with pytest.raises(ValueError, match=r"^x$"), computing(SECOND, cores=1):
        raise ValueError("x")
    assert (current, settings(SECOND), of_products()) == ([], *before)


def test_computing_on_a_cpu_sets_nothing(current: list[torch.device]) -> None:
    with computing(CPU, cores=1):
        assert (current, settings(CPU)) == ([], {})


def test_cublas_is_told_before_anything_is_computed() -> None:
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize(("computes", "auto"), [(True, "bf16"), (False, "fp32")])
def test_bf16_is_refused_where_a_gpu_only_emulates_it(computes: bool, auto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: computes or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert (resolve_precision("auto", SECOND), resolve_precision("fp32", SECOND)) == (auto, "fp32")
    if computes:
        assert resolve_precision("bf16", SECOND) == "bf16"
        return
    with pytest.raises(UserError) as told:
        resolve_precision("bf16", SECOND)
    assert str(told.value) == f"--precision bf16: {describe(SECOND)} does not compute bf16, which needs compute capability 8.0; use fp32"


@pytest.mark.parametrize(
    ("error", "count", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            1,
            "--device cuda: it has no memory left, so another process fills it; end that (nvidia-smi lists them), or use another device",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore"),
            1,
            "--device cuda: it is Tesla K80 (compute capability 3.7), which this PyTorch is not built for ({torch}); install one that is, "
            "or use --device cpu",
        ),
        (
            RuntimeError("CUDA error: invalid device ordinal"),
            1,
            "--device 'cuda' is not available here; use auto, or what this machine has of cpu, cuda, mps",
        ),
        (
            RuntimeError("CUDA error: invalid device ordinal"),
            2,
            "--device 'cuda' is not available here; use auto, or what this machine has of cpu, cuda:0, cuda:1, mps",
        ),
    ],
)
def test_a_gpu_that_can_not_compute_is_told_in_one_line(error: Exception, count: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "ones", fails)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K80")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (3, 7))
    with pytest.raises(UserError) as found:
        resolve_device("cuda")
    assert str(found.value) == told.format(torch=torch.__version__)


@pytest.mark.parametrize(
    ("size", "device", "images"),
    [(8, "cpu", 500), (32, "cpu", 500), (32, "cuda", 2000), (64, "cuda", 1000), (224, "cpu", 81), (224, "cuda", 81), (5000, "cuda", 1)],
)
def test_images_that_are_measured_at_once_go_by_their_pixels(size: int, device: str, images: int) -> None:
    assert at_once(size, size, torch.device(device)) == images


LIBRARY = re.compile(r"GOMP_SPINCOUNT = '(\d+)'")


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's threads are GCC's on Linux alone")
@pytest.mark.parametrize(
    ("set_by_user", "turns"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")], ids=str
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(set_by_user: dict[str, str], turns: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **set_by_user}
    command = [sys.executable, "-c", "import flowdistill.device"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stderr
    assert LIBRARY.findall(told) == [turns]
