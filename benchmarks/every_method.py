"""One epoch of every method on digits, by the command line: that each trains, and how large its first gradient is.

python benchmarks/every_method.py FOLDER
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from flowdistill.methods import METHODS

COMMON = ("--dataset", "digits", "--batch-size", "32", "--precision", "fp32", "--device", "cpu")
STAGED = ("ab", "ft")  # two stages by default: one epoch each


def flowdistill(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "flowdistill", *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    flowdistill(folder, "train", "--model", "resnet20", "--seeds", "100", "--epochs", "10", *COMMON)
    student = ("distill", "--student", "resnet8", "--teacher", "resnet20", "--epochs", "1", *COMMON)
    plain = ",".join([*(name for name in METHODS if name not in STAGED), "ls:kd", "at+kd"])
    stages = [word for name in STAGED for word in ("--set", f"options.{name}.stage_epochs=1")]
    told = flowdistill(folder, *student, "--method", plain).stderr
    told += flowdistill(folder, *student, "--method", ",".join(STAGED), *stages).stderr
    gradients = re.findall(r"^(\S+) resnet8 .*gradient of (\S+) on the first batch (\S+) x the task's \(weight (\S+)\)", told, re.MULTILINE)
    rows = json.loads(flowdistill(folder, "table", "--summary", "--student", "resnet8", "--format", "json").stdout)
    print("| method | variant | accuracy, % | first gradient, x the task's, at its default weight |\n|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["method"], row["variant"])):
        own = [f"{ratio} ({weight})" for method, term, ratio, weight in gradients if (method, term) == (row["method"], row["method"])]
        print(f"| {row['method']} | {row['variant']} | {row['mean']:.2f} | {', '.join(own) or '-'} |")


main()
