"""Budgets, expiry, limits and provisioned keys, as people write them."""

from __future__ import annotations

import hashlib
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cortex.accounts.keys.api_key import SECRET_PREFIX, digest_of, new_secret, prefix_of
from cortex.accounts.keys.key_table import key_table
from cortex.accounts.keys.key_terms import (
    KeyTerms,
    budget_text,
    parse_budget,
    parse_expiry,
    parse_model_limits,
)
from cortex.accounts.keys.provisioned import keys_in_environment, keys_in_file
from cortex.accounts.keys.unmatched_globs import unmatched_globs
from cortex.accounts.limits.terms import Budget, Limits
from cortex.config.catalogue import Catalogue
from shared.settings import SettingsError

SECRET = "sk-very-secret-0123456789"
NOW = datetime(2026, 11, 29, 12, tzinfo=timezone.utc).timestamp()


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("20EUR/month", Budget(20, "EUR", "month")),
        ("0.5 USD / day", Budget(0.5, "USD", "day")),
        ("1000000tokens/day", Budget(1e6, "tokens", "day")),
        ("1 token/hour", Budget(1, "tokens", "hour")),
        ("5EUR/7d", Budget(5, "EUR", 7 * 86400.0)),
        ("5EUR/1h30m", Budget(5, "EUR", 5400.0)),
        ("3EUR/week", Budget(3, "EUR", "week")),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    """Money or tokens, in a window of the calendar or a rolling one; written back they mean the same."""
    assert parse_budget(text) == budget
    assert parse_budget(budget_text(budget)) == budget


@pytest.mark.parametrize("text", ["", "20", "20EUR", "EUR/day", "-1EUR/day", "20euros/day", "20EUR/year", "1EUR/5s"])
def test_wrong_budgets(text: str) -> None:
    """The error quotes the text."""
    with pytest.raises(ValueError, match="invalid budget") as caught:
        parse_budget(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "secs"),
    [
        ("30d", 30 * 86400),
        ("90m", 5400),
        ("2026-11-30", 43200),
        (date(2026, 11, 30), 43200),
        ("2026-11-29T13:00:00Z", 3600),
        ("2026-11-29T14:30:00+01:00", 5400),
        (datetime(2026, 11, 29, 13), 3600),  # noqa: DTZ001 - as TOML reads a time without an offset
    ],
)
def test_expiry(value: str | date, secs: float) -> None:
    """After a time from now, or at a moment in UTC."""
    assert parse_expiry(value, NOW) == NOW + secs


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("soon", "invalid time 'soon': write it as 30d, 2027-01-31 or 2027-01-31T12:00:00Z"),
        ("2026-11-28", "is in the past"),
    ],
)
def test_wrong_expiry(value: str, reason: str) -> None:
    """A key that has expired when it is made is a mistake."""
    with pytest.raises(ValueError, match=reason):
        parse_expiry(value, NOW)


def test_model_limits() -> None:
    """The command line's form; the glob may have colons."""
    assert parse_model_limits("org/big:fast*:rpm=5,tpm=1000, parallel=2,budget=5EUR/day") == (
        "org/big:fast*",
        {"rpm": 5, "tpm": 1000, "parallel": 2, "budget": "5EUR/day"},
    )


@pytest.mark.parametrize(
    "text", ["org/*", "org/*:", ":rpm=5", "a:rpm", "a:rpm=x", "a:rmp=5", "a:rpm=1,rpm=2", "a:rpm=-1"]
)
def test_wrong_model_limits(text: str) -> None:
    """The error quotes the text."""
    with pytest.raises(ValueError, match="invalid limit"):
        parse_model_limits(text)


def test_secrets_are_random_and_recognisable() -> None:
    """256 bits behind a known prefix; what is shown of one is far from enough to guess it."""
    one, other = new_secret(), new_secret()
    assert one != other
    assert len(one) == len(SECRET_PREFIX) + 43
    assert one.startswith(prefix_of(one))
    assert len(prefix_of(one)) == len(SECRET_PREFIX) + 4
    assert prefix_of("short") == ""


def test_expired_keys_are_unknown() -> None:
    """Expiry holds to the second, without any message from the control."""
    (key,) = keys_in_environment({"CORTEX_KEYS": f'[[keys]]\nname = "a"\nkey = "{SECRET}"\nexpires = 2020-01-01'})
    table = key_table([key])
    assert table.find(SECRET.encode()) is None
    assert not table.empty


