"""The tokens that `cortex login` has got, in a file that only this user can read, by the address of the cortex."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cortex.cli.client import CallFailed, base_url
from shared.system.files import replace_file

_MARGIN_SECS = 30.0
"""A token that ends sooner is renewed before it is used."""


def token_for(url: str) -> str | None:
    """The token for the cortex at this address, renewed if necessary; None without a sign-in there.

    Raises:
        CallFailed: it has ended and cannot be renewed.
    """
    file = tokens_file()
    if file is None or not file.exists():
        return None
    entry = _read(file).get(base_url(url))
    if entry is None:
        return None
    if entry["expires_at"] - _MARGIN_SECS > time.time():
        return str(entry["id_token"])
    with _locked(file):  # a refresh token may be valid only once
        entries = _read(file)
        entry = entries.get(base_url(url))
        if entry is None:
            return None
        if entry["expires_at"] - _MARGIN_SECS <= time.time():
            entries[base_url(url)] = entry = _renewed(entry, url)
            _write(file, entries)
    return str(entry["id_token"])


def keep(url: str, entry: dict[str, Any]) -> None:
    """Stores what `token_for` needs: `id_token`, `refresh_token`, `expires_at`, `issuer`, `client_id`."""
    file = tokens_file()
    if file is None:
        raise CallFailed("this user has no home directory: set XDG_CONFIG_HOME to where the token is to be kept")
    with contextlib.suppress(OSError):  # writing the file says what is wrong
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(file):
        _write(file, {**_read(file), base_url(url): entry})


def forget(url: str) -> dict[str, Any] | None:
    """Removes and returns the entry of this cortex; None if there is none."""
    file = tokens_file()
    if file is None or not file.exists():
        return None
    with _locked(file):
        entries = _read(file)
        entry = entries.pop(base_url(url), None)
        if entry is not None:
            _write(file, entries)
    return entry


def tokens_file() -> Path | None:
    """None for a user without a home directory."""
    try:
        below = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError:
        return None
    return below / "cortex" / "tokens.json"


def _renewed(entry: dict[str, Any], url: str) -> dict[str, Any]:
    from cortex.cli.sign_in.issuer_client import Tokens, discovered, reason_of

    again = f"sign in again with `cortex login --url {url}`"
    if not entry.get("refresh_token"):
        raise CallFailed(f"the sign-in at {url} has ended: {again}")
    issuer = discovered(entry["issuer"], entry["client_id"])
    found = issuer.ask_for_tokens({"grant_type": "refresh_token", "refresh_token": entry["refresh_token"]})
    if not isinstance(found, Tokens):
        raise CallFailed(f"the sign-in at {url} has ended ({reason_of(found)}): {again}")
    refresh = found.refresh_token or entry["refresh_token"]
    return {**entry, "id_token": found.id_token, "refresh_token": refresh, "expires_at": found.expires_at}


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CallFailed(f"{file} cannot be read, remove it and sign in again: {error}") from error
    return entries if isinstance(entries, dict) else {}


def _write(file: Path, entries: dict[str, dict[str, Any]]) -> None:
    replace_file(file, json.dumps(entries, indent=1).encode())


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    try:
        with file.with_suffix(".lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise CallFailed(f"{file} cannot be written: {error.strerror}") from error
