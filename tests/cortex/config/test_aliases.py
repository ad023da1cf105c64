"""Aliases of models.toml: what they stand for, and mistakes in their parameters."""

from __future__ import annotations

import math
from datetime import date
from typing import Any

import msgspec
import pytest

from cortex.config.aliases import Alias, Rewrite
from cortex.config.catalogue import Catalogue
from cortex.config.diff import difference
from cortex.config.settings import CortexConfig
from cortex.workers.messages import CatalogueChanged
from shared.settings import SettingsError, validate_settings

FAST = {"model": "a", "set": {"chat_template_kwargs": {"enable_thinking": False}}}
VARIANTS = [{"quant": "fp8"}, {"quant": "awq"}]


def catalogue(**aliases: Any) -> Catalogue:
    return validate_settings(Catalogue, {"models": [{"id": "a", "variants": VARIANTS}], "aliases": aliases}, source="x")


def test_short_and_long_form_are_the_same() -> None:
    assert catalogue(x="a") == catalogue(x={"model": "a"})
    assert catalogue(x="a").rewrites["x"] == Rewrite("a", "a")


def test_parameters_hold_for_variants_of_the_alias() -> None:
    """Each name leads to its variant; all of them have the alias's parameters, and the model's id for the engine."""
    found = catalogue(fast=FAST, plain="a", exact={**FAST, "model": "a@fp8"})
    edits = found.aliases["fast"].edits("a")
    assert {name: found.rewrites[name] for name in ("fast", "fast@awq", "exact")} == {
        "fast": Rewrite("a", "a", edits),
        "fast@awq": Rewrite("a", "a@awq", edits),
        "exact": Rewrite("a", "a@fp8", edits),
    }
    assert {name for name, each in found.rewrites.items() if each.edits is None} == {
        *("a@fp8", "a@awq", "plain", "plain@fp8", "plain@awq")
    }
    assert found.alias_of("fast@awq") is found.alias_of("fast") is found.aliases["fast"]
    assert [found.alias_of(name) for name in ("a", "a@fp8", "fast@int4", "b")] == [None] * 4


def test_parameters_reach_the_workers() -> None:
    """Whatever JSON has, also what the messages' own format has not."""
    parameters = {"set": {"seed": 1 << 70, "k": {"x": [1.5, "ü", {}], "y": True}}, "drop": ["k.z", "n"]}
    aliases = dict(catalogue(x={"model": "a", **parameters}).rewrites)
    sent = msgspec.msgpack.encode(CatalogueChanged(["a"], aliases))
    assert msgspec.msgpack.decode(sent, type=CatalogueChanged).aliases == aliases


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"set": {"model": "b"}}, "aliases.x.set: 'model' cannot be changed: the alias itself says which"),
        ({"default": {"stream": True}}, "aliases.x.default: 'stream' cannot be changed: only the client"),
        ({"drop": ["stream"]}, "'stream' cannot be changed"),
        ({"drop": ["a..b"]}, "'a..b' must be a key, or keys of nested tables joined by dots"),
        ({"drop": ["a", "a"]}, "drop: 'a' is in it twice, or with a key of the same table"),
        ({"drop": ["a", "a.b"]}, "drop: 'a.b' is in it twice"),
        ({"drop": ["a.b", "a"]}, "drop: 'a' is in it twice"),
        ({"drop": "a"}, "aliases.x.drop = 'a': "),
        ({"set": {"n": 1}, "default": {"n": 2}}, "'n' is in both set and default"),
        ({"set": {"k": {"n": 1}}, "default": {"k": {"n": 2}}}, "'k.n' is in both set and default"),
        ({"set": {"k": {"n": 1}}, "default": {"k": 2}}, "'k' is in both set and default"),
        ({"set": {"k": {"n": 1}}, "drop": ["k"]}, "'k' is in both set and drop"),
        ({"default": {"k": {"n": 1}}, "drop": ["k.n"]}, "'k.n' is in both default and drop"),
        ({"set": {"k": [{"n": math.inf}]}}, "k.n: inf is not a number of JSON"),
        ({"sets": {}}, "aliases.x.sets: unknown key"),
    ],
)
def test_mistakes_are_named(parameters: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        catalogue(x={"model": "a", **parameters})
    assert expected in str(caught.value)


def test_dates_are_not_json() -> None:
    with pytest.raises(SettingsError, match="k: JSON has no date: write it as a string"):
        catalogue(x={"model": "a", "set": {"k": date(2026, 1, 1)}})


def test_target_is_required() -> None:
    with pytest.raises(SettingsError, match=r"aliases\.x\.model: required"):
        catalogue(x={"set": {"n": 1}})


def test_reload_tells_what_changed() -> None:
    config = CortexConfig()

    def lines(before: Any, after: Any) -> tuple[str, ...]:
        return difference(config, catalogue(x=before), config, catalogue(x=after)).lines

    assert lines("a", "a@fp8") == ("alias x: a -> a@fp8",)
    assert lines({"model": "a", "drop": ["n"]}, {"model": "a", "drop": ["n", "k"]}) == (
        "alias x: drop ['n'] -> ['n', 'k']",
    )
    assert lines("a", {"model": "a"}) == ()
    assert "alias x: a -> {" in lines("a", FAST)[0]


def test_without_parameters_only_the_name_changes() -> None:
    assert Alias(model="a").edits("a") is None
