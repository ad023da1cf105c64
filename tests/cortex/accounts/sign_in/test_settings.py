"""`[auth.oidc]`: mistakes are found before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cortex.cli.serve import run_check
from cortex.config.settings import CortexConfig
from tests.cortex.cortex_process import TOP

GOOD = {"issuer": "https://auth.example.com", "client_id": "cortex", "roles": {"admin": ["ops"]}}


def checked(directory: Path, oidc: dict[str, Any]) -> int:
    """The exit status of `cortex check`."""
    (directory / "cortex.toml").write_text(tomli_w.dumps({"auth": {"oidc": oidc}}), encoding="utf-8")
    (directory / "models.toml").touch()
    return run_check(directory / "cortex.toml")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"issuer": "auth.example.com"}, "must be a URL such as"),
        ({"issuer": None}, "issuer: set it"),
        ({"client_id": None}, "client_id: set it"),
        ({"roles": {}}, "roles: set one"),
        ({"roles": {"root": ["ops"]}}, "unknown key"),
        ({"scopes": ["profile"]}, "must have openid in it"),
        ({"client_secret": "a", "client_secret_file": "b"}, "set only one"),
        ({"client_secret_env": "NO_SUCH_VARIABLE"}, "the environment variable NO_SUCH_VARIABLE is not set"),
        ({"client_secret_file": "absent"}, "absent: No such file or directory"),
        ({"client_secret_file": "models.toml"}, "models.toml: is empty"),
        ({"session_hours": 0}, "greater than 0"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], reason: str) -> None:
    """`cortex check` names each."""
    status = checked(tmp_path, {name: value for name, value in (GOOD | change).items() if value is not None})
    errors = capsys.readouterr().err
    assert (status, reason in errors) == (1, True), errors


def test_good_settings(tmp_path: Path) -> None:
    """A secret's file is beside cortex.toml; its line end is not part of the secret. Workers read what the control
    writes for them."""
    (tmp_path / "secret").write_text("s3cret\n", encoding="utf-8")
    assert checked(tmp_path, {**GOOD, "client_secret_file": "secret"}) == 0
    config = CortexConfig.model_validate({"auth": {"oidc": {**GOOD, "client_secret_file": "secret"}}})
    read = config.beside(tmp_path / "cortex.toml").auth.oidc
    assert read.secret() == "s3cret"
    for each in (config, CortexConfig()):
        assert CortexConfig.model_validate_json(each.model_dump_json()) == each


@pytest.mark.parametrize("module", ["cortex.workers.__main__", "cortex.cli.serve", "cortex.cli.commands"])
def test_only_a_sign_in_needs_cryptography(module: str) -> None:
    """Everything else is spared the time and memory of importing it."""
    code = f"import sys, {module}; sys.exit(not {{'joserfc', 'cryptography'}}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True)
