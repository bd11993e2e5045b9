"""What each method costs over the labels alone, as a table, from the JSON of ``flowdistill bench --methods all --json``.

python benchmarks/costs.py results/bench/methods-xeon-2-cores.json "COMMAND" > results/bench/methods-xeon-2-cores.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    where = "{cpu}, {cores} cores; {device}; torch {torch}".format(**found["hardware"])
    how = f"median of {found['rounds']} turns of {found['steps']}"
    print(f"`{sys.argv[2]}`\n\n{where}; batch {found['batch_size']}, random 32x32 images; {how}")
    print("steps. With most methods comes the teacher's forward pass, once a batch for all students of a seed; dml trains two students.")
    names = [pair["pair"] for pair in found["pairs"]]
    print("\n| method |" + "".join(f" {name}: ms a step over base | x base |" for name in names))
    print("|---|" + "---|---|" * len(names))
    for name in found["methods"]:
        print(f"| {name} |" + "".join(cells(pair["rows"], name) for pair in found["pairs"]))


def cells(rows: list[dict[str, Any]], name: str) -> str:
    by_name = {row["loop"].rpartition(": ")[2]: row for row in rows if "plain" not in row["loop"]}
    row, base = by_name[name], by_name["base"]
    if name == "base":
        return f" ({base['step ms']:.0f} ms) | 1 |"
    return f" {float(row['over base'].removesuffix(' ms')):+.0f} | {row['step ms'] / base['step ms']:.2f} |"


main()
