"""cortex.toml, and `cortex check` and `cortex serve` on valid and invalid files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cortex.cli.doctor.this_host import check_files
from cortex.cli.serve import run_check
from cortex.config.gateway import parse_listen
from cortex.config.neurons import NeuronEntry
from cortex.config.settings import CortexConfig
from shared.settings import SettingsError, load_settings, validate_settings

TOP = Path(__file__).parents[3]
NEURON = "[[neurons]]\nname = 'beast'\nendpoint = 'http://beast:13131'\n"


def load(tmp_path: Path, text: str, **environ: str) -> CortexConfig:
    path = tmp_path / "cortex.toml"
    path.write_text(text, encoding="utf-8")
    return load_settings(CortexConfig, path, env_prefix="CORTEX_", environ=environ)


def test_defaults(tmp_path: Path) -> None:
    """An empty file has the documented defaults."""
    config = load(tmp_path, "")
    assert (config.gateway.listen, config.gateway.metrics_listen) == ("127.0.0.1:31313", "127.0.0.1:31314")
    assert (config.gateway.max_body_mib, config.gateway.drain_timeout_secs) == (32, 30)
    assert (config.poll.interval_secs, config.poll.timeout_secs, config.poll.unhealthy_after) == (2.0, 5.0, 3)
    assert config.cold_load.timeout_secs == 1800
    assert config.models_path(tmp_path / "cortex.toml") == tmp_path / "models.toml"


def test_models_config_may_be_absolute(tmp_path: Path) -> None:
    """A relative path starts at the file that names it."""
    assert load(tmp_path, "models_config = '/etc/m.toml'").models_path(tmp_path / "c.toml") == Path("/etc/m.toml")


def test_environment(tmp_path: Path) -> None:
    """Variables override keys as documented, with an IPv6 address and a whole list of neurons."""
    config = load(
        tmp_path,
        NEURON,
        CORTEX_GATEWAY__LISTEN="[::1]:8080",
        CORTEX_POLL__INTERVAL_SECS="0.5",
        CORTEX_NEURONS='[{"name": "benjy", "endpoint": "http://benjy:1"}]',
        CORTEX_URL="http://elsewhere",
        CORTEX_API_KEY="key",
    )
    assert parse_listen(config.gateway.listen) == ("::1", 8080)
    assert config.poll.interval_secs == 0.5
    assert [entry.name for entry in config.neurons] == ["benjy"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[gateway]\nlisten = '31313'", "gateway.listen = '31313': must be HOST:PORT"),
        ("[gateway]\nlisten = 'host:port'", "gateway.listen = 'host:port': must be HOST:PORT"),
        ("[gateway]\nlisten = 'host:70000'", "gateway.listen = 'host:70000': must be HOST:PORT"),
        ("[gateway]\nmetrics_listen = ''", "gateway.metrics_listen = '': must be HOST:PORT"),
        ("[gateway]\nlisten = 31313", "gateway.listen = 31313: "),
        ("[gateway]\nmax_body_mib = 0", "gateway.max_body_mib = 0: "),
        ("[gateway]\ndrain_timeout_secs = -1", "gateway.drain_timeout_secs = -1: "),
        ("[poll]\ninterval_secs = 0", "poll.interval_secs = 0: "),
        ("[poll]\nunhealthy_after = 0", "poll.unhealthy_after = 0: "),
        ("[poll]\ninterval = 1", "poll.interval: unknown key (value 1)"),
        ("[cold_load]\ntimeout_secs = 0", "cold_load.timeout_secs = 0: "),
        ("[routing]\nsession_header = 'a b'", "routing.session_header = 'a b': "),
        ("[routing]\nsession_header = 'Cookie'", "routing.session_header = 'Cookie': reserved by cortex"),
        ("[routing]\nprefix_chars = -1", "routing.prefix_chars = -1: "),
        ("[routing]\nload_factor = 0.9", "routing.load_factor = 0.9: "),
        ("log_level = 'loud'", "log_level = 'loud': "),
        ("[[neurons]]\nname = 'beast'", "neurons[0].endpoint: required, but missing"),
        ("[[neurons]]\nname = 'be ast'\nendpoint = 'http://x'", "neurons[0].name = 'be ast': must start"),
        ("[[neurons]]\nname = '-x'\nendpoint = 'http://x'", "neurons[0].name = '-x': must start"),
        ("[[neurons]]\nname = 'x'\nendpoint = 'beast:13131'", "neurons[0].endpoint = 'beast:13131': must be a URL"),
        ("[[neurons]]\nname = 'x'\nendpoint = 'ftp://x'", "neurons[0].endpoint = 'ftp://x': must be a URL"),
        ("[[neurons]]\nname = 'x'\nendpoint = 'http://x?a=1'", "neurons[0].endpoint = 'http://x?a=1': must be a URL"),
        (NEURON + NEURON, "duplicate neuron name 'beast'"),
        (NEURON + "token = ''", "neurons[0].token = '': "),
        (NEURON + "token_env = 'NO_SUCH'", "neurons[0]: token_env: the environment variable NO_SUCH is not set"),
        (NEURON + "tokn = 'x'", "neurons[0].tokn: unknown key"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, expected: str) -> None:
    """Each problem names the file, the key and the value."""
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert len(caught.value.problems) == 1, caught.value.problems
    assert caught.value.problems[0].startswith(f"{tmp_path}/cortex.toml: ")
    assert expected in caught.value.problems[0]


@pytest.mark.parametrize(
    "password", ["pa/zzz", "12/zzz", "12#zzz", "12?zzz", "pa?zzz", "pa@zzz", "1/x@zzz", "p[zzz", "p%40zzz"]
)
def test_a_database_whose_password_is_not_escaped(tmp_path: Path, password: str) -> None:
    """A part of it would be taken for a port or for the database's name, and shown in messages. This one shows none."""
    end = "" if password == "p%40zzz" else "@db/cortex"  # without an unescaped @ there is no password at all
    url = f"postgresql://cortex:{password}{end}"
    with pytest.raises(SettingsError, match="in the user and the password write / as %2F") as caught:
        load(tmp_path, f"database = '{url}'")
    assert "zzz" not in str(caught.value)
    with pytest.raises(SettingsError, match="environment CORTEX_DATABASE: database = not shown: cannot be read"):
        load(tmp_path, "", CORTEX_DATABASE=url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://db/cortex",
        "postgres://cortex:pa%2Fss%40x@db:5432/cortex?sslmode=verify-full",
        "postgresql://cortex@[::1]:5432/cortex",
        "postgresql://cortex:pass@one:5432,two:5433,[::1]/cortex",
        "postgresql://cortex:pass@/cortex?host=/run/postgresql",
        "postgresql:///cortex?host=/run/postgresql",
        "postgresql://cortex@%2Frun%2Fpostgresql/cortex",
    ],
)
def test_urls_of_databases(tmp_path: Path, url: str) -> None:
    assert load(tmp_path, f"database = '{url}'").database == url


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token comes from the file or the environment; the file wins. An endpoint's trailing slash is dropped."""
    monkeypatch.setenv("BEAST_TOKEN", "from environment")
    text = NEURON.replace("13131'", "13131/'")
    plain, named, both = (
        load(tmp_path, text + more).neurons[0]
        for more in ("", "token_env = 'BEAST_TOKEN'", "token_env = 'BEAST_TOKEN'\ntoken = 'from file'")
    )
    assert (plain.bearer_token, named.bearer_token, both.bearer_token) == (None, "from environment", "from file")
    assert plain.endpoint == "http://beast:13131"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("args = ['--port', '1']", "models[0].args: '--port': --port is set by neuron"),
        ("args = ['--max-model-len=9', '--api_key=x']", "models[0].args: '--api_key=x': --api-key is set by neuron"),
        ("args = ['-tp', '2']", "models[0].args: '-tp': --tensor-parallel-size is set by neuron"),
        ("args = ['-pp', '1']", "'-pp': --pipeline-parallel-size is set by neuron, use `parallel = {"),
        ("args = ['-dp=2']\nparallel = { data = 2 }", "'-dp=2': --data-parallel-size is set by neuron"),
        ("args = ['--data-parallel-size-local', '1']", "--data-parallel-size-local is set by neuron"),
        ("harness = 'sim'\nargs = ['--enable-exp']", "'--enable-exp': --enable-expert-parallel is set by neuron"),
        ("min_devices = 2\nparallel = { tensor = 4 }", "models[0].parallel: tensor is 4, but min_devices is 2: remove"),
        ("harness = 'sim'\nargs = ['--hos=x']", "models[0].args: '--hos=x': --host is set by neuron"),
        ("vram_mb = '5'", "models[0].vram_mb = '5': must be a whole number"),
        (
            "variants = [{}, { args = ['--port', '1'] }]",
            "models[0].variants[1].args: '--port': --port is set by neuron",
        ),
        ("args = ['--port', '1']\nvariants = [{}, {}]", "models[0].args: '--port': --port is set by neuron"),
        ("variants = [{ quant = 'a' }, { quant = 'a' }]", "two variants are named 'a': give each a `name` of its own"),
        ("variants = [{ quant = 5 }]", "models[0].variants[0].quant = 5: must be a string"),
        ("tools = 'yes'", "models[0].tools = 'yes': must be true or false"),
    ],
)
def test_check_finds_what_a_neuron_would_refuse(tmp_path: Path, model: str, expected: str) -> None:
    """Otherwise the first request for the model finds it."""
    (tmp_path / "models.toml").write_text(f"[[models]]\nid = 'm'\n{model}\n", encoding="utf-8")
    (tmp_path / "cortex.toml").write_text(NEURON, encoding="utf-8")
    done = cortex("check", "--config", str(tmp_path / "cortex.toml"))
    assert done.returncode == 1
    assert f"{tmp_path}/models.toml: models[0]." in done.stderr
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def cortex(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs the real command."""
    return subprocess.run(
        [sys.executable, "-m", "cortex", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=TOP,
        env={**os.environ, **environ},
        check=False,
    )


def test_check_of_good_files(tmp_path: Path) -> None:
    """The command exits with 0 and a summary, and warns of a pin to an unlisted neuron."""
    (tmp_path / "cortex.toml").write_text(NEURON, encoding="utf-8")
    (tmp_path / "models.toml").write_text("[[models]]\nid = 'a'\npinned_on = ['benjy']", encoding="utf-8")
    done = cortex("check", "--config", str(tmp_path / "cortex.toml"))
    assert (done.returncode, done.stdout) == (
        0,
        f"ok: {tmp_path}/cortex.toml: 1 neuron; {tmp_path}/models.toml: 1 model\n",
    )
    assert done.stderr.startswith(f"warning: {tmp_path}/models.toml: models[0].pinned_on: 'a' is pinned on 'benjy'")


def test_check_prints_json(tmp_path: Path) -> None:
    """And nothing else; the exit status is the same."""
    path = tmp_path / "cortex.toml"
    path.write_text(NEURON, encoding="utf-8")
    (tmp_path / "models.toml").write_text("[[models]]\nid = 'a'\npinned_on = ['benjy']", encoding="utf-8")
    good = cortex("check", "--config", str(path), "--json")
    path.write_text(f"bogus = 1\n{NEURON}", encoding="utf-8")
    bad = cortex("check", "--config", str(path), "--json")
    found = json.loads(good.stdout)
    assert (good.returncode, good.stderr, found["ok"], found["errors"]) == (0, "", True, [])
    assert "'a' is pinned on 'benjy'" in found["warnings"][0]
    assert (bad.returncode, bad.stderr) == (1, "")
    assert json.loads(bad.stdout)["errors"] == [f"{path}: bogus: unknown key (value 1)"]


def test_check_warns_of_a_variant_pinned_to_an_unlisted_neuron(tmp_path: Path) -> None:
    """It names the variant's entry; what variants inherit is named once."""
    (tmp_path / "cortex.toml").write_text(NEURON, encoding="utf-8")
    (tmp_path / "models.toml").write_text(
        "[[models]]\nid = 'a'\nvariants = [{}, { pinned_on = ['benjy'] }]\n"
        "[[models]]\nid = 'b'\npinned_on = ['quadbrat']\nvariants = [{}, {}]"
    )
    done = cortex("check", "--config", str(tmp_path / "cortex.toml"))
    assert done.returncode == 0
    assert [line.partition(", which")[0] for line in done.stderr.splitlines()] == [
        f"warning: {tmp_path}/models.toml: models[0].variants[1].pinned_on: 'a' is pinned on 'benjy'",
        f"warning: {tmp_path}/models.toml: models[1].pinned_on: 'b' is pinned on 'quadbrat'",
    ]


@pytest.mark.parametrize("harness", ["llama", "sglang", "vllm-nightly"])
def test_check_accepts_any_harness(tmp_path: Path, harness: str) -> None:
    """A neuron may describe an engine of any name, with arguments that vLLM does not have: nothing to warn of."""
    (tmp_path / "cortex.toml").write_text(NEURON, encoding="utf-8")
    text = f"[[models]]\nid = 'a'\nharness = '{harness}'\nargs = ['--port', '1']"
    (tmp_path / "models.toml").write_text(text, encoding="utf-8")
    done = cortex("check", "--config", str(tmp_path / "cortex.toml"))
    assert (done.returncode, done.stderr) == (0, "")


def test_check_warns_of_a_misspelt_harness(tmp_path: Path) -> None:
    """It may be a name that some neuron has, so the exit status is 0. Each variant is checked."""
    (tmp_path / "cortex.toml").write_text(NEURON, encoding="utf-8")
    text = "[[models]]\nid = 'a'\nharness = 'vlm'\n[[models]]\nid = 'b'\nvariants = [{}, { harness = 'vllmm' }]"
    (tmp_path / "models.toml").write_text(text, encoding="utf-8")
    done = cortex("check", "--config", str(tmp_path / "cortex.toml"))
    assert done.returncode == 0
    first, second = done.stderr.splitlines()
    assert first.startswith(f"warning: {tmp_path}/models.toml: models[0].harness = 'vlm': 'a' can only be loaded by")
    assert first.endswith("did you mean 'vllm'?")
    assert second.startswith(f"warning: {tmp_path}/models.toml: models[1].variants[1].harness = 'vllmm': 'b' can")


def test_check_names_every_problem_of_both_files(tmp_path: Path) -> None:
    """The command exits with 1; it also checks the catalogue that an invalid cortex.toml names, and no other."""
    (tmp_path / "cortex.toml").write_text(
        "models_config = 'cat.toml'\nwrong = 1\n[poll]\ninterval_secs = 0", encoding="utf-8"
    )
    (tmp_path / "cat.toml").write_text("[[models]]\nid = 'a'\nsize = 3\n[aliases]\nb = 'c'", encoding="utf-8")
    done = cortex("check", "--config", str(tmp_path / "cortex.toml"), CORTEX_GATEWAY__LISTEN="nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert sorted(line.partition(": ")[2].partition(": ")[0] for line in done.stderr.splitlines()) == [
        "gateway.listen = 'nowhere'",
        "models[0].size",
        "poll.interval_secs = 0",
        "wrong",
    ]
    assert "environment CORTEX_GATEWAY__LISTEN: gateway.listen" in done.stderr
    assert f"{tmp_path}/cat.toml: models[0].size: unknown key (value 3)" in done.stderr


@pytest.mark.parametrize("text", [None, "= 1", "models_config = 5"])
def test_check_guesses_no_catalogue(tmp_path: Path, text: str | None) -> None:
    """An unreadable cortex.toml is one problem; a missing models.toml is not reported as well."""
    if text is not None:
        (tmp_path / "cortex.toml").write_text(text, encoding="utf-8")
    done = cortex("check", "--config", str(tmp_path / "cortex.toml"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{tmp_path}/cortex.toml: ")


def test_serve_refuses_what_check_refuses(tmp_path: Path) -> None:
    """The service does not start with invalid files."""
    (tmp_path / "cortex.toml").write_text("wrong = 1", encoding="utf-8")
    done = cortex("serve", "--config", str(tmp_path / "cortex.toml"))
    assert done.returncode == os.EX_CONFIG
    assert f"{tmp_path}/cortex.toml: wrong: unknown key (value 1)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"kind": "dns"}, "host: with kind"),
        ({"kind": "register"}, "registration_token_env or registration_token_file"),
        ({"kind": "register", "registration_token_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
        ({"kind": "dns", "host": "x", "token_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
        ({"kind": "kubernetes"}, "selector: with kind"),
        ({"kind": "dns", "host": "neurons..svc"}, "not a host name: "),
        ({"kind": "dns", "host": "x", "token": "two\nlines"}, "token: must not contain line breaks"),
    ],
)
def test_discovery_needs_what_its_kind_needs(table: dict[str, str], problem: str) -> None:
    """A missing host, token or variable is found by `cortex check`."""
    with pytest.raises(SettingsError, match=re.escape(problem)):
        validate_settings(CortexConfig, {"discovery": table}, source="cortex.toml")


def test_registration_token_file_is_beside_cortex_toml(tmp_path: Path) -> None:
    """Read each time; an empty file is an error that names it."""
    table = {"kind": "register", "registration_token_file": "token"}
    config = CortexConfig.model_validate({"discovery": table}).beside(tmp_path / "cortex.toml")
    with pytest.raises(SettingsError, match="No such file"):
        config.discovery.registration_tokens()
    (tmp_path / "token").write_text("\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="has no token"):
        config.discovery.registration_tokens()
    (tmp_path / "token").write_text("# new\nsecret 2 \n\n# old\nsecret\n", encoding="utf-8")
    assert config.discovery.registration_tokens() == ["secret 2", "secret"]


def test_check_and_doctor_read_the_registration_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cortex would not start without it, and a reload warns of it."""
    path = tmp_path / "cortex.toml"
    path.write_text("discovery = {kind = 'register', registration_token_file = 'token'}", encoding="utf-8")
    (tmp_path / "models.toml").touch()
    assert run_check(path) == 1
    assert "registration_token_file must be readable" in capsys.readouterr().err
    assert any("registration_token_file must be readable" in finding.text for finding in check_files(path)[1])
    (tmp_path / "token").write_text("secret", encoding="utf-8")
    assert run_check(path) == 0


def test_names_may_be_as_long_as_those_of_kubernetes() -> None:
    """A node's name has up to 253 characters there."""
    assert NeuronEntry(name="n" * 253, endpoint="http://n:13131").name == "n" * 253
    with pytest.raises(ValueError, match="at most 253"):
        NeuronEntry(name="n" * 254, endpoint="http://n:13131")
