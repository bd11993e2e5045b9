"""A cache and a server of the Hugging Face hub, laid by tests: nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from torch import nn

from flowdistill.randomness import seeded

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def network(name: str, seed: int = 0, **parts: Any) -> nn.Module:
    """A small network of timm, in eval mode, whose batch statistics are not the fresh ones."""
    with seeded(seed, "published"):
        net = timm.create_model(name, **parts)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def weights(net: nn.Module) -> bytes:
    """The content of its safetensors file."""
    return save({name: value.contiguous() for name, value in net.state_dict().items()})


def tiny_config(**changes: Any) -> bytes:
    """The config.json of a timm model of the hub for 3x32x32 images."""
    made_for = {
        "input_size": [3, 32, 32],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.25],
    }
    about = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": {**made_for, "license": "mit", "num_classes": 1000}}
    return json.dumps({**about, **changes}).encode()


def lay(cache: Path, repository: str, files: Mapping[str, bytes]) -> Path:
    """Put a repository into a cache as the hub's client does; returns the folder of its files."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for path in (snapshot, folder / "refs", folder / "blobs"):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


class Site:
    """What a server of the test's own gives: by path a status and a content; ``asked`` are the paths that were asked for."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self.asked: list[str] = []
        self.address = ""

    def put(self, path: str, content: bytes, status: int = 200, **headers: str) -> None:
        self.files[path] = status, content, headers


@contextmanager
def serving() -> Iterator[Site]:
    """Inside, a server on loopback."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            status, content, headers = site.files.get(self.path, (404, b"", {"X-Error-Code": "EntryNotFound"}))
            self.send_response(status)
            entity = hashlib.sha256(content).hexdigest()
            for name, value in {"ETag": f'"{entity}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # closing it waits for them, and so for their sockets
    site.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
