"""Put committed results into README.md and docs/*.md: what stands between ``<!-- include FILE -->`` and ``<!-- end -->`` is FILE, whole.
Code stands there as a block of its language.

python docs/include.py           # rewrite
python docs/include.py --check   # exit 1 when something is stale
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {".py": "python", ".toml": "toml"}
BLOCK = re.compile(r"<!-- include (?P<file>\S+) -->\n.*?<!-- end -->", re.DOTALL)


def included(text: str) -> str:
    """The text with every block filled from its file."""

    def fill(block: re.Match[str]) -> str:
        file = ROOT / block["file"]
        text, language = file.read_text().strip(), LANGUAGES.get(file.suffix)
        shown = f"```{language}\n{text}\n```" if language else text
        return f"<!-- include {block['file']} -->\n{shown}\n<!-- end -->"

    return BLOCK.sub(fill, text)


if __name__ == "__main__":
    stale = [page for page in PAGES if included(page.read_text()) != page.read_text()]
    if "--check" in sys.argv and stale:
        sys.exit(f"{', '.join(page.name for page in stale)} is stale: python docs/include.py")
    for page in stale:
        page.write_text(included(page.read_text()))
