"""neuron and its engines under a user id without a name, without HOME or with a read-only one: real processes under
such an id, which needs root."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.neuron.neurons import REPOSITORY, NeuronProcess, neuron_process, until

UID = 54321
"""Without an entry in /etc/passwd."""
CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "HF_HOME", "HF_HUB_CACHE")
ENGINE = """
import getpass, json, os, sys
from pathlib import Path
assert getpass.getuser()
Path.home()
model = sys.argv[2].replace("/", "--")
with open(os.path.join({directory!r}, model + ".json"), "w") as file:
    json.dump(dict(os.environ), file)
for name in ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "HF_HOME"):
    place = os.path.join(os.environ[name], "written")
    os.makedirs(place, exist_ok=True)
os.execv(sys.executable, [sys.executable, "-m", "neuron.sim", *sys.argv[1:], "--load-secs", "0"])
"""


def as_nameless(*command: str) -> list[str]:
    """The command under that id. It may read everything: the checkout and its Python may be closed to other users."""
    reads = "+dac_read_search"
    ids = ["--reuid", str(UID), "--regid", str(UID), "--clear-groups"]
    return ["setpriv", *ids, "--inh-caps", reads, "--ambient-caps", reads, *command]


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that the user owns. pytest's own are closed to others."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can start a process under another user id, with setpriv (Debian: util-linux)")
    with pytest.raises(KeyError):
        pwd.getpwuid(UID)
    if subprocess.run(as_nameless("true"), check=False).returncode != 0:
        pytest.skip("this container gives root no capability to pass on")
    path = Path(tempfile.mkdtemp(prefix="nameless-"))
    try:
        os.chown(path, UID, UID)
        yield path
    finally:
        shutil.rmtree(path)


@asynccontextmanager
async def nameless_neuron(directory: Path, **environ: str) -> AsyncIterator[NeuronProcess]:
    """`neuron serve` with an environment of only these variables; its "vllm" writes what it gets to a file."""
    engine = directory / "engine.py"
    engine.write_text(ENGINE.format(directory=str(directory)))
    config = directory / "neuron.toml"
    config.write_text(
        f'port = 0\nstate_dir = "{directory / "state"}"\n[[harnesses]]\nname = "vllm"\n'
        f'[harness.vllm]\ncommand = ["{sys.executable}", "{engine}"]\nport_range = [29300, 29399]\nspare = false\n'
        '[simulate]\ndevices = ["RTX 4090"]\n'
    )
    environment = {"PATH": os.environ["PATH"], **environ}
    async with neuron_process(config, whole_env=environment, prefix=as_nameless()) as neuron:
        yield neuron


async def environment_of(neuron: NeuronProcess, directory: Path, model: str) -> dict[str, str]:
    """What the engine of a freshly loaded model got. Its size is not given, so neuron looks for its files."""
    answer = await neuron.call("POST", "/models/load", json={"model_id": model, "harness": "vllm"})
    assert answer.status == 200, answer.body
    assert (await neuron.call("POST", "/models/unload", json={"model_id": model})).status == 200
    found: dict[str, str] = json.loads((directory / f"{model.replace('/', '--')}.json").read_text())
    return found


async def test_without_home_everything_is_below_the_state_directory(directory: Path) -> None:
    """The engine has a name, a home directory and caches that it can write. The log says so once."""
    async with nameless_neuron(directory) as neuron:
        found = await environment_of(neuron, directory, "org/model")
        assert (found["USER"], found["LOGNAME"]) == ("neuron", "neuron")
        assert found["HOME"] == str(directory / "state/home")
        assert all(found[name].startswith(found["HOME"]) for name in CACHES)
        assert (await neuron.call("GET", "/estimate?model=org/model")).status in (404, 422)
        await environment_of(neuron, directory, "org/other")
    assert neuron.log.read_text().count("this user has no home directory") == 1


async def test_a_read_only_home_is_still_read(directory: Path) -> None:
    """Models in its cache of the hub are used there, others are downloaded below the state directory; what can be
    written stays where it is."""
    home, triton = directory / "home", directory / "triton"
    snapshot = home / ".cache/huggingface/hub/models--org--cached/snapshots/abc"
    snapshot.mkdir(parents=True)
    (home / ".cache/huggingface/token").write_text("hf_x")
    (home / ".local").mkdir()
    triton.mkdir()
    os.chown(triton, UID, UID)
    async with nameless_neuron(directory, HOME=str(home), USER="someone", TRITON_CACHE_DIR=str(triton)) as neuron:
        found = await environment_of(neuron, directory, "org/cached")
        own = str(directory / "state/home")
        assert (found["USER"], found["HOME"], found["TRITON_CACHE_DIR"]) == ("someone", own, str(triton))
        assert found["HF_HUB_CACHE"] == str(home / ".cache/huggingface/hub")
        assert found["HF_TOKEN_PATH"] == str(home / ".cache/huggingface/token")
        assert found["PYTHONUSERBASE"] == str(home / ".local")
        assert found["HF_HOME"].startswith(own)
        assert (await environment_of(neuron, directory, "org/new"))["HF_HUB_CACHE"].startswith(own)


async def test_what_can_be_written_is_left_alone(directory: Path) -> None:
    """With a HOME of its own the engine gets nothing new but the missing name."""
    home = directory / "home"
    home.mkdir()
    os.chown(home, UID, UID)
    environ = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "c"),
        **{name: str(home / name) for name in CACHES if name not in ("XDG_CACHE_HOME", "HF_HUB_CACHE")},
    }
    async with nameless_neuron(directory, **environ) as neuron:
        found = await environment_of(neuron, directory, "org/model")
        assert {name: found.get(name) for name in (*environ, "HF_HUB_CACHE")} == {**environ, "HF_HUB_CACHE": None}
        assert found["USER"] == "neuron"
    assert not (directory / "state/home").exists()


async def test_cortex_says_that_it_keeps_no_state(directory: Path) -> None:
    """Without a home directory, and with one that it cannot write."""
    (directory / "cortex.toml").write_text('[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n')
    (directory / "models.toml").write_text("")
    log = directory / "cortex.log"
    for environ, words in (
        ({}, "no state is kept"),
        ({"HOME": "/proc"}, "no state can be kept in /proc/.local/state/cortex"),
    ):
        with log.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *as_nameless(sys.executable, "-m", "cortex", "serve", "--config", str(directory / "cortex.toml")),
                cwd=REPOSITORY,
                env={"PATH": os.environ["PATH"], **environ},
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
            )
        try:
            await until(lambda: process.returncode is not None or "cortex listening on" in log.read_text(), 40)  # noqa: B023 - awaited here
            assert process.returncode is None, log.read_text()
            assert words in log.read_text()
        finally:
            process.terminate()
            await process.wait()
