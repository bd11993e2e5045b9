"""Ray clusters: what is no address, no Ray, too old, open to others or another machine is refused in one line; what it trains is right."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import command
from helpers.crew import ledger_of_a_teacher
from helpers.interruptions import outcome
from helpers.ray_nodes import OWN, PROMPT, nodes

import flowdistill
from flowdistill import UserError
from flowdistill.ledger import Ledger
from flowdistill.runner.remote import ray_cluster, ray_crew, storage
from flowdistill.runner.remote.ray_cluster import is_loopback, parse, refuse_open, refuse_unanswered
from flowdistill.runner.remote.ray_crew import Node

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster runs on this machine, and what is set here ends with the test."""
    for name in ("RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED", *OWN):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray_cluster, "_HEAD", tmp_path / "ray_current_cluster")


@pytest.mark.parametrize("address", ["local", "10.0.0.1:6379", "head.example:1", "[::1]:65535", "127.0.0.1:6379"])
def test_an_address_is_taken_as_it_is(address: str) -> None:
    assert parse(address) == address


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "ray://x:1", "x:0", "x:99999", "x:65536", ":6379", "x:", "x:06379", "x:port", "x:\u0661", "", "Local", "a/b:1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(address)
    assert str(refused.value) == f"--ray {address!r} is no address; give HOST:PORT such as 10.0.0.1:6379, auto, or local"


def test_auto_is_the_cluster_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as refused:
        parse("auto")
    assert str(refused.value) == (
        "--ray auto: no Ray cluster runs on this machine; start one with: ray start --head, or give --ray local or HOST:PORT"
    )
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:6379\n")
    assert parse("auto") == "127.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:7000")
    assert parse("auto") == "10.1.2.3:7000"
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.1.2.3:10001")
    with pytest.raises(UserError, match="is no address"):
        parse("auto")


