"""Keys that are provisioned from outside: a file of keys, and the environment variable CORTEX_KEYS.

Messages name the source and the entry, and never have a key in them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from cortex.accounts.keys.api_key import ENVIRONMENT_PREFIX, FILE_PREFIX, ApiKey, digest_of, prefix_of
from cortex.accounts.keys.key_terms import KeyTerms, foreign_budget, parse_moment
from cortex.config.files import KEYS_VARIABLE
from shared.protocol import plain_reason
from shared.settings import SettingsError, read_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT = "environment"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOML_LINE = re.compile(r"\s*(?:\[keys\]|(?:keys|name|key|sha256)\s*=)")
_SECRET = re.compile(r"[\x21-\x7e]{1,256}")


class ProvisionedKey(KeyTerms):
    """One `[[keys]]` table. It has either the key itself or its SHA-256 in hex."""

    key: str | None = Field(default=None, repr=False)
    sha256: str | None = None

    @field_validator("key")
    @classmethod
    def _sendable(cls, value: str | None) -> str | None:
        if value is not None and not _SECRET.fullmatch(value):
            raise ValueError("must be 1 to 256 visible ASCII characters without spaces")
        if value is not None and _is_digest(value):  # it is kept in places where a key must not be
            raise ValueError("is a SHA-256, not a key: write sha256 instead of key")
        return value

    @field_validator("sha256")
    @classmethod
    def _digest(cls, value: str | None) -> str | None:
        value = value and value.lower().removeprefix("sha256:")
        if value is not None and not _SHA256.fullmatch(value):
            raise ValueError("must be 64 hexadecimal digits")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> ProvisionedKey:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("must have either key or sha256")
        return self

    def api_key(self, source: str) -> ApiKey:
        """This entry of `source` as a key. It may have expired.

        Raises:
            ValueError: `expires` is not a date or time.
        """
        digest = bytes.fromhex(self.sha256 or "") if self.key is None else digest_of(self.key)
        return ApiKey(
            (ENVIRONMENT_PREFIX if source == ENVIRONMENT else FILE_PREFIX) + self.name,
            self.name,
            digest,
            prefix_of(self.key or ""),
            role=self.role,
            models=tuple(self.models),
            priority=self.priority,
            weight=self.weight,
            limits=self.key_limits,
            expires_at=None if self.expires is None else parse_moment(self.expires),
            source=source,
        )


def keys_in_file(path: Path, currency: str = "EUR") -> list[ApiKey]:
    """The keys of a TOML file. `currency`: of the prices. Blocks.

    Raises:
        SettingsError: every problem.
    """
    return _keys_of(read_toml(path), str(path), str(path), currency)


def keys_in_environment(environ: Mapping[str, str], currency: str = "EUR") -> list[ApiKey]:
    """The keys in CORTEX_KEYS: the same TOML, or lines of `NAME:KEY` or `NAME:sha256:HEX`. `currency`: of the prices.

    Raises:
        SettingsError: every problem.
    """
    text = environ.get(KEYS_VARIABLE, "")
    where = f"environment {KEYS_VARIABLE}"
    if "[[" in text:
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SettingsError([f"{where}: not valid TOML: {error}"]) from error
        return _keys_of(data, where, ENVIRONMENT, currency)
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        name, colon, key = line.strip().partition(":")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if _TOML_LINE.match(line):
            raise SettingsError([f"{where}: line {number} looks like TOML: put [[keys]] on a line before each key"])
        if not colon:
            raise SettingsError([f"{where}: line {number} must be NAME:KEY"])
        key = key.strip()
        secret = {"sha256": key} if _is_digest(key) else {"key": key}
        entries.append({"name": name.strip(), **secret})
    return _keys_of({"keys": entries}, where, ENVIRONMENT, currency)


def _is_digest(text: str) -> bool:
    """Whether it is meant as the SHA-256 of a key."""
    return text.lower().startswith("sha256:")


def _keys_of(data: Mapping[str, Any], where: str, source: str, currency: str) -> list[ApiKey]:
    entries = data.get("keys", [])
    problems = [f"{where}: {name}: unknown key, only [[keys]] may be here" for name in data if name != "keys"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SettingsError([*problems, f"{where}: keys must be tables, each below [[keys]]"])
    found: list[ApiKey] = []
    for number, entry in enumerate(entries):
        name = entry.get("name")
        named = isinstance(name, str) and not name.startswith("sk-")  # it may be the key by mistake
        shown = f"{where}: keys[{number}]" + (f" ({name})" if named else "")
        try:
            key = ProvisionedKey.model_validate(entry, strict=True).api_key(source)
        except ValidationError as error:
            problems += _described(shown, error)
        except ValueError as error:
            problems.append(f"{shown}: expires: {error}; a duration such as 30d would have no start here")
        else:
            found.append(key)
            foreign = foreign_budget(key.limits, currency)
            problems += [] if foreign is None else [f"{shown}: {foreign}"]
    for field, shared in (
        ("name", _repeated((key.name, key.name) for key in found)),
        ("key", _repeated((key.digest, key.name) for key in found)),
    ):
        if shared:
            problems.append(f"{where}: entries with the same {field}: {', '.join(shared)}")
    if problems:
        raise SettingsError(problems)
    return found


def _described(shown: str, error: ValidationError) -> list[str]:
    """What is wrong, without any value: it may be a key."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        where = ".".join(map(str, problem["loc"]))
        reason = "unknown key" if problem["type"] == "extra_forbidden" else plain_reason(problem)
        lines.append(f"{shown}: {where}: {reason}" if where else f"{shown}: {reason}")
    return lines


def _repeated(entries: Iterable[tuple[object, str]]) -> list[str]:
    """The names of entries whose value is not the only one of its kind."""
    named: dict[object, list[str]] = {}
    for value, name in entries:
        named.setdefault(value, []).append(name)
    return [name for names in named.values() if len(names) > 1 for name in names]
