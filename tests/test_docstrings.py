"""The examples in docstrings are run, and give what they say."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import pytest

from flowdistill.methods.attention import attention_loss
from flowdistill.methods.fsp import fsp_loss, fsp_matrix
from flowdistill.methods.kd import kd_loss

EXAMPLES = (attention_loss, fsp_loss, fsp_matrix, kd_loss)


@pytest.mark.parametrize("function", EXAMPLES, ids=lambda function: function.__name__)
def test_example_gives_what_it_says(function: Callable[..., object]) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs={})
    talk: list[str] = []
    tried = doctest.DocTestRunner(verbose=False).run(example, out=talk.append)
    assert tried.attempted > 1
    assert "".join(talk) == ""