def test_keys_of_a_file(tmp_path: Path) -> None:
    """With the key itself or its SHA-256, and everything that a key may have."""
    (tmp_path / "keys.toml").write_text(
        f"""
        [[keys]]
        name = "alice"
        key = "{SECRET}"
        role = "operator"
        models = ["org/*"]
        priority = 5
        weight = 2
        rpm = 60
        budget = ["20EUR/month", "1000tokens/7d"]
        expires = 2099-01-31
        limits = {{ "org/big*" = {{ tpm = 1000, budget = "1EUR/day" }} }}

        [[keys]]
        name = "bob"
        sha256 = "{hashlib.sha256(b"bob's").hexdigest().upper()}"
        """,
        encoding="utf-8",
    )
    alice, bob = keys_in_file(tmp_path / "keys.toml")
    assert alice.caller.limited
    assert (alice.id, alice.role, alice.models, alice.priority, alice.weight) == (
        "file:alice", "operator", ("org/*",), 5, 2.0,
    )  # fmt: skip
    assert alice.limits.total == Limits(
        rpm=60, budgets=(Budget(20, "EUR", "month"), Budget(1000, "tokens", 7 * 86400.0))
    )
    assert alice.limits.by_models == {"org/big*": Limits(tpm=1000, budgets=(Budget(1, "EUR", "day"),))}
    assert alice.expires_at == datetime(2099, 1, 31, tzinfo=timezone.utc).timestamp()
    table = key_table([alice, bob])
    assert table.find(SECRET.encode()) == (alice.caller, False)
    assert table.find(b"bob's") == (bob.caller, True)
    assert not bob.caller.limited
    assert table.find(b"") is None
    assert table.find("ä".encode()) is None


def test_keys_of_the_environment() -> None:
    """Lines of name and key are enough where a key has no other field."""
    digest = digest_of("other").hex()
    keys = keys_in_environment({"CORTEX_KEYS": f"alice:{SECRET}\n\n# a comment\n bob:sha256:{digest}\n"})
    assert [(key.id, key.name, key.digest) for key in keys] == [
        ("env:alice", "alice", digest_of(SECRET)),
        ("env:bob", "bob", digest_of("other")),
    ]
    assert keys_in_environment({}) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f'[[keys]]\nname = "a"\nkey = "{SECRET}"\nrmp = 5', "keys[0] (a): rmp: unknown key"),
        (f'[[keys]]\nkey = "{SECRET}"', "keys[0]: name: required, but missing"),
        (f'[[keys]]\nname = "{SECRET}"\nkey = 5', "keys[0]: key: must be a string"),
        (f'[[keys]]\nname = "a"\nkey = "{SECRET} "', "keys[0] (a): key: must be 1 to 256 visible ASCII characters"),
        ('[[keys]]\nname = "a"', "keys[0] (a): must have either key or sha256"),
        (f'[[keys]]\nname = "a"\nkey = "{SECRET}"\nsha256 = "{"0" * 64}"', "must have either key or sha256"),
        (f'[[keys]]\nname = "a"\nsha256 = "{SECRET}"', "keys[0] (a): sha256: must be 64 hexadecimal digits"),
        (f'[[keys]]\nname = "a b"\nkey = "{SECRET}"', "name: must start with a letter or digit"),
        (f'[[keys]]\nname = "a"\nkey = "{SECRET}"\nrole = "root"', "role: must be 'user', 'viewer'"),
        (f'[[keys]]\nname = "a"\nkey = "{SECRET}"\nrpm = "5"', "rpm: must be a whole number"),
        (f'[[keys]]\nname = "a"\nkey = "{SECRET}"\nbudget = "5"', "budget: invalid budget '5'"),
        (
            f'[[keys]]\nname = "a"\nkey = "{SECRET}"\nexpires = "30d"',
            "expires: invalid time '30d': write it as 2027-01-31 or ",
        ),
        (f'[[keys]]\nname = "a"\nkey = "{SECRET}"\nbudget = ["1EUR/day", "2EUR/day"]', "the same unit and window"),
        (f'[[keys]]\nname = "a"\nkey = "{SECRET}"\n[[keys]]\nname = "b"\nkey = "{SECRET}"', "same key: a, b"),
        (f'[[keys]]\nname = "a"\nkey = "{SECRET}"\n[[keys]]\nname = "a"\nkey = "x"', "same name: a, a"),
        (f'[[keys]]\nname = "a"\nkey = {SECRET}', "not valid TOML"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}"', "key: unknown key, only [[keys]] may be here"),
    ],
)
def test_wrong_entries(tmp_path: Path, text: str, problem: str) -> None:
    """The error names the source and the entry, and never has a key in it."""
    path = tmp_path / "keys.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as in_file:
        keys_in_file(path)
    with pytest.raises(SettingsError) as in_environment:
        keys_in_environment({"CORTEX_KEYS": text})
    for caught, where in ((in_file, str(path)), (in_environment, "environment CORTEX_KEYS")):
        assert problem in str(caught.value)
        assert str(caught.value).startswith(where)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "terms",
    [
        {"rpm": 10**30},
        {"limits": {"*": {"tpm": 2**64}}},
        {"budget": f"1{'0' * 400}EUR/day"},
        {"weight": 1e-320},
        {"models": ["a\0"]},
        {"limits": {"a\0": {"rpm": 1}}},
        {"limits": {"\ud800": {"rpm": 1}}},
        {"models": ["a" * 257]},
    ],
    ids=str,
)
def test_terms_that_messages_or_databases_cannot_hold(terms: dict[str, Any]) -> None:
    """The key's requests would never be admitted, and with PostgreSQL those beside them neither."""
    with pytest.raises(ValidationError):
        KeyTerms.model_validate({"name": "a", **terms})