@contextmanager
def port(answer: bytes | None) -> Iterator[int]:
    """A port of this machine where somebody listens who is no Ray: says this to whoever connects, or nothing. None: nobody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        number = server.getsockname()[1]
        if answer is None:
            yield number
            return
        server.listen()
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                    held[-1].sendall(answer)
                except OSError:
                    return

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        try:
            yield number
        finally:
            server.shutdown(socket.SHUT_RDWR)
            serving.join()  # it may accept as late as now
            for connection in held:
                connection.close()


def test_where_nobody_answers_is_refused_at_once() -> None:
    with port(None) as number:
        began = time.monotonic()
        with pytest.raises(UserError) as refused:
            refuse_unanswered(f"127.0.0.1:{number}")
    assert time.monotonic() - began < 10
    assert str(refused.value) == (f"--ray 127.0.0.1:{number}: nobody answers there (Connection refused); start Ray with: ray start --head")
    with port(b"") as number:
        refuse_unanswered(f"127.0.0.1:{number}")


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("192.168.1.9", False),
        ("[fe80::1]", False),
        ("::", False),
    ],
)
def test_a_loopback_address_is_known(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


def test_a_cluster_that_others_reach_needs_a_token() -> None:
    refuse_open("x:1", ["127.0.0.1", "::1"], demands_token=False)
    refuse_open("x:1", ["127.0.0.1", "10.0.0.7"], demands_token=True)
    refuse_open("x:1", [], demands_token=False)
    with pytest.raises(UserError) as refused:
        refuse_open("10.0.0.7:6379", ["127.0.0.1", "10.0.0.7"], demands_token=False)
    assert str(refused.value) == (
        "--ray 10.0.0.7:6379: other machines can reach 10.0.0.7, and whoever reaches a Ray cluster without token authentication runs code "
        "on it; make a token with: ray get-auth-token --generate, copy ~/.ray/auth_token to every node, start Ray there with: export "
        "RAY_AUTH_MODE=token; ray start --head, and export RAY_AUTH_MODE=token here"
    )


HERE = Node("a", "host", {"flowdistill": "0.2", "torch": "2.9", "numpy": "2.3", "python": "3.11.7"}, "c" * 64, True, True)


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({}, ""),
        ({"id": "b", "name": "other", "demands_token": False, "sees_storage": False}, ""),
        ({"versions": HERE.versions | {"torch": "2.8"}}, "torch 2.8, not 2.9"),
        (
            {"versions": HERE.versions | {"torch": "2.8", "python": "3.12.1"}, "code": "d" * 64},
            "torch 2.8, not 2.9 and python 3.12.1, not 3.11.7",
        ),
        ({"code": "d" * 64}, "other code of flowdistill (dddddddd, not cccccccc)"),
    ],
)
def test_in_what_a_node_differs_is_told(changes: dict[str, Any], other: str) -> None:
    assert dataclasses.replace(HERE, **changes).other(HERE) == other


def test_this_machine_is_not_another(tmp_path: Path) -> None:
    word = storage.leave_probe(tmp_path)
    found = ray_crew.here("a", str(tmp_path), word)
    assert found.sees_storage
    assert found.other(ray_crew.here("b", str(tmp_path / "elsewhere"), word)) == ""
    assert not ray_crew.here("b", str(tmp_path / "elsewhere"), word).sees_storage
    assert not ray_crew.here("a", str(tmp_path), "another word").sees_storage
    storage.remove_probe(tmp_path, word)
    assert [*tmp_path.iterdir()] == []


TRAIN = "train --model resnet8 --set data.pad=1 --set data.flip=false --batch-size 64 --epochs 1 --seeds 0"


@pytest.mark.parametrize("version", [None, "2.9.3", "2.51.2", "1.99"])
def test_without_ray_or_with_an_old_one_it_is_refused_in_one_line(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    found = metadata.version

    def faked(name: str) -> str:
        if name != "ray":
            return found(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", faked)
    said = command(tmp_path, *TRAIN.split(), "--dataset", f"npz:{small_npz}", "--ray", "local")
    install = "install it with: pip install 'flowdistill[ray]'"
    why = "--ray needs Ray, which is not installed" if version is None else f"--ray needs Ray 2.52 or newer, here is {version}"
    assert said == (2, "", f"flowdistill: {why}; {install}\n")
    assert not (tmp_path / "runs").exists()


def test_torchrun_and_ray_do_not_go_together(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    line = "--ray local: torchrun started several processes, and Ray starts workers itself; give the command without torchrun"
    said = command(tmp_path, *TRAIN.split(), "--dataset", f"npz:{small_npz}", "--ray", "local", "--device", "cpu")
    assert said == (2, "", f"flowdistill: {line}\n")


def test_with_nothing_to_do_no_cluster_is_asked(small_npz: Path, tmp_path: Path) -> None:
    words = [*TRAIN.split(), "--dataset", f"npz:{small_npz}"]
    assert command(tmp_path, *words).code == 0
    with port(None) as number:
        said = command(tmp_path, *words, "--ray", f"127.0.0.1:{number}")
    assert (said.code, "nobody answers" in said.err) == (0, False)
    assert "skipped" in said.err


# With Ray


def environment(**more: str) -> dict[str, str]:
    source = str(Path(flowdistill.__file__).parents[1])
    return os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"} | PROMPT | more


def started(folder: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    """``flowdistill WORDS`` in a folder; what it says goes to files there."""
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        start = [sys.executable, "-m", "flowdistill", *words]
        return subprocess.Popen(start, cwd=folder, env=environment(**more), stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True)


def descendants(process: int) -> set[int]:
    """A process and all that it started, and these."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(processes: set[int]) -> set[str]:
    """The addresses at which these processes listen."""
    inodes = set()
    for process in processes:
        try:
            for file in Path(f"/proc/{process}/fd").iterdir():
                inodes |= set(re.findall(r"^socket:\[(\d+)\]$", os.readlink(file)))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes:
                host = bytes.fromhex(local.partition(":")[0])
                words = [host[start : start + 4][::-1] for start in range(0, len(host), 4)]
                address = ipaddress.ip_address(b"".join(words))
                found.add(str(getattr(address, "ipv4_mapped", None) or address))
    return found


