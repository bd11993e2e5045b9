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
from flowdistill.methods import METHODS, Method, standardise  # noqa: E402
from flowdistill.types import DataSpec  # noqa: E402

PAGE = ROOT / "docs" / "METHODS.md"
CIFAR100 = DataSpec("cifar100", 50_000, 100, 3, 32, 32)

HEAD = """# Methods

Written by `python docs/methods.py` from the registry and the references in `tests/reference/`; a test fails when it is stale.
Every method here went through every check of [VERIFICATION.md](VERIFICATION.md): its formula against slow loops in float64, its
promises, gradients, half precision, extremes, torch.compile, and the expected values of the formula sheet (the last column counts
them). Defaults say whose they are. A weight means something together with the reduction of its term alone.
"""

VERSIONS = """## Versions

A version rises when the number for an ordinary pair changes by more than rounding. It is part of a run's fingerprint: what was trained
before is not taken for what would be trained now.

| what | version | what changed |
|---|---|---|
"""
CHANGED = (
    (
        "`fitnets`",
        2,
        "The hint is the second stage. It was the middle one, of four stages the third; of up to three it is the same, and the version "
        "stays 1.",
    ),
    ("`mgd`", 2, "The masks depend on the seed."),
    (
        "the taps of WRNs",
        2,
        "`stage1`, ... are the plain sums at the ends of the stages and `stem` is the plain first convolution, as the authors of `at`, "
        "RepDistiller and mdistiller have it. What stood under these names, after the normalisation and ReLU of the layer that follows, is "
        "`stage1.post`, ... and `stem.post`. `ab`, `ickd`, `simkd` and `srrl` go on with that, and `ofd` with `stage1.pre`, ....",
    ),
)

LEFT_OUT = """## Left out

| method | why |
|---|---|
| `fcfd` | partly unverified: the weights of the paper's equation are not known here, and there is no expected value |
| `wkd` | its costs between classes come from a file of training features or the teacher's head, and there is no expected value |
| Sobolev, BSS, LwM, AFD | in older collections; they need gradients by the image, adversarial images or a second network |
"""


def built(name: str) -> Method:
    """With its defaults, for a pair that every method takes."""
    resolved = methods.resolve(name, {}, {})
    student = models.spec(resolved.shipped_model("resnet20", "resnet20"), CIFAR100)
    return methods.build(resolved, student=student, teacher=models.spec("resnet20", CIFAR100), data=CIFAR100)


TOLD = {"head": "classifier", "norms": "normalisations", "class_means": "class means"}


def wants(method: Method) -> str:
    """Of the teacher."""
    parts = [*sorted(method.needs.teacher)] + ["embedding"] * method.needs.embedding + ["logits"] * method.needs.logits
    parts += [TOLD[fact] for fact in sorted(method.needs.context) if fact in TOLD]
    parts += [fact.replace("_", " ") for fact in sorted(method.needs.context)]
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
    changed = "".join(f"| {what} | {version} | {how} |\n" for what, version, how in CHANGED)
    return "\n".join([HEAD, "\n".join(table), "", *cards, standardised(), VERSIONS + changed, LEFT_OUT])


def prose(documented: object) -> str:
    """Its docstring as one paragraph."""
    return " ".join((inspect.getdoc(documented) or "").split())


def card(name: str, method: Method) -> str:
    """One method."""
    cls: Any = type(method)
    module = sys.modules[cls.__module__]
    paper = cls.paper
    defaults = prose(cls.default_weights)
    options = ", ".join(f"{key}={value!r}" for key, value in cls.Options()) or "none"
    kept = (("0 at a match", cls.vanishes_at_match), ("a sample at a time", cls.per_sample), ("no labels", not cls.uses_labels))
    promises = [word for word, is_kept in kept if is_kept]
    return "\n".join(
        [
            f"## {name}",
            "",
            prose(module),
            "",
            f"- {paper.authors}: [{paper.title}]({paper.url}). {paper.venue} {paper.year}.",
            f"- Options: {options}. Weight: {defaults}",
            f"- Promises: {', '.join(promises) or 'none'}. Version {cls.version}.",
            "",
        ]
    )


def standardised() -> str:
    """What ``ls:`` puts before a method on logits."""
    wrapped: Any = [methods.get(f"{standardise.PREFIX}{name}") for name in standardise.BY_AUTHORS]
    temperatures = ", ".join(f"`{cls.name}` T={cls.Options().T:g}" for cls in wrapped if "T" in cls.Options.model_fields)
    paper = wrapped[0].paper
    met = sum(key.startswith("ls+") for key in test_golden.FORMULAS)
    return "\n".join(
        [
            "## ls:",
            "",
            prose(standardise),
            "",
            f"- {paper.authors}: [{paper.title}]({paper.url}). {paper.venue} {paper.year}.",
            f"- Before any method that compares the logits of two networks: `ls:kd`, `ls:dist`. Expected values met: {met}.",
            f"- Options: those of the method, by the authors' defaults where they wrapped it: {temperatures}. Weight: "
            f"{prose(standardise.Standardised.default_weights)}",
            f"- Version {standardise.VERSION}, beside that of the method.",
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
