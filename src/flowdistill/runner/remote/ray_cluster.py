"""A Ray cluster: by which address, who can reach it, and joining it. Nothing is sent to a cluster that is refused here."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import advice
from ...checks import UserError, first_line
from ...device import usable_cores

LOCAL, AUTO = "local", "auto"
OLDEST = (2, 52)  # the first Ray that can demand a token
PATIENCE = 5.0  # seconds that an address has to answer
JOINING = 30.0  # seconds that a cluster has to take this process in
TOKEN_MODE = "RAY_AUTH_MODE"
_HEAD = Path("/tmp/ray/ray_current_cluster")  # where `ray start` notes the address of this machine's cluster


def demands_token() -> bool:
    """Whether Ray asks for a token, where this process was started."""
    return os.environ.get(TOKEN_MODE, "").lower() == "token"


def parse(address: str) -> str:
    """``local``, ``auto`` or ``HOST:PORT`` -> the same, ``auto`` as what it means here.

    Raises:
        UserError: it is none of them, or no cluster runs on this machine.
    """
    if address == LOCAL:
        return address
    if address == AUTO:
        with contextlib.suppress(OSError):
            address = os.environ.get("RAY_ADDRESS") or _HEAD.read_text().strip()
        if address == AUTO:
            start = advice.options("ray", "start", "--head")
            raise UserError(f"--ray auto: no Ray cluster runs on this machine; start one with: {start}, or give --ray local or HOST:PORT")
    host, colon, port = address.rpartition(":")
    if not (colon and host and "/" not in host and re.fullmatch(r"[1-9][0-9]{0,4}", port) and int(port) < 2**16):
        raise UserError(f"--ray {address!r} is no address; give HOST:PORT such as 10.0.0.1:6379, auto, or local")
    return address


def refuse_unanswered(address: str) -> None:
    """Refuse an address at which nobody listens.

    Raises:
        UserError: that is so.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        why = error.strerror or first_line(error)
        raise UserError(
            f"--ray {address}: nobody answers there ({why}); start Ray with: {advice.options('ray', 'start', '--head')}"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone, by an address that no other machine can reach."""
    with contextlib.suppress(OSError, ValueError):
        found = {entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), None)}
        return bool(found) and all(ipaddress.ip_address(str(one).partition("%")[0]).is_loopback for one in found)
    return False


def refuse_open(address: str, hosts: Sequence[str], *, demands_token: bool) -> None:
    """Refuse a cluster that other machines can reach and that asks for no token: whoever reaches it runs code there, and here.

    Raises:
        UserError: it is one.
    """
    outside = [host for host in hosts if not is_loopback(host)]
    if outside and not demands_token:
        token = advice.options("ray", "get-auth-token", "--generate")
        start = f"export {TOKEN_MODE}=token; {advice.options('ray', 'start', '--head')}"
        raise UserError(
            f"--ray {address}: other machines can reach {outside[0]}, and whoever reaches a Ray cluster without token authentication runs "
            f"code on it; make a token with: {token}, copy ~/.ray/auth_token to every node, start Ray there with: {start}, and export "
            f"{TOKEN_MODE}=token here"
        )


def _ray() -> Any:
    """Ray.

    Raises:
        UserError: it is missing or too old.
    """
    install = advice.options("pip", "install", "flowdistill[ray]")
    try:
        found = metadata.version("ray")
    except metadata.PackageNotFoundError:
        raise UserError(f"--ray needs Ray, which is not installed; install it with: {install}") from None
    if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < OLDEST:
        raise UserError(f"--ray needs Ray {'.'.join(map(str, OLDEST))} or newer, here is {found}; install it with: {install}")
    import ray

    return ray


@contextmanager
def joined(address: str) -> Iterator[Any]:
    """Inside, this process belongs to a Ray cluster; gives the module ``ray``. ``local`` starts a cluster on this machine, on loopback and
    behind a token of its own.

    Raises:
        UserError: Ray is missing, too old or of another version than the cluster; nobody answers; or other machines can reach the cluster,
            and it asks for no token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    place = parse(address)
    if place == LOCAL or is_loopback(place.rpartition(":")[0]):
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # so that Ray keeps to loopback; read when it is imported
    if place == LOCAL:
        os.environ.setdefault("RAY_worker_niceness", "0")  # the workers do what one process would; Ray's own default is 15
        os.environ |= {TOKEN_MODE: "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = _ray()
    if place != LOCAL:
        refuse_open(address, [place.rpartition(":")[0]], demands_token=demands_token())
        refuse_unanswered(place)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if place == LOCAL:
            ray.init(address="local", num_cpus=usable_cores(), include_dashboard=False, _node_ip_address="127.0.0.1", **quietly)
        else:
            _join(ray, place, quietly)
        for number, handler in before.items():
            signal.signal(number, handler)  # Ray puts one of its own there
        yield ray
    finally:
        ray.shutdown()


def _join(ray: Any, address: str, quietly: Mapping[str, Any]) -> None:
    """Connect to a cluster that runs.

    Raises:
        UserError: it is of another version, or is no Ray cluster, or does not answer in time.
    """
    failed: list[BaseException] = []

    def join() -> None:
        try:
            ray.init(address=address, **quietly)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=join, daemon=True)
    with _silent():
        thread.start()
        thread.join(JOINING)
    if thread.is_alive():
        raise UserError(f"--ray {address}: what listens there does not answer as a Ray cluster does; give the address of a head node")
    if failed:
        why = " ".join(str(failed[0]).split())
        if "ersion mismatch" in why:
            raise UserError(
                f"--ray {address}: the cluster has another version of Ray or Python than this machine ({why}); install the same"
            )
        raise UserError(f"--ray {address}: {why}")


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, nothing reaches stderr: Ray's C++ part writes there of what it tries, and what came of that is said in one line."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
