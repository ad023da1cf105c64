"""`neuron check` on valid and invalid files."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from neuron.__main__ import main
from tests.certificates import FAULTS, PairFiles, authority_file, pair


def check(tmp_path: Path, text: str) -> int:
    path = tmp_path / "neuron.toml"
    path.write_text(text, encoding="utf-8")
    return main(["check", "--config", str(path)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port = '13131'", "port = '13131': must be a whole number"),
        ("prot = 13131", "prot: unknown key (value 13131)"),
        ("[[harnesses]]\nname = 'vlm'", "unknown harness 'vlm' (known: vllm, sim; for another"),
        ("[harness.vllm]\nextra_args = ['--port', '1']", "--port is set by neuron"),
        ("[harness.vllm]\nsleep_mode = 'yes'", "sleep_mode = 'yes': must be true or false or must be 'dev'"),
        ("[[default_models]]\nmodel_id = 'm'\nargs = ['--host', 'x']", "--host is set by neuron"),
        (
            "[[default_models]]\nmodel_id = 'm'\nparallel = { tensr = 2 }",
            "default_models[0].parallel.tensr: unknown key",
        ),
        (
            "[[default_models]]\nmodel_id = 'm'\ntensor_parallel = 2\nparallel = { tensor = 4 }",
            "default_models[0].tensor_parallel: 2, but parallel.tensor is 4: remove one, or make them equal",
        ),
        (
            "[[default_models]]\nmodel_id = 'm'\n[[default_models]]\nmodel_id = 'm'\ninstance = '0'",
            "default_models: m: listed twice with instance '0': give each entry an instance of its own",
        ),
        ("[harness.vllm]\nextra_args = ['--enable-expert-parallel']", "--enable-expert-parallel is set by neuron"),
        ("[simulate]\ndevices = ['RTX 1']", "RTX 1"),
        ("host = '0.0.0.0'", "host = '0.0.0.0': refusing to listen on 0.0.0.0 without a token"),
    ],
)
def test_problems_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    """Each problem names the file, the key and what is wrong; the exit status is 1."""
    assert check(tmp_path, text) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/neuron.toml: " in error
    assert expected in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("fault", [*FAULTS], ids=lambda fault: str(fault.__name__))
def test_tls_files_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Callable[[PairFiles], str]
) -> None:
    """Each message names the file and what is wrong with it."""
    files = pair(tmp_path)
    expected = fault(files)
    assert check(tmp_path, "tls_cert = 'cert.pem'\ntls_key = 'key.pem'") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"{tmp_path}/neuron.toml: ")
    assert expected in error


def test_authorities_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path)
    text = "tls_cert = 'cert.pem'\ntls_key = 'key.pem'\ntls_client_ca = 'ca.pem'"
    assert check(tmp_path, text) == 1
    assert f"{tmp_path}/ca.pem: No such file or directory" in capsys.readouterr().err
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert check(tmp_path, text) == 1
    assert f"{tmp_path}/ca.pem: cannot be used: " in capsys.readouterr().err
    authority_file(tmp_path)
    assert check(tmp_path, text) == 0


def test_expired_certificate_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path, until=datetime.now(timezone.utc) - timedelta(days=1))
    assert check(tmp_path, "tls_cert = 'cert.pem'\ntls_key = 'key.pem'\n[[harnesses]]\nname = 'sim'") == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == f"warning: {tmp_path}/neuron.toml: {tmp_path}/cert.pem: the certificate has expired"


def test_a_host_that_cannot_be_in_dns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an address of another machine: nothing is known of it here."""
    assert check(tmp_path, "host = 'é..x'") == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary says what neuron would do; an address of another machine is fine."""
    text = "host = '192.0.2.7'\ntoken = 'x'\n[[harnesses]]\nname = 'sim'\n[[default_models]]\nmodel_id = 'm'\n"
    assert check(tmp_path, text) == 0
    assert capsys.readouterr().out == f"ok: {tmp_path}/neuron.toml: 192.0.2.7:13131; sim; 1 default model\n"


def test_an_engine_that_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning names it; the file is still good, as it may be checked on another host. One in the PATH that the engine
    gets is found."""
    engine = tmp_path / "bin" / "serve"
    engine.parent.mkdir()
    engine.touch(mode=0o755)
    text = (
        "[harness.sim]\n"
        "[harness.llama]\npreset = 'llama.cpp'\ncommand = ['/no/such/llama-server']\n"
        f"[harness.found]\nkind = 'command'\ncommand = 'serve --port={{port}}'\nenv = {{ PATH = '{engine.parent}' }}\n"
        "[harness.each]\nkind = 'command'\ncommand = ['/srv/{model}/serve', '{port}']\n"
    )
    assert check(tmp_path, text) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path}/neuron.toml: [harness.llama]: ")
    assert "'/no/such/llama-server'" in warning


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path is named."""
    assert main(["check", "--config", str(tmp_path / "no.toml")]) == 1
    assert f"{tmp_path}/no.toml: No such file" in capsys.readouterr().err
