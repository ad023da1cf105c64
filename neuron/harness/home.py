"""Gives engines a user name, a home directory and caches that they can write, where they inherit none.

A service or a container often runs as a number without an entry in /etc/passwd, without HOME, or with a HOME that is
read-only. Then torch cannot name its cache, and triton, torch's extensions and the hub cannot write theirs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from neuron.estimate.locate import hub_cache
from shared.system.files import is_writable

log = logging.getLogger(__name__)

USER = "neuron"
"""The name that a nameless user gets."""
_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # in the order of Python's getpass
# Where each program keeps its cache without the variable; empty: below TMPDIR.
_CACHES = MappingProxyType(
    {
        "TORCHINDUCTOR_CACHE_DIR": "",
        "TORCH_EXTENSIONS_DIR": "{cache}/torch_extensions",
        "TORCH_HOME": "{cache}/torch",
        "TRITON_CACHE_DIR": "{home}/.triton/cache",
        "CUDA_CACHE_PATH": "{home}/.nv/ComputeCache",
        "FLASHINFER_WORKSPACE_BASE": "{home}",
    }
)


class EngineHome:
    """A directory that engines may write, below neuron's `state_dir`; created when an engine needs it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told = False

    def usable(self, environ: Mapping[str, str], *, model: str, caches: Mapping[str, str]) -> dict[str, str]:
        """`environ`, with the variables replaced or added whose directories cannot be written. `model`: a hub id or a
        path. `caches`: `Harness.cache_variables`. Blocks.

        A read-only cache of the hub is still used for a model that it has; all others are downloaded to a cache of
        their own.
        """
        found = dict(environ)
        if _is_nameless():
            name = next((environ[each] for each in _NAMES if environ.get(each)), USER)
            found = {"USER": name, "LOGNAME": name, **{key: value for key, value in found.items() if value}}
        home = environ.get("HOME") or _home_of_user()
        cache = environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
        lacks_home = not home or not is_writable(Path(home))
        if lacks_home or not is_writable(Path(cache)):
            with contextlib.suppress(OSError):  # a full disk: the engine's own errors say more
                self._path.mkdir(mode=0o700, exist_ok=True)
            found |= self._directories(environ, home, cache, caches, lacks_home=lacks_home)
            if not self._told:
                self._told = True
                reason = f"{home} cannot be written" if home else "this user has no home directory"
                log.warning("engines get a home directory and caches below %s: %s", self._path, reason)
        else:
            for variable in (*_CACHES, *caches):
                if environ.get(variable) and not is_writable(Path(environ[variable])):
                    found[variable] = str(self._own(variable, caches))
        return found | self._hub(found, environ, f"{cache}/huggingface", model)

    def _directories(
        self, environ: Mapping[str, str], home: str, cache: str, caches: Mapping[str, str], *, lacks_home: bool
    ) -> dict[str, str]:
        """HOME and the caches that are not the hub's. One that can be written where it would be stays there."""
        found = {}
        if lacks_home:
            found["HOME"] = str(self._path)
            packages = Path(home, ".local") if home else None
            if packages is not None and packages.is_dir():  # installed with `pip install --user`
                found["PYTHONUSERBASE"] = environ.get("PYTHONUSERBASE") or str(packages)
        found["XDG_CACHE_HOME"] = cache if home and is_writable(Path(cache)) else str(self._path / ".cache")
        for variable, place in {**_CACHES, **{each: f"{{cache}}/{name}" for each, name in caches.items()}}.items():
            before = environ.get(variable) or (place.format(home=home, cache=cache) if home else "")
            own = str(self._own(variable, caches))
            found[variable] = before if before and is_writable(Path(before)) else own
        return found

    def _own(self, variable: str, caches: Mapping[str, str]) -> Path:
        if variable == "FLASHINFER_WORKSPACE_BASE":  # it adds .cache/flashinfer
            return self._path
        return self._path / ".cache" / caches.get(variable, variable.lower().rpartition("_")[0])

    def _hub(self, found: Mapping[str, str], environ: Mapping[str, str], below: str, model: str) -> dict[str, str]:
        """The hub's directories, if they cannot be written or would move with HOME."""
        before = Path(environ.get("HF_HOME") or below)
        hub = hub_cache({"HF_HOME": str(before), **{key: value for key, value in environ.items() if value}})
        own = self._path / ".cache" / "huggingface"
        moved = found.get("XDG_CACHE_HOME") != environ.get("XDG_CACHE_HOME")
        if not moved and is_writable(before) and is_writable(hub):
            return {}
        variables = {"HF_HOME": str(before if is_writable(before) else own)}
        with contextlib.suppress(OSError):
            if "HF_TOKEN_PATH" not in environ and (before / "token").is_file():
                variables["HF_TOKEN_PATH"] = str(before / "token")
        usable = is_writable(hub) or _has_model(hub, model)
        return {**variables, "HF_HUB_CACHE": str(hub if usable else own / "hub")}


def _is_nameless() -> bool:
    """True for a user without an entry in /etc/passwd."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return True
    return False


def _home_of_user() -> str:
    """As /etc/passwd has it; empty without an entry."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def _has_model(hub: Path, model: str) -> bool:
    """Whether the hub's cache has a version of the model."""
    with contextlib.suppress(OSError):
        return any((hub / f"models--{model.replace('/', '--')}" / "snapshots").iterdir())
    return False
