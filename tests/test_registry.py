"""The registry: names once, in order, and a wrong one answered with the right one."""

from __future__ import annotations

import pytest

from flowdistill.checks import UserError
from flowdistill.registry import Registry


@pytest.fixture
def tools() -> Registry[str]:
    registry: Registry[str] = Registry("tool")
    for name in ("hammer", "anvil", "tongs"):
        registry.register(name)(f"a {name}")
    return registry


def test_entry_by_name(tools: Registry[str]) -> None:
    assert tools["anvil"] == "a anvil"


def test_register_gives_the_entry_back() -> None:
    entry = object()
    assert Registry("tool").register("hammer")(entry) is entry


def test_registering_twice_fails_and_keeps_the_first(tools: Registry[str]) -> None:
    with pytest.raises(ValueError, match="two entries named 'anvil' in the registry of tools"):
        tools.register("anvil")("another")
    assert tools["anvil"] == "a anvil"
    assert list(tools).count("anvil") == 1


def test_iteration_is_in_order_of_registration(tools: Registry[str]) -> None:
    assert list(tools) == ["hammer", "anvil", "tongs"]


def test_only_registered_names_are_in_it(tools: Registry[str]) -> None:
    assert "tongs" in tools
    assert "tong" not in tools
    assert 3 not in tools


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("hamer", "unknown tool 'hamer': did you mean 'hammer'?"),
        ("tong", "unknown tool 'tong': did you mean 'tongs'?"),
        ("zzz", "unknown tool 'zzz': choose from: hammer, anvil, tongs"),
        ("", "unknown tool '': choose from: hammer, anvil, tongs"),
    ],
)
def test_unknown_name(tools: Registry[str], given: str, answer: str) -> None:
    with pytest.raises(UserError) as error:
        tools[given]
    assert str(error.value) == answer


def test_registries_do_not_share_names(tools: Registry[str]) -> None:
    assert list(Registry("tool")) == []
    assert list(tools) != []