def test_a_socket_that_others_reach_would_be_seen() -> None:
    for host, family in (("0.0.0.0", socket.AF_INET), ("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        with socket.socket(family) as server:
            server.bind((host, 0))
            server.listen()
            assert host in listening({os.getpid()})


@pytest.fixture(scope="module")
def taught(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ledger_of_a_teacher(small_npz, tmp_path_factory.mktemp("taught") / "runs")


def distilling(small_npz: Path, *, seeds: str, epochs: int) -> list[str]:
    words = f"distill --method kd --student resnet8 --teacher 1 --dataset npz:{small_npz} --set data.pad=1 --batch-size 64"
    return [*words.split(), "--engine", "eager", "--precision", "fp32", "--epochs", str(epochs), "--seeds", seeds]


def outcomes(folder: Path) -> dict[tuple[str, int], Any]:
    ledger = Ledger(folder)
    found = {(run_.fingerprint, run_.seed): outcome(run_, ledger) for run_ in ledger.runs()}
    ledger.close()
    return found


def test_a_local_cluster_trains_what_one_process_does_and_listens_on_loopback_alone(small_npz: Path, taught: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for name in ("runs", "one"):
        shutil.copytree(taught, tmp_path / name)
    words, addresses = distilling(small_npz, seeds="0-1", epochs=2), set[str]()
    with started(tmp_path, *words, "--ray", "local") as process:
        until = time.monotonic() + 300
        while process.poll() is None:
            assert time.monotonic() < until
            addresses |= listening(descendants(process.pid))
            time.sleep(0.1)
    err = (tmp_path / "err").read_text()
    assert process.returncode == 0, err
    assert addresses
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses
    assert "2 of 2 cohorts done" in err
    assert not any("ray::" in line or "Ray" in line or "raylet" in line for line in err.splitlines()), err
    assert len((tmp_path / "out").read_text().splitlines()) >= 3
    assert command(tmp_path, *words, "--runs", "one").code == 0
    assert outcomes(tmp_path / "runs") == outcomes(tmp_path / "one")
    assert [path for path in (tmp_path / "runs" / "storage").rglob("*") if path.is_file()] == []


@pytest.mark.long
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_what_listens_and_is_no_ray_is_refused_in_one_line(small_npz: Path, tmp_path: Path, answer: bytes) -> None:
    pytest.importorskip("ray")
    with port(answer) as number:
        words = [*TRAIN.split(), "--dataset", f"npz:{small_npz}", "--ray", f"127.0.0.1:{number}"]
        process = started(tmp_path, *words)
        began = time.monotonic()
        assert process.wait(90) == 2
    assert time.monotonic() - began < 60  # 10 s of them it is waited for
    err = (tmp_path / "err").read_text()
    assert err == (
        f"flowdistill: --ray 127.0.0.1:{number}: what listens there does not answer as a Ray cluster does; give the address of a head "
        f"node\n"
    )
    assert not (tmp_path / "runs" / "ledger.db").exists()


def lines_of(folder: Path) -> list[str]:
    return (folder / "err").read_text().splitlines()


def wait_for(folder: Path, text: str, process: subprocess.Popen[str], *, seconds: float = 300) -> None:
    """Wait until the process has said what matches ``text``, a regular expression."""
    until = time.monotonic() + seconds
    while not re.search(text, (folder / "err").read_text()):
        assert time.monotonic() < until, lines_of(folder)
        assert process.poll() is None, lines_of(folder)
        time.sleep(0.1)


@pytest.mark.long
def test_a_node_dies_in_the_middle_and_the_ledger_is_that_of_one_process(small_npz: Path, taught: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for name in ("runs", "one"):
        shutil.copytree(taught, tmp_path / name)
    words = distilling(small_npz, seeds="0-7", epochs=30)
    with nodes() as cluster:
        process = started(tmp_path, *words, "--ray", cluster.address, "--storage", "shared", **OWN)
        wait_for(tmp_path, "3 of 8 cohorts done", process)
        cluster.kill(1)
        wait_for(tmp_path, " (again|goes on) on ", process, seconds=30)  # it died in a cohort
        assert process.wait(500) == 0, lines_of(tmp_path)
    assert command(tmp_path, *words, "--runs", "one").code == 0
    assert outcomes(tmp_path / "runs") == outcomes(tmp_path / "one")
    assert [path for path in (tmp_path / "shared").rglob("*") if path.is_file()] == []


def other_code(place: Path) -> dict[str, str]:
    """The environment of a node whose code has a comment more."""
    shutil.copytree(Path(flowdistill.__file__).parent, place / "flowdistill")
    with (place / "flowdistill" / "talk.py").open("a") as file:
        file.write("# another\n")
    return {"PYTHONPATH": str(place)}


@pytest.mark.long
def test_a_node_with_other_code_is_refused_at_once_and_left_out_if_it_joins_later(small_npz: Path, taught: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    other = other_code(tmp_path / "other")
    shutil.copytree(taught, tmp_path / "runs")
    with nodes() as cluster:
        words = distilling(small_npz, seeds="0-5", epochs=30)
        process = started(tmp_path, *words, "--ray", cluster.address, **OWN)
        wait_for(tmp_path, "1 of 6 cohorts done", process)
        cluster.add(other)
        assert process.wait(500) == 0, lines_of(tmp_path)
        (line,) = [line for line in lines_of(tmp_path) if "is left out" in line]
        assert re.fullmatch(r"node [0-9a-f]{8} is left out: it has other code of flowdistill \([0-9a-f]{8}, not [0-9a-f]{8}\)", line)
        process = started(tmp_path, *distilling(small_npz, seeds="6", epochs=1), "--ray", cluster.address, **OWN)
        assert process.wait(200) == 2
        (line,) = lines_of(tmp_path)
        assert line.startswith(f"flowdistill: --ray {cluster.address}: node ")
        assert re.search(r" has other code of flowdistill \([0-9a-f]{8}, not [0-9a-f]{8}\); install the same on all machines$", line)
    ledger = Ledger(tmp_path / "runs")
    assert [run_.status for run_ in ledger.runs()] == ["finished"] * 7
    ledger.close()


BLIND = """
import pathlib
_read = pathlib.Path.read_text
def read_text(path, *args, **keys):
    if path.name.startswith(".probe-"):
        raise FileNotFoundError(path)
    return _read(path, *args, **keys)
pathlib.Path.read_text = read_text
"""


@pytest.mark.long
def test_a_storage_that_a_node_does_not_see_is_refused(small_npz: Path, taught: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    shutil.copytree(taught, tmp_path / "runs")
    (tmp_path / "blind").mkdir()
    (tmp_path / "blind" / "sitecustomize.py").write_text(BLIND)
    source = Path(flowdistill.__file__).parents[1]
    with nodes({"PYTHONPATH": f"{tmp_path / 'blind'}:{source}"}) as cluster:
        words = distilling(small_npz, seeds="0", epochs=1)
        process = started(tmp_path, *words, "--ray", cluster.address, "--storage", "shared", **OWN)
        assert process.wait(200) == 2
    (line,) = lines_of(tmp_path)
    end = f" does not see --storage {tmp_path / 'shared'}, or can't write there; name a folder that all machines share"
    assert line.startswith(f"flowdistill: --ray {cluster.address}: node ")
    assert line.endswith(end)
    assert [*(tmp_path / "shared").iterdir()] == []
