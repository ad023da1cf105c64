"""`tls_cert` and `tls_key`: which files `cortex check` and a start refuse, and with which words."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cortex.cli.serve import run_check
from cortex.config.files import read_configuration, tls_warnings
from shared.settings import SettingsError
from tests.certificates import FAULTS, PairFiles, pair


def configured(directory: Path, **keys: str) -> Path:
    """A cortex.toml with these keys of `[gateway]`, and without neurons."""
    lines = ["[gateway]", *(f"{name} = {value!r}" for name, value in keys.items())]
    (directory / "models.toml").write_text("", encoding="utf-8")
    path = directory / "cortex.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


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


@pytest.mark.parametrize("fault", [*FAULTS], ids=lambda fault: str(fault.__name__))
def test_files_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Callable[[PairFiles], str]
) -> None:
    """Each message names the file and what is wrong with it. Nothing asks for a password at the terminal."""
    path = configured(tmp_path, tls_cert="cert.pem", tls_key="key.pem")
    with path.open("a") as file:
        file.write("\n[neuron_tls]\ncert = 'cert.pem'\nkey = 'key.pem'\n")
    expected = fault(pair(tmp_path))
    assert run_check(path) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(f"{path}: ")[2].partition(": ")[0] for line in lines] == ["gateway", "neuron_tls"]
    assert all(expected in line for line in lines)


def test_problems_of_all_files_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the TLS files together with those of the catalogue."""
    path = configured(tmp_path, tls_cert="cert.pem", tls_key="key.pem")
    (tmp_path / "models.toml").write_text("[[models]]\nid = 'm'\nargs = ['--port', '1']\n", encoding="utf-8")
    assert run_check(path) == 1
    error = capsys.readouterr().err
    assert "--port is set by neuron" in error
    assert f"{tmp_path}/cert.pem: No such file or directory" in error


def test_expired_certificate_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """cortex starts with it: clients say more clearly what is wrong than a port that is closed."""
    pair(tmp_path, until=datetime.now(timezone.utc) - timedelta(days=1))
    assert run_check(configured(tmp_path, tls_cert="cert.pem", tls_key="key.pem")) == 0
    assert f"{tmp_path / 'cert.pem'}: the certificate has expired" in capsys.readouterr().err
