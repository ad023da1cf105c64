"""A process that has imported an engine's modules and waits to become the engine.

Run by path as `python FILE FD PADDING` under the engine's interpreter, whose Python and packages may differ from
neuron's: standard library only. FD is a stream socket to neuron, with one JSON object a line:

    neuron -> spare  {"program": PATH, "module": NAME or null, "imports": [MODULE, ...], "spawns": BOOL,
                      "late": [NAME, ...], "children": {CHILD: [NAME, ...]}}
    spare -> neuron  {"ready": true}  or  {"failed": REASON}
    neuron -> spare  {"arguments": [...], "title": [...], "name": NAME, "set": {NAME: VALUE}, "unset": [NAME, ...]}
    spare -> neuron  {"taken": true}  or  {"refused": REASON}

After `taken` it runs the program with the arguments, as the interpreter would have done. It ends when neuron closes the
socket, or dies, before that. PADDING makes room: the command line of /proc is replaced, and cannot grow.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, popen_forkserver, popen_spawn_posix, spawn, util
from multiprocessing.context import SpawnProcess
from typing import Any

_THREADS = "OMP_NUM_THREADS"
_INHERITED = "neuron_inherited"
_CONTEXTS = ("/dev/nvidia-uvm", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, CUDA on WSL
Snapshot = dict[str, tuple[int, int]]  # path -> inode, time of the last change in ns


def main() -> None:
    """Imports, waits, becomes the engine."""
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    lines = link.makefile("r", encoding="utf-8", newline="\n")
    setup = json.loads(lines.readline() or "null")
    if setup is None:
        os._exit(0)
    started_ns = time.time_ns()
    _set_search_path(setup)
    scheduling = Scheduling.lowered()
    with _killed_with(link):
        failure = _import_all(setup["imports"])
    files = _files_read(setup["program"])
    failure = failure or _newer_than(files, started_ns) or _open_device()
    _send(link, {"failed": failure} if failure else {"ready": True})
    order = None if failure else json.loads(lines.readline() or "null")
    if order is None:
        os._exit(0)
    refusal = _changed(files) or scheduling.restore()
    if refusal:
        _send(link, {"refused": refusal})
        os._exit(0)
    _take(setup, order)
    _send(link, {"taken": True})
    lines.close()
    link.close()
    _become(setup, order)


def _send(link: socket.socket, message: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # neuron is gone: the next read says so
        link.sendall(json.dumps(message).encode() + b"\n")


def _set_search_path(setup: dict[str, Any]) -> None:
    """Makes `sys.path` start as it does for the program itself."""
    own = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.abspath(sys.path[0]) == own:
        sys.path[0] = os.getcwd() if setup["module"] else os.path.dirname(os.path.realpath(setup["program"]))


@contextlib.contextmanager
def _killed_with(link: socket.socket) -> Iterator[None]:
    """Within the body the kernel kills this process when neuron closes its end, or dies. Imports run for seconds
    without a look at the socket, and PR_SET_PDEATHSIG would fire at the end of the thread of neuron that started us."""
    fcntl.fcntl(link, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(link, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(link, fcntl.F_GETFL)
    fcntl.fcntl(link, fcntl.F_SETFL, flags | os.O_ASYNC)
    try:
        yield
    finally:
        fcntl.fcntl(link, fcntl.F_SETFL, flags)
        fcntl.fcntl(link, fcntl.F_SETSIG, 0)


class Scheduling:
    """The policy this process was started with. Until it becomes the engine it runs only when the CPU is idle."""

    def __init__(self, policy: int, parameter: os.sched_param) -> None:
        self._policy = policy
        self._parameter = parameter

    @classmethod
    def lowered(cls) -> Scheduling:
        """Lowers it. Only a privileged process may leave SCHED_IDLE (or one with RLIMIT_NICE), so a child tries first;
        the fallback SCHED_BATCH can always be left."""
        before = cls(os.sched_getscheduler(0), os.sched_getparam(0))
        zero = os.sched_param(0)
        child = os.fork()
        if child == 0:
            try:
                os.sched_setscheduler(0, os.SCHED_IDLE, zero)
                os.sched_setscheduler(0, before._policy, before._parameter)
            except OSError:
                os._exit(1)
            os._exit(0)
        undone = os.waitpid(child, 0)[1] == 0
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE if undone else os.SCHED_BATCH, zero)
        return before

    def restore(self) -> str | None:
        """Restores the policy of every thread; why it could not, if so."""
        try:
            for thread in os.listdir("/proc/self/task"):
                os.sched_setscheduler(int(thread), self._policy, self._parameter)
        except OSError as error:
            return f"its scheduling policy cannot be restored: {error}"
        return None


def _import_all(names: Sequence[str]) -> str | None:
    """Imports the first name, which the engine needs, and as many of the others as exist. Returns why it failed."""
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001 - an import may do anything, even exit
            if name == names[0] or not isinstance(error, ImportError):
                return f"cannot import {name}: {type(error).__name__}: {error}"
    if threading.active_count() > 1:
        running = sorted(thread.name for thread in threading.enumerate())
        return f"the imports started threads ({', '.join(running)})"
    return None


def _files_read(program: str) -> Snapshot:
    """What this process was made from: its interpreter, the program, every imported file, the packages' directories."""
    paths = {os.path.realpath(sys.executable), program}
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str):
            paths.add(path)
    paths.update(path for path in sys.path if path.endswith("-packages"))
    return {path: identity for path in paths if (identity := _identity(path)) is not None}


