"""Put committed results into the README: what stands between ``<!-- include FILE -->`` and ``<!-- end -->`` is FILE, whole.

python docs/include.py           # rewrite
python docs/include.py --check   # exit 1 when something is stale
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- include (?P<file>\S+) -->\n.*?<!-- end -->", re.DOTALL)


def included(text: str) -> str:
    """The text with every block filled from its file."""

    def fill(block: re.Match[str]) -> str:
        return f"<!-- include {block['file']} -->\n{(ROOT / block['file']).read_text().strip()}\n<!-- end -->"

    return BLOCK.sub(fill, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    fresh = included(readme.read_text())
    if "--check" in sys.argv:
        sys.exit("README.md is stale: python docs/include.py" if fresh != readme.read_text() else 0)
    readme.write_text(fresh)
