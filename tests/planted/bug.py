"""What a planted bug is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Bug:
    """A mistake, where it goes, and the check that must notice it.

    Attributes:
        where, attribute: what the mistake takes the place of: a name of a module or class, or a key of a dictionary.
        mistake: the function or class with the mistake in it; its name is the bug's, its docstring says who ships it or what it does.
        check: a test function of this suite.
        case: the parameters that the check gets; the rest of its arguments are fixtures.
        refusal: words of the package's own RuntimeError, where a guard speaks before an assertion can.
    """

    where: Any
    attribute: str
    mistake: Callable[..., Any]
    check: Callable[..., None]
    case: Mapping[str, Any]
    refusal: str = ""

    @property
    def name(self) -> str:
        return self.mistake.__name__.replace("_", " ")

    @property
    def why(self) -> str:
        return " ".join((self.mistake.__doc__ or "").split())

    @property
    def check_name(self) -> str:
        return f"{self.check.__module__}.py::{self.check.__name__}"

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        """Put the mistake in; a module's function also wherever else it was imported by its name."""
        if isinstance(self.where, dict):
            patch.setitem(self.where, self.attribute, self.mistake)
            return
        original = getattr(self.where, self.attribute)
        patch.setattr(self.where, self.attribute, self.mistake)
        for name, module in list(sys.modules.items()):
            if name.startswith(("flowdistill", "helpers.", "test_")) and vars(module).get(self.attribute) is original:
                patch.setattr(module, self.attribute, self.mistake)


BUGS: list[Bug] = []


def bug(
    where: Any, attribute: str, check: Callable[..., None], case: Mapping[str, Any] | None = None, refusal: str = ""
) -> Callable[..., Any]:
    """Decorator that files a mistake."""

    def file(mistake: Callable[..., Any]) -> Callable[..., Any]:
        BUGS.append(Bug(where, attribute, mistake, check, case or {}, refusal))
        return mistake

    return file