def test_budgets_in_another_currency_than_the_prices(tmp_path: Path) -> None:
    """They would be counted wrong. Neither cortex nor a key in use gets one."""
    text = '[[keys]]\nname = "a"\nkey = "sk-a"\nbudget = "5USD/day"\n'
    (tmp_path / "keys.toml").write_text(text, encoding="utf-8")
    assert keys_in_file(tmp_path / "keys.toml", "USD")[0].limits.total.budgets == (Budget(5, "USD", "day"),)
    problem = r"keys\[0\] \(a\): the budget 5USD/day must be in EUR, the currency of the prices"
    with pytest.raises(SettingsError, match=problem):
        keys_in_file(tmp_path / "keys.toml", "EUR")
    with pytest.raises(SettingsError, match=problem):
        keys_in_environment({"CORTEX_KEYS": text}, "EUR")


@pytest.mark.parametrize("line", ["ci: sha256:{}", "ci:SHA256:{}", " ci :\tsha256:{} "])
def test_a_hash_never_becomes_a_key(line: str) -> None:
    """It is kept where keys are not, such as Git: the key opens cortex, and the text of its hash does not."""
    digest = digest_of(SECRET).hex()
    (key,) = keys_in_environment({"CORTEX_KEYS": line.format(digest)})
    assert (key.name, key.digest) == ("ci", digest_of(SECRET))


@pytest.mark.parametrize("kind", ["sha256", "SHA256"])
def test_a_hash_in_place_of_a_key(kind: str) -> None:
    text = f'[[keys]]\nname = "ci"\nkey = "{kind}:{digest_of(SECRET).hex()}"'
    with pytest.raises(SettingsError, match=r"keys\[0\] \(ci\): key: is a SHA-256, not a key: write sha256 instead"):
        keys_in_environment({"CORTEX_KEYS": text})


@pytest.mark.parametrize("text", ['name = "ci"\nkey = "sk:secret"', "# ours\n[keys]\n", 'keys = [{name = "ci"}]'])
def test_toml_without_its_table_in_the_environment(text: str) -> None:
    with pytest.raises(SettingsError, match=r"CORTEX_KEYS: line \d looks like TOML: put \[\[keys\]\]") as caught:
        keys_in_environment({"CORTEX_KEYS": text})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("globs", "said"),
    [
        (["org/*"], []),
        (["fast"], ["'fast' matches no model, because globs are compared with model ids: fast is an alias of org/a"]),
        (["org/a@q4"], ["name 'org/a', for all its variants"]),
        (["org/a", "orgs/*"], ["'orgs/*' matches no model of models.toml"]),
    ],
)
@pytest.mark.parametrize("field", ["models", "limits"])
def test_globs_that_allow_no_model(field: str, globs: list[str], said: list[str]) -> None:
    catalogue = Catalogue.model_validate({"models": [{"id": "org/a"}], "aliases": {"fast": "org/a"}})
    terms = KeyTerms.model_validate({"name": "x", field: globs if field == "models" else {glob: {} for glob in globs}})
    warnings = unmatched_globs(terms, catalogue)
    assert len(warnings) == len(said)
    assert all(text in warning for warning, text in zip(warnings, said, strict=True))


def test_wrong_lines_of_the_environment() -> None:
    """A line without a name may be the key alone: it is not shown."""
    with pytest.raises(SettingsError, match="environment CORTEX_KEYS: line 2 must be NAME:KEY") as caught:
        keys_in_environment({"CORTEX_KEYS": f"a:b\n{SECRET}"})
    assert SECRET not in str(caught.value)
