"""A real `cortex serve` as a process of its own: for what only a process has (memory, signals, uvloop)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import tomli_w

from shared.serve import bind
from tests.cortex.raw_http import DEADLINE_SECS, bounded, connected, request
from tests.processes import alive, eventually

TOP = Path(__file__).parents[2]
_PAGE = os.sysconf("SC_PAGE_SIZE")


class NeuronAddress(Protocol):
    """A neuron's entry in cortex.toml."""

    @property
    def name(self) -> str: ...

    @property
    def url(self) -> str: ...


@dataclass(frozen=True)
class ListedNeuron:
    """A neuron's entry for a process that does not know its name itself."""

    name: str
    url: str


def neuron_at(port: int, name: str = "n") -> ListedNeuron:
    """The entry of a neuron on this host."""
    return ListedNeuron(name, f"http://127.0.0.1:{port}")


@dataclass(frozen=True)
class CortexProcess:
    """A serving cortex."""

    process: asyncio.subprocess.Process
    url: str
    log_file: Path

    def log(self) -> str:
        """Its log so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def rss_bytes(self) -> int:
        """Memory of the process that is in RAM."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE

    def reset_peak(self) -> None:
        """Forgets the highest memory use until now (proc(5), clear_refs)."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", encoding="ascii")

    def peak_rss_bytes(self) -> int:
        """The highest memory use since `reset_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def fds(self) -> int:
        """The number of its open file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208 - a directory of /proc, only counted

    async def ended(self, *, secs: float = DEADLINE_SECS) -> int:
        """Its exit status, as soon as it has one."""
        return await bounded(self.process.wait(), secs=secs)


@contextlib.asynccontextmanager
async def cortex_process(
    directory: Path,
    neurons: Iterable[NeuronAddress],
    models: list[dict[str, Any]],
    *,
    poll_secs: float = 0.05,
    unhealthy_after: int = 3,
    routing: Mapping[str, Any] | None = None,
    waiting: Mapping[str, Any] | None = None,
    placement: Mapping[str, Any] | None = None,
    state_dir: str | None = None,
    database: str | None = None,
    keys: Mapping[str, Any] | None = None,
    auth: Mapping[str, Any] | None = None,
    discovery: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    **gateway: Any,
) -> AsyncIterator[CortexProcess]:
    """Runs inside the body, every neuron healthy; killed after it if it still runs. `gateway` and the others are
    sections of cortex.toml; `host` is what it listens on."""
    sock = bind(host, port)
    url = f"{'https' if 'tls_cert' in gateway else 'http'}://127.0.0.1:{sock.getsockname()[1]}"
    config: dict[str, Any] = {
        "gateway": {"metrics_listen": "127.0.0.1:0", **gateway},
        "poll": {"interval_secs": poll_secs, "unhealthy_after": unhealthy_after},
        "routing": dict(routing or {}),
        "waiting": dict(waiting or {}),
        "keys": dict(keys or {}),
        "auth": dict(auth or {}),
        "discovery": dict(discovery or {}),
        "placement": dict(placement or {}),
        "neurons": [{"name": neuron.name, "endpoint": neuron.url} for neuron in neurons],
    }
    if state_dir is not None:
        config["state_dir"] = state_dir
    if database is not None:
        config["database"] = database
    (directory / "cortex.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    (directory / "models.toml").write_text(tomli_w.dumps({"models": models}), encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CORTEX_")}
    with sock, (directory / "cortex.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "cortex", "serve", "--config", str(directory / "cortex.toml"), "--fd", str(sock.fileno())),
            stdout=log,
            stderr=log,
            cwd=TOP,
            env=environ,
            pass_fds=(sock.fileno(),),
        )
    try:
        await _healthy(url, empty=bool(discovery))
        yield CortexProcess(process, url, directory / "cortex.log")
    finally:
        if process.returncode is None:
            children: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children()
            process.kill()
            await process.wait()
            for child in children:  # the recorder would finish its start and have a last look, which takes a second
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            pids = [child.pid for child in children]
            await asyncio.to_thread(eventually, lambda: not alive(pids), "no child", within_secs=DEADLINE_SECS)
        print((directory / "cortex.log").read_text(encoding="utf-8", errors="replace"))  # pytest shows it on failure


async def _healthy(url: str, *, empty: bool) -> None:
    """Waits until every neuron is healthy; if the fleet may be `empty`, until cortex answers."""
    asking = request(method="GET", target="/health")
    health: dict[str, Any] = {}
    while health.get("status") != "ok" and not (empty and health):
        # On a busy machine several workers take long to start. The test's time-out is the deadline.
        with contextlib.suppress(asyncio.TimeoutError):
            async with connected(url) as client:
                while health.get("status") != "ok" and not (empty and health):
                    health = json.loads((await client.ask(asking)).body)
