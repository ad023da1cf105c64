"""One spare process with programs of all kinds: what it becomes, and how its children start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from neuron.engine import session
from neuron.engine.state_dir import EngineDir
from neuron.harness.base import ENGINE_ID_VARIABLE, EarlyImports, EngineCommand
from neuron.lifecycle.spare.program import NotPython, program_of
from neuron.lifecycle.spare.spare import Spare, SpareFailed, SpareOrigin, SpareRefused
from shared.protocol import Device
from tests.neuron.neurons import until

PROGRAM = """\
import json, multiprocessing, os, resource, sys

def child(queue, depth):
    if depth:
        os.environ["LATE"] += "r"
        nested = multiprocessing.get_context("spawn").Process(target=child, args=(queue, depth - 1))
        nested.start()
        nested.join()
        sys.exit(nested.exitcode)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    queue.put(("wave" in sys.modules, os.environ["LATE"], os.getsid(0), sys.argv[1:], __name__, limit))
    sys.exit(7)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    resource.setrlimit(resource.RLIMIT_NOFILE, (321, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    process = context.Process(target=child, args=(queue, 1))
    process.start()
    told = queue.get()
    process.join()
    os.environ["EARLY"] = "1"
    spawned = context.Process(target=child, args=(queue, 0))
    spawned.start()
    fresh = queue.get()
    spawned.join()
    named = context.Process(target=child, args=(queue, 0), name="Core_1")
    named.start()
    core = queue.get()
    named.join()
    print(json.dumps({"core": core[:2], "child": told, "fresh": fresh[:2], "exit": process.exitcode, "argv": sys.argv,
                      "path": sys.path[0], "late": os.environ.get("LATE"), "pid": os.getpid(),
                      "name": open("/proc/self/comm").read().strip()}))
    sys.exit(5)
"""


@asynccontextmanager
async def spare_for(
    tmp_path: Path, argv: list[str], imports: EarlyImports, env: dict[str, str] | None = None
) -> AsyncIterator[Spare]:
    """A spare of a command, not ready yet; gone at the end."""
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    command = EngineCommand(tuple(argv), {**os.environ, "LATE": "old", **(env or {})})
    origin = SpareOrigin(command, (), imports)
    spare = await Spare.start(origin, 1, "test/1", EngineDir(tmp_path, tmp))
    try:
        yield spare
    finally:
        await spare.close()
        _ = await spare.process.kill()


def imports(*modules: str) -> EarlyImports:
    return EarlyImports(
        modules or ("wave",), frozenset({"LATE"}), spawns=True, child_variables={"Core": frozenset({"EARLY"})}
    )


async def test_it_becomes_the_program_and_its_children_have_the_imports(mark: str, tmp_path: Path) -> None:
    """Arguments, environment, search path and exit code are those of a plain start; a child, and a child of it, start
    with everything imported, in the engine's session, with its arguments and its environment of that moment. A child
    whose environment changed in what imports may read is spawned, unless that does not matter to it."""
    script = tmp_path / "serve"
    script.write_text(f"#!{sys.executable}\n{PROGRAM}")
    script.chmod(0o755)
    async with spare_for(tmp_path, [str(script), "old"], imports()) as spare:
        await spare.until_ready()
        wanted = {**spare.origin.command.env, "LATE": "new"}
        await spare.become(EngineCommand((str(script), "serve", "x y"), wanted))
        assert await spare.process.wait() == 5
        told = json.loads(spare.directory.log.read_text())
    pid = spare.process.pid
    assert told == {
        "child": [True, "newr", pid, ["serve", "x y"], "__mp_main__", 321],
        "core": [True, "new"],
        "fresh": [False, "new"],
        "exit": 7,
        "argv": [str(script), "serve", "x y"],
        "path": str(tmp_path),
        "late": "new",
        "pid": pid,
        "name": "serve",
    }


async def test_children_carry_the_engine_id(mark: str, tmp_path: Path) -> None:
    """The environment in /proc of a forked process is that of the spare: it must have the engine's id already."""
    script = tmp_path / "serve.py"
    script.write_text(
        "import multiprocessing, time\n"
        "def child():\n"
        "    print('up', flush=True)\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('spawn').Process(target=child).start()\n"
        "    time.sleep(60)\n"
    )
    async with spare_for(tmp_path, [sys.executable, str(script)], imports()) as spare:
        await spare.until_ready()
        own = {"TMPDIR": str(spare.directory.tmp), ENGINE_ID_VARIABLE: spare.engine_id}
        await spare.become(replace(spare.origin.command, env={**spare.origin.command.env, **own}))
        await until(lambda: "up" in spare.directory.log.read_text())
        family = await asyncio.to_thread(session.live_members, spare.process.leader)
        assert all(session.engine_id_of(pid) == "test/1" for pid in family)
        assert len(family) >= 3  # the program, the process that forks, the child
        os.kill(spare.process.pid, signal.SIGKILL)
        _ = await spare.process.wait()
        assert not session.live_members(spare.process.leader)


async def test_failed_import_is_told(mark: str, tmp_path: Path) -> None:
    """Only the first module is required."""
    script = tmp_path / "serve.py"
    script.write_text("")
    command = [sys.executable, str(script)]
    async with spare_for(tmp_path, command, imports("no_such_module_at_all")) as spare:
        with pytest.raises(SpareFailed, match="cannot import no_such_module_at_all"):
            await spare.until_ready()
        assert await spare.process.wait() == 0
    (tmp_path / "tmp").rmdir()
    async with spare_for(tmp_path, command, imports("wave", "no_such_module_at_all")) as spare:
        await spare.until_ready()


async def test_import_that_exits_or_hangs_in_a_thread_is_told(mark: str, tmp_path: Path) -> None:
    """A module that ends the process or starts a thread, which would not survive the fork."""
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "threads.py").write_text(
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()"
    )
    script = tmp_path / "serve.py"
    script.write_text("")
    for module, why in (("leaves", "SystemExit"), ("threads", "started threads")):
        async with spare_for(tmp_path, [sys.executable, str(script)], imports(module)) as spare:
            with pytest.raises(SpareFailed, match=why):
                await spare.until_ready()
        (tmp_path / "tmp").rmdir()


async def test_upgraded_module_is_refused(mark: str, tmp_path: Path) -> None:
    """A file that it has imported was replaced, with the same size and time."""
    module = tmp_path / "engine_part.py"
    module.write_text("VERSION = 1\n")
    script = tmp_path / "serve.py"
    script.write_text("")
    async with spare_for(tmp_path, [sys.executable, str(script)], imports("engine_part")) as spare:
        await spare.until_ready()
        before = module.stat()
        module.write_text("VERSION = 2\n")
        os.utime(module, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(SpareRefused, match=r"engine_part\.py has changed"):
            await spare.become(spare.origin.command)


def test_mismatch() -> None:
    """Only variables that imports do not read may differ, and the engine's own; devices must be of the same kind."""
    origin = SpareOrigin(EngineCommand(("v",), {"A": "1", "LATE": "1", "TMPDIR": "/x"}), (_device("H200"),), imports())
    changed: Callable[[dict[str, str]], EngineCommand] = lambda env: replace(origin.command, env=env)  # noqa: E731
    late = changed({"A": "1", "LATE": "2", "TMPDIR": "/y", ENGINE_ID_VARIABLE: "i"})
    assert origin.mismatch(late, (_device("H200", 3),)) is None
    assert "A, B changed" in (origin.mismatch(changed({"B": "1", "LATE": "1", "TMPDIR": "/x"}), ()) or "")
    assert "another kind" in (origin.mismatch(origin.command, (_device("L4"),)) or "")


def _device(name: str, index: int = 0) -> Device:
    return Device(index=index, name=name, compute_capability="9.0")


def test_program_of(tmp_path: Path) -> None:
    """The forms that pip, uv and conda write, and a module; a shell script and a wrapper are none."""
    python = sys.executable
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def script(head: str) -> str:
        path = tmp_path / "vllm"
        path.write_text(f"{head}\nimport sys\n")
        path.chmod(0o755)
        return str(path)

    path = script(f"#!{python}")
    assert program_of(["vllm", "serve", "m"], env).interpreter == (python,)
    assert program_of(["vllm", "serve", "m"], env).path == path
    assert program_of(["vllm", "serve", "m"], env).arguments == ("serve", "m")
    assert program_of(["vllm", "serve", "m"], env).name == "vllm"
    script(f"#!{python} -s")
    assert program_of(["vllm"], env).interpreter == (python, "-s")
    script(f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''")
    assert program_of(["vllm"], env).interpreter == (python,)
    assert program_of(["vllm"], env).name == Path(python).name
    script("#!/usr/bin/env python3")
    assert program_of(["vllm"], env).interpreter[0].endswith("python3")
    assert program_of(["vllm"], env).name == "python3"
    module = program_of([python, "-u", "-m", "vllm.entrypoints.cli.main", "serve"], env)
    assert (module.interpreter, module.module, module.arguments) == (
        (python, "-u"),
        "vllm.entrypoints.cli.main",
        ("serve",),
    )
    for head in ("#!/bin/sh", "#!/usr/bin/perl", "", f"#!{python} -c pass"):
        script(head)
        with pytest.raises(NotPython, match="not a Python script"):
            program_of(["vllm"], env)
    with pytest.raises(NotPython, match="not an executable"):
        program_of(["no-such-command"], env)
    with pytest.raises(NotPython, match="not followed by"):
        program_of([python, "-c", "pass"], env)
