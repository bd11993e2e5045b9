"""The tutorial's commands run as they stand, each with few epochs and images, and print what the page shows of them."""

from __future__ import annotations

import re
import shlex
from contextlib import closing
from pathlib import Path

from helpers.command import Said, command

from flowdistill.ledger import Ledger

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "TUTORIAL.md").read_text()


def test_every_command_runs(tmp_path: Path) -> None:
    """Those that train do so for one epoch of a hundred images."""
    words = [shlex.split(line)[1:] for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert [line[0] for line in words] == ["train", "distill", "table", "show", "card", "export"]
    said: dict[str, Said] = {}
    for line in words:
        if "--epochs" in line:
            line[line.index("--epochs") + 1] = "1"
            line += ["--set", "data.limit_train=100"]
        said[line[0]] = command(tmp_path, *line)
        assert said[line[0]].code == 0, said[line[0]].err
    with closing(Ledger(tmp_path / "runs")) as ledger:
        assert [(run.method, run.seed) for run in ledger.runs()] == [
            ("base", 100),
            *((method, seed) for method in ("base", "kd", "fsp") for seed in range(3)),
        ]
    table = PAGE[PAGE.index("| method |") : PAGE.index("![Each run")].splitlines()
    assert table[0] in said["table"].out, "the columns that the page explains"
    assert {line.split(" | ")[0] for line in said["table"].out.splitlines() if line.startswith("| ")} == {
        line.split(" | ")[0] for line in table if line.startswith("| ")
    }
    assert re.search(r"epoch +phase +lr +acc +task +kd +seconds", said["show"].out)
    assert re.search(r"Of its teacher the student has [\d.]+ % of the parameters, [\d.]+ % of the MACs", said["card"].out)
    for picture in ("summary.svg", "curves.svg"):
        assert "<svg" in (tmp_path / picture).read_text()
    taps = [line.strip() for line in PAGE.splitlines() if re.match(r"    +(taps|stage\d|stem)\b", line)]
    assert len(taps) == 5
    assert all(line in said["distill"].err for line in taps)


def test_its_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\((pictures/[^)]+)\)", PAGE)
    assert len(pictures) == 2
    assert all((DOCS / picture).read_text().startswith("<svg") for picture in pictures)


def test_the_glossary_explains_what_pages_name_and_is_in_order() -> None:
    text = (DOCS / "GLOSSARY.md").read_text()
    words = re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)[1:]
    words.remove("---") if "---" in words else None
    assert words == sorted(words, key=str.lower)
    entries = {name for word in words for name in word.split(", ")}
    assert {"tap", "cohort", "protocol", "holdout", "ledger", "fingerprint"} <= entries
    for used in re.findall(r"(?<!\*)\*([\w ]+)\*(?!\*)", text):
        assert used == "italics" or {used, used.removesuffix("s"), used.removesuffix("es")} & entries, used