def _identity(path: str) -> tuple[int, int] | None:
    """Inode and time of change, which an upgrade changes even if it restores the time of modification."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns if stat.S_ISDIR(found.st_mode) else found.st_ctime_ns


def _newer_than(files: Snapshot, started_ns: int) -> str | None:
    """A file that changed while it was imported: what this process holds may be half of each version."""
    for path, (_, changed_ns) in files.items():
        if changed_ns > started_ns and not os.path.isdir(path):
            return f"{path} changed during the imports"
    return None


def _changed(files: Snapshot) -> str | None:
    for path, identity in files.items():
        if _identity(path) != identity:
            return f"{path} has changed since it was imported"
    return None


def _open_device() -> str | None:
    """A driver in which the imports have a context: the engine could no longer choose its device, nor fork. NVML opens
    other files (/dev/nvidiactl, /dev/nvidia0) and has no context; torch leaves it open."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{entry}")
            if path.startswith(_CONTEXTS):
                return f"its imports opened {path}"
    return None


def _take(setup: dict[str, Any], order: dict[str, Any]) -> None:
    os.environ.update(order["set"])
    for name in order["unset"]:
        os.environ.pop(name, None)
    if setup["spawns"]:
        _fork_children_from_copy(setup["late"], setup["children"])
    with contextlib.suppress(OSError):  # after the fork: a child may set its own title
        _set_title(order["title"])
        with open("/proc/self/comm", "w") as file:
            file.write(order["name"])


def _set_title(title: Sequence[str]) -> None:
    """Overwrites the arguments in /proc/PID/cmdline, padded with spaces, but not the environment after them."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
    text = b"\0".join(map(os.fsencode, title))[: end - start - 1]
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write(text.ljust(end - start - 1) + b"\0")


def _fork_children_from_copy(late: Sequence[str], children: dict[str, list[str]]) -> None:
    """Makes multiprocessing's `spawn` fork from a copy of this process, taken now, instead of starting an interpreter.

    The copy is Python's own fork server, which has imported everything, has one thread and has run nothing: a child
    gets its task pickled, as with `spawn`. Forking the engine itself would be unsafe: by then it has threads.

    A child whose environment has changed since then, in more than the variables `late` and those of `children` that its
    name begins with, is spawned: the dynamic loader or an import may read the others.
    """
    before = dict(os.environ)
    executable = spawn.get_executable()
    spawn_interpreter, preparation_data, prepare = util.spawnv_passfds, spawn.get_preparation_data, spawn.prepare

    def popen(process: Any) -> Any:
        changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
        free = {_THREADS, *late}
        for name, also in children.items():
            free.update(also if process.name.startswith(name) else ())
        # Another interpreter is a wrapper, such as numactl's.
        if changed <= free and spawn.get_executable() == executable:
            with contextlib.suppress(ConnectionError, EOFError, FileNotFoundError):  # the fork server is gone
                return popen_forkserver.Popen(process)
        return popen_spawn_posix.Popen(process)

    def inherited(name: str) -> dict[str, Any]:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        return {**preparation_data(name), _INHERITED: {"environ": dict(os.environ), "limits": limits}}

    def prepare_with(data: dict[str, Any]) -> None:
        _inherit(data.pop(_INHERITED))
        prepare(data)

    def fork_server(path: Any, args: Sequence[Any], passed: Sequence[int]) -> int:
        if "multiprocessing.forkserver" not in os.fsdecode(args[-1]):
            return spawn_interpreter(path, args, passed)  # the resource tracker
        pid = os.fork()
        if pid == 0:
            setattr(spawn, "prepare", prepare_with)  # noqa: B010
            _serve_forks(os.fsdecode(args[-1]), passed)
        return pid

    # setattr: the types say that none of these is meant to be assigned.
    setattr(SpawnProcess, "_Popen", staticmethod(popen))  # noqa: B010
    setattr(spawn, "get_preparation_data", inherited)  # noqa: B010
    setattr(util, "spawnv_passfds", fork_server)  # noqa: B010
    try:
        forkserver.set_forkserver_preload([])
        forkserver.ensure_running()
    finally:
        setattr(util, "spawnv_passfds", spawn_interpreter)  # noqa: B010


def _serve_forks(command: str, passed: Sequence[int]) -> None:
    status = 1
    try:
        kept = {0, 1, 2, *passed}
        for entry in os.listdir("/proc/self/fd"):
            if int(entry) not in kept:
                with contextlib.suppress(OSError):
                    os.close(int(entry))
        gc.freeze()  # a collection in a child would copy every page
        # A child's own children are forked here too; it must not look for a server that it has started.
        setattr(forkserver._forkserver, "ensure_running", lambda: None)  # noqa: B010
        exec(command, {})  # noqa: S102 - what Python would run as `python -c`
        status = 0
    finally:
        os._exit(status)


def _inherit(given: dict[str, Any]) -> None:
    """Gives a forked child what a spawned one has from its parent and from its imports."""
    threads = os.environ.get(_THREADS)
    for name in os.environ.keys() - given["environ"].keys():
        del os.environ[name]
    # Only what differs: setproctitle finds the memory of the arguments through the original environment before it.
    os.environ.update({name: value for name, value in given["environ"].items() if os.environ.get(name) != value})
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, given["limits"])
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        numpy.random.seed()  # it is seeded by its import; Python reseeds its own generator after a fork
    wanted = os.environ.get(_THREADS, "")
    if torch is not None and wanted != threads and wanted.isdecimal():
        torch.set_num_threads(int(wanted))  # torch reads it when it is imported


def _become(setup: dict[str, Any], order: dict[str, Any]) -> None:
    sys.argv = [setup["program"], *order["arguments"]]
    sys.orig_argv = list(order["title"])
    if setup["module"]:
        runpy.run_module(setup["module"], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(setup["program"], run_name="__main__")


if __name__ == "__main__":
    main()
