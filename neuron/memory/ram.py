"""The host's RAM: how much there is, how much of it programs can still allocate, and what processes use. Blocks for
moments."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

_KIB_IN_MIB = 1024
_MIB = 2**20
_ROOT = Path("/")


@dataclass(frozen=True)
class RamFigures:
    """MiB. `available_mb` is what programs can allocate without swapping."""

    total_mb: int
    available_mb: int

    @property
    def used_mb(self) -> int:
        return max(0, self.total_mb - self.available_mb)


@dataclass(frozen=True)
class ProcessRam:
    """MiB that processes use together; a page that several share counts in parts. `file_mb` of it are pages of mapped
    files, which the kernel counts as available, since it can read them again."""

    used_mb: int
    file_mb: int = 0


def host_ram(root: Path = _ROOT) -> RamFigures:
    """This host's RAM, or what the control groups of this process leave of it, as in a container. `root`: where /proc
    and /sys are.

    Raises:
        OSError, KeyError, ValueError: /proc/meminfo cannot be read.
    """
    kib = dict(_fields(root / "proc/meminfo"))
    total, available = kib["MemTotal"] // _KIB_IN_MIB, kib["MemAvailable"] // _KIB_IN_MIB
    for limit, used in _group_limits(root):
        total = min(total, limit // _MIB)
        available = min(available, max(0, limit - used) // _MIB)
    return RamFigures(total, min(available, total))


def node_ram_mb(cpu: int, root: Path = _ROOT) -> int:
    """MiB of the NUMA node of a core, at most what `host_ram` says; all of the host's where the kernel tells no nodes.

    Raises:
        OSError, KeyError, ValueError: /proc/meminfo cannot be read.
    """
    total = host_ram(root).total_mb
    for node in (root / f"sys/devices/system/cpu/cpu{cpu}").glob("node[0-9]*"):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            words = (line.split() for line in (node / "meminfo").read_text(encoding="ascii").splitlines())
            kib = {each[2].rstrip(":"): int(each[3]) for each in words if len(each) > 3}
            return min(total, kib["MemTotal"] // _KIB_IN_MIB)
    return total


def ram_of(pids: Collection[int], root: Path = _ROOT) -> ProcessRam | None:
    """What these processes use: their proportional set size (PSS), or where that cannot be read their resident set
    size, which counts shared pages in each. None if none of them can be read."""
    found = [each for pid in pids if (each := _process_ram(root / "proc" / str(pid))) is not None]
    if not found:
        return None
    used, files = sum(used for used, _ in found), sum(files for _, files in found)
    return ProcessRam(-(-used // _KIB_IN_MIB), files // _KIB_IN_MIB)


def _process_ram(directory: Path) -> tuple[int, int] | None:
    """KiB in all, and of mapped files."""
    with contextlib.suppress(OSError, ValueError):
        kib = dict(_fields(directory / "smaps_rollup"))
        if "Pss" in kib:
            return kib["Pss"], kib.get("Pss_File", 0)
    with contextlib.suppress(OSError, ValueError):
        kib = dict(_fields(directory / "status"))
        if "VmRSS" in kib:  # a zombie has none
            return kib["VmRSS"], kib.get("RssFile", 0)
    return None


def _fields(path: Path) -> Iterator[tuple[str, int]]:
    """Lines such as `MemTotal:  16384 kB`."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            yield name, int(words[0])


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each control group that this process is in, and what its processes use without what the kernel can
    take back, in bytes. Groups without a limit are left out."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            mount, limit, usage, prefix = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit, usage, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        for group in _with_parents(mount, path):
            with contextlib.suppress(OSError, ValueError):  # "max" means no limit
                most = int((group / limit).read_text(encoding="ascii"))
                used = int((group / usage).read_text(encoding="ascii"))
                yield most, used - _reclaimable(group / "memory.stat", prefix)


def _with_parents(mount: Path, path: str) -> Iterator[Path]:
    """The directories of a group and those above it. In a container that sees the host's names but only its own group,
    that one is at the mount."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _reclaimable(path: Path, prefix: str) -> int:
    """Bytes of the page cache."""
    with contextlib.suppress(OSError, ValueError):
        counts = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
        return sum(int(counts.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))
    return 0
