"""`tls_cert` and `tls_key`: which files `cortex check` and a start refuse, and with which words."""

from __future__ import annotations

import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cortex.cli.serve import run_check
from cortex.config.files import read_configuration, tls_warnings
from shared.settings import SettingsError
from tests.certificates import pair


def configured(directory: Path, **keys: str) -> Path:
    """A cortex.toml with these keys of `[gateway]`, and without neurons."""
    lines = ["[gateway]", *(f"{name} = {value!r}" for name, value in keys.items())]
    (directory / "models.toml").write_text("", encoding="utf-8")
    path = directory / "cortex.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def problem(path: Path) -> str:
    config, _ = read_configuration(path)
    with pytest.raises(SettingsError) as caught:
        tls_warnings(config, path)
    return str(caught.value)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """Whatever the working directory is."""
    pair(tmp_path)
    path = configured(tmp_path, tls_cert="cert.pem", tls_key="key.pem")
    config, _ = read_configuration(path)
    assert config.gateway.tls_cert == tmp_path / "cert.pem"
    assert tls_warnings(config, path) == []


def test_both_or_neither(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="set both, or neither"):
        read_configuration(configured(tmp_path, tls_cert="cert.pem"))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    """Each message names the file and what is wrong with it."""
    files = pair(tmp_path)
    path = configured(tmp_path, tls_cert="cert.pem", tls_key="key.pem")
    cert, key = files.cert.read_bytes(), files.key.read_bytes()
    (tmp_path / "other").mkdir()
    files.key.write_bytes(pair(tmp_path / "other").key.read_bytes())
    assert f"{files.key}: the key does not belong to the certificate {files.cert}" in problem(path)
    files.key.write_bytes(cert)
    assert f"{files.key}: has no PEM block PRIVATE KEY" in problem(path)
    files.key.write_bytes(key)
    files.cert.write_bytes(cert[:100] + b"\n" + cert[-40:])
    assert f"{files.cert} and {files.key} cannot be used" in problem(path)
    files.cert.unlink()
    assert f"{files.cert}: No such file or directory" in problem(path)


def test_encrypted_key(tmp_path: Path) -> None:
    """No question at the terminal."""
    files = pair(tmp_path)
    command = ["openssl", "ec", "-in", "key.pem", "-aes256", "-passout", "pass:secret", "-out", "encrypted.pem"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "encrypted.pem").replace(files.key)
    assert "the key is encrypted" in problem(configured(tmp_path, tls_cert="cert.pem", tls_key="key.pem"))


def test_expired_certificate_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """cortex starts with it: clients say more clearly what is wrong than a port that is closed."""
    pair(tmp_path, until=datetime.now(timezone.utc) - timedelta(days=1))
    assert run_check(configured(tmp_path, tls_cert="cert.pem", tls_key="key.pem")) == 0
    assert f"{tmp_path / 'cert.pem'}: the certificate has expired" in capsys.readouterr().err
