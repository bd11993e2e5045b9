"""What threads that wait for each other cost a step, on a machine that is idle and on one whose cores other processes want too.

python benchmarks/waiting.py [SECONDS]      # for each row, by default 8
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

WAYS = {
    "GCC's default: 300,000 turns": {"GOMP_SPINCOUNT": "300000"},
    "this package's: 10,000 turns": {"GOMP_SPINCOUNT": "10000"},
    "asleep at once (OMP_WAIT_POLICY=passive)": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
STEPS = """
import sys, time, torch
from torch import nn
torch.manual_seed(0)
layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
optimizer, images, labels = torch.optim.SGD(net.parameters(), 0.1), torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
began, steps = time.perf_counter(), 0
while time.perf_counter() - began < float(sys.argv[1]):
    loss = nn.functional.cross_entropy(net(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    steps += 1
print(1000 * (time.perf_counter() - began) / steps)
"""


def step_ms(way: dict[str, str], seconds: str) -> float:
    """Milliseconds of a step of a small network in a process of its own, in which threads wait in this way."""
    command = [sys.executable, "-c", STEPS, seconds]
    return float(subprocess.check_output(command, env={**os.environ, **way}, text=True))


def busy() -> None:
    """Want a core."""
    while True:
        pass


def main() -> None:
    """Print a table."""
    seconds = sys.argv[1] if sys.argv[1:] else "8"
    cores = os.cpu_count() or 1
    print(f"| a thread that waits | idle: ms a step | beside {cores} busy processes: ms a step |\n| -- | -- | -- |")
    for name, way in WAYS.items():
        idle = step_ms(way, seconds)
        others = [multiprocessing.Process(target=busy, daemon=True) for _ in range(cores)]
        for other in others:
            other.start()
        loaded = step_ms(way, seconds)
        for other in others:
            other.kill()
            other.join()
        print(f"| {name} | {idle:.2f} | {loaded:.2f} |", flush=True)


if __name__ == "__main__":
    main()
