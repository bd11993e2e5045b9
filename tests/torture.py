"""Strike trainings with every fault in ``helpers/faults.py``, again and again, and make a matrix of what became of them.

python tests/torture.py --count 100 --seed 0 --out results/torture.json   # and results/torture.md, which docs/SCALE.md includes
python tests/torture.py --count 3 --only "a full disk"                     # names, or parts of names, with commas between
python tests/torture.py --page results/torture.json                        # nothing is struck; results/torture.md is made again

Exit 1 if a strike lost more than it may, or gave other weights.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.faults import FAULTS, Fault, Strike, session, strike

from flowdistill.env import processor

BAR = "\\|"  # in a cell of Markdown
Told = dict[str, Any]


def chosen(only: str) -> list[Fault]:
    """The faults that are named, of those that this machine lets happen."""
    parts = [part.strip() for part in only.split(",") if part.strip()]
    if unknown := [part for part in parts if not any(part in fault.name for fault in FAULTS)]:
        sys.exit(f"--only {unknown[0]!r} is part of no fault's name; they are: {', '.join(fault.name for fault in FAULTS)}")
    wanted = [fault for fault in FAULTS if not parts or any(part in fault.name for part in parts)]
    for fault in wanted:
        if not fault.possible():
            print(f"left out, for this machine does not let it happen: {fault.name}", flush=True)
    return [fault for fault in wanted if fault.possible()]


def line(number: int, done: Strike) -> str:
    """A strike as one line."""
    state = "as undisturbed" if done.sound else done.problem or f"OTHER RESULTS: {', '.join(done.differs)}"
    at = f"{done.on_record} epochs on record, {done.again} trained again"
    return f"{number:3d}. {done.fault}, seed {done.seed}: exit {done.code}, {at}, {state} ({done.seconds:.1f} s)"


def strikes(faults: Sequence[Fault], count: int, seed: int, at_once: int, root: Path) -> list[Strike]:
    """Each fault in turn, so many strikes in all, in an order that the seed decides."""
    own, done = session(root, faults), list[Strike]()
    order = random.Random(seed).sample(faults, len(faults))
    todo = [(FAULTS.index(order[n % len(order)]), seed + n, own, n < len(order) < count / 2) for n in range(count)]
    with multiprocessing.get_context("fork").Pool(at_once) as pool:
        for number, found in enumerate(pool.imap_unordered(_strike, todo), 1):
            print(line(number, found), flush=True)
            done.append(found)
    return sorted(done, key=lambda found: found.seed)


def _strike(what: tuple[int, int, Any, bool]) -> Strike:
    index, seed, own, minute = what
    return strike(FAULTS[index], seed, own, minute=minute)


def matrix(told: Told) -> str:
    """The table: fault, what the user sees, what is lost, whether the weights are the same."""
    by_fault = collections.defaultdict(list)
    for found in told["strikes"]:
        by_fault[found["fault"]].append(found)
    cures = {fault.name: fault.cure for fault in FAULTS}
    heads = ("fault", "strikes", "what the user sees", "what the user does", "epochs on record trained again", "bit for bit as undisturbed")
    rows = [f"| {' | '.join(heads)} |", f"|{' -- |' * len(heads)}"]
    for fault in [fault.name for fault in FAULTS if fault.name in by_fault]:
        found = by_fault[fault]
        same = sum(not one["differs"] and not one["problem"] for one in found)
        lost = collections.Counter(one["again"] for one in found)
        shown = ", ".join(f"{epochs} ({times} times)" if len(lost) > 1 else str(epochs) for epochs, times in sorted(lost.items()))
        rows.append(f"| {fault} | {len(found)} | {_seen(found)} | {cures[fault]} | {shown} | {same} of {len(found)} |")
    wrong = [one for one in told["strikes"] if one["differs"] or one["problem"]]
    count, minutes = len(told["strikes"]), told["seconds"] / 60
    summary = f"{count} strikes, {len(wrong)} of them wrong, in {minutes:.0f} minutes ({told['machine']}): `{told['command']}`"
    return "\n".join([summary, "", *rows]) + "\n"


def _seen(found: Sequence[Told]) -> str:
    """What was said most often, less what differs between two strikes."""
    said = collections.Counter("<br>".join(map(_general, one["saw"])) for one in found)
    ((most, _),) = said.most_common(1)
    return most or "nothing"


def _general(text: str) -> str:
    text = re.sub(r"^[WE]\d+ \S+ \d+ torch/\S+ ", "torchrun: ", text)
    text = re.sub(r"\bruns? \d+(, \d+)*", "runs N", text)
    text = re.sub(r"(?<![\w.])(?<!: -)\d+\b", "N", text)
    return f"`{text.replace('|', BAR)}`"


def page(out: Path) -> Path:
    """Where the table of a file of strikes stands."""
    return out.with_suffix(".md")


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Strike trainings with faults, and make a matrix of what became of them.")
    parser.add_argument("--count", type=int, default=100, help="how many strikes")
    parser.add_argument("--seed", type=int, default=0, help="of the first strike; the others follow")
    parser.add_argument("--only", default="", help="faults of which the name has one of these in it, with commas between")
    parser.add_argument("--at-once", type=int, default=2, help="strikes beside each other; one a core")
    parser.add_argument("--out", type=Path, help="a JSON file of the strikes; the matrix stands beside it")
    parser.add_argument("--page", type=Path, help="make the matrix of such a file again, and strike nothing")
    given = parser.parse_args(words)
    if given.page:
        page(given.page).write_text(matrix(json.loads(given.page.read_text())))
        return 0
    began, root = time.monotonic(), Path(tempfile.mkdtemp(prefix="torture-"))
    done = strikes(chosen(given.only), given.count, given.seed, given.at_once, root)
    command = " ".join(["python tests/torture.py", *(f"'{word}'" if " " in word else word for word in words)])
    told = {
        "command": command,
        "machine": processor(),
        "seconds": round(time.monotonic() - began, 1),
        "strikes": [found.record() for found in done],
    }
    if given.out:
        given.out.write_text(json.dumps(told, indent=1) + "\n")
        page(given.out).write_text(matrix(told))
    print(matrix(told))
    if wrong := [found for found in done if not found.sound]:
        print(f"{len(wrong)} strikes are wrong; their folders stay in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
