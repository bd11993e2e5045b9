"""Write docs/METHODS.md from the registry and the references of the test suite.

python docs/methods.py           # rewrite
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import test_golden  # noqa: E402

from flowdistill import methods, models  # noqa: E402
from flowdistill.methods import METHODS, Method  # noqa: E402
from flowdistill.taps import DataSpec  # noqa: E402

PAGE = ROOT / "docs" / "METHODS.md"
CIFAR100 = DataSpec("cifar100", 50_000, 100, 3, 32, 32)

HEAD = """# Methods

Written by `python docs/methods.py` from the registry and the references in `tests/reference/`; a test fails when it is stale.
Every method here went through every check of [VERIFICATION.md](VERIFICATION.md): its formula against slow loops in float64, its
promises, gradients, half precision, extremes, torch.compile, and the expected values of the formula sheet (the last column counts
them). Defaults say whose they are. A weight means something together with the reduction of its term alone.
"""

LEFT_OUT = """## Left out

| method | why |
|---|---|
| `fcfd` | partly unverified: the weights of the paper's equation are not known here, and there is no expected value |
| `wkd` | its costs between classes come from a file of training features or the teacher's head, and there is no expected value |
| Sobolev, BSS, LwM, AFD | in older collections; they need gradients by the image, adversarial images or a second network |
"""


def built(name: str) -> Method:
    """With its defaults, for a pair that every method takes."""
    settled = methods.settle(name, {}, {})
    student = models.spec(settled.trained_model("resnet20", "resnet20"), CIFAR100)
    return methods.build(settled, student=student, teacher=models.spec("resnet20", CIFAR100), data=CIFAR100)


TOLD = {"head": "classifier", "norms": "normalisations", "class_means": "class means"}


def wants(method: Method) -> str:
    """Of the teacher."""
    parts = [*sorted(method.needs.teacher)] + ["embedding"] * method.needs.embedding + ["logits"] * method.needs.logits
    parts += [TOLD[fact] for fact in sorted(method.needs.facts) if fact in TOLD]
    parts += [fact.replace("_", " ") for fact in sorted(method.needs.facts)]
    return ", ".join(parts) or "nothing"


def weights(method: Method) -> str:
    """Its default weights."""
    return ", ".join(f"{term} {weight:g}" for term, weight in type(method).default_weights(method.options).items()) or "-"


def page() -> str:
    """The whole page."""
    names = [name for name in METHODS if name != "base"]
    table = ["| name | paper | compares | of the teacher | default weight | expected values |", "|---|---|---|---|---|---|"]
    cards = []
    for name in names:
        method, paper = built(name), METHODS[name].paper
        met = sum(test_golden.GOLDEN[key]["method"] == name for key in test_golden.FORMULAS)
        table.append(
            f"| [`{name}`](#{name}) | {paper.authors.split(',')[0]} et al., {paper.venue} {paper.year} | {type(method).kind} | "
            f"{wants(method)} | {weights(method)} | {met} |"
        )
        cards.append(card(name, method))
    return "\n".join([HEAD, "\n".join(table), "", *cards, LEFT_OUT])


def card(name: str, method: Method) -> str:
    """One method."""
    cls: Any = type(method)
    module = sys.modules[cls.__module__]
    paper = cls.paper
    defaults = " ".join((inspect.getdoc(cls.default_weights) or "").split())
    options = ", ".join(f"{key}={value!r}" for key, value in cls.Options().model_dump().items()) or "none"
    kept = (("0 at a match", cls.vanishes_at_match), ("a sample at a time", cls.per_sample), ("no labels", not cls.uses_labels))
    promises = [word for word, is_kept in kept if is_kept]
    return "\n".join(
        [
            f"## {name}",
            "",
            " ".join((inspect.getdoc(module) or "").split()),
            "",
            f"- {paper.authors}: [{paper.title}]({paper.url}). {paper.venue} {paper.year}.",
            f"- Options: {options}. Weight: {defaults}",
            f"- Promises: {', '.join(promises) or 'none'}. Version {cls.version}.",
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
