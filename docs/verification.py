"""Write what the tests' own lists prove as tables: results/planted-bugs.md and results/golden-values.md.

python docs/verification.py   # rewrite; then python docs/include.py
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import test_golden  # noqa: E402
from planted import BUGS  # noqa: E402

BAR = "\\|"  # in a cell of Markdown
SMALL = 1e-12  # below this the last bits of a machine decide


def planted_bugs() -> str:
    """Every planted bug with the check that catches it."""
    rows = [f"| {bug.name} | {bug.why.replace('|', BAR)} | `{bug.check_name}` |" for bug in BUGS]
    return (
        "\n".join([f"{len(BUGS)} bugs, each caught.\n", "| bug | what it does, and who ships it | caught by |", "| -- | -- | -- |", *rows])
        + "\n"
    )


def golden_values() -> str:
    """Every golden value, computed; errors as the power of ten above them, the same on every machine."""
    rows = []
    for key, formula in test_golden.FORMULAS.items():
        expected, computed = test_golden.GOLDEN[key]["value"], formula().item()
        error = abs(computed - expected) / abs(expected)
        bound = "1e-12" if error < SMALL else f"1e{math.ceil(math.log10(error)):+03d}"
        rows.append(f"| {key} | {expected:.8g} | {computed:.8g} | < {bound} |")
    return "\n".join(["| key | expected | computed | relative error |", "| -- | -- | -- | -- |", *rows]) + "\n"


PAGES = {"planted-bugs.md": planted_bugs, "golden-values.md": golden_values}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "results" / name).write_text(page())
