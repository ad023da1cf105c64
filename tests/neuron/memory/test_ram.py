"""What is read of the host's RAM, its control groups and its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from neuron.memory.ram import ProcessRam, RamFigures, host_ram, node_ram_mb, ram_of

MIB = 2**20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def meminfo(total_mb: int, available_mb: int) -> dict[str, str]:
    lines = (
        f"MemTotal: {total_mb * 1024} kB\nMemFree: 1 kB\nMemAvailable: {available_mb * 1024} kB\nHugePages_Total: 0\n"
    )
    return {"proc/meminfo": lines}


def group(directory: str, most: str, used_mb: int, cache_mb: int = 0) -> dict[str, str]:
    half = cache_mb * MIB // 2
    return {
        f"{directory}/memory.max": f"{most}\n",
        f"{directory}/memory.current": f"{used_mb * MIB}\n",
        f"{directory}/memory.stat": f"anon 5\nactive_file {half}\ninactive_file {half}\n",
    }


def test_without_control_groups(tmp_path: Path) -> None:
    assert host_ram(write(tmp_path, meminfo(64_000, 40_000))) == RamFigures(64_000, 40_000)


@pytest.mark.parametrize(
    ("limit_mb", "used_mb", "cache_mb", "expected"),
    [
        (8_000, 3_000, 0, RamFigures(8_000, 5_000)),
        (8_000, 3_000, 1_000, RamFigures(8_000, 6_000)),  # the page cache can be taken back
        (8_000, 9_000, 0, RamFigures(8_000, 0)),
        (60_000, 1_000, 0, RamFigures(60_000, 40_000)),  # the host has less available
        (100_000, 1_000, 0, RamFigures(64_000, 40_000)),  # more than the host has
    ],
)
def test_limit_of_a_container(tmp_path: Path, limit_mb: int, used_mb: int, cache_mb: int, expected: RamFigures) -> None:
    files = meminfo(64_000, 40_000) | {"proc/self/cgroup": "0::/\n"}
    files |= group("sys/fs/cgroup", str(limit_mb * MIB), used_mb, cache_mb)
    assert host_ram(write(tmp_path, files)) == expected


def test_every_group_above_counts(tmp_path: Path) -> None:
    """A service without a limit in a slice with one. A group with "max" limits nothing."""
    files = meminfo(64_000, 40_000) | {"proc/self/cgroup": "0::/system.slice/neuron.service\n"}
    files |= group("sys/fs/cgroup/system.slice", str(16_000 * MIB), 10_000)
    files |= group("sys/fs/cgroup/system.slice/neuron.service", "max", 2_000)
    assert host_ram(write(tmp_path, files)) == RamFigures(16_000, 6_000)


def test_the_groups_name_may_be_the_hosts(tmp_path: Path) -> None:
    """A container that shares the host's namespace of control groups has its own group at the mount."""
    files = meminfo(64_000, 40_000) | {"proc/self/cgroup": "0::/kubepods/pod7/abc\n"}
    files |= group("sys/fs/cgroup", str(4_000 * MIB), 1_000)
    assert host_ram(write(tmp_path, files)) == RamFigures(4_000, 3_000)


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    mount = "sys/fs/cgroup/memory/docker/abc"
    files = meminfo(64_000, 40_000) | {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        f"{mount}/memory.limit_in_bytes": str(8_000 * MIB),
        f"{mount}/memory.usage_in_bytes": str(3_000 * MIB),
        f"{mount}/memory.stat": f"inactive_file 1\ntotal_inactive_file {1_000 * MIB}\ntotal_active_file 0\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(30_000 * MIB),
    }
    assert host_ram(write(tmp_path, files)) == RamFigures(8_000, 6_000)


def test_memory_of_a_numa_node(tmp_path: Path) -> None:
    node = "sys/devices/system/cpu/cpu3/node1/meminfo"
    files = meminfo(64_000, 40_000) | {node: f"Node 1 MemTotal: {32_000 * 1024} kB\nNode 1 MemFree: 1 kB\n"}
    root = write(tmp_path, files)
    assert (node_ram_mb(3, root), node_ram_mb(0, root)) == (32_000, 64_000)


def test_this_host() -> None:
    """As psutil reads it, or less in a container."""
    found, system = host_ram(), psutil.virtual_memory()
    assert 0 < found.available_mb <= found.total_mb <= system.total // MIB
    assert found.used_mb == found.total_mb - found.available_mb


def test_pages_that_processes_share_count_once(tmp_path: Path) -> None:
    """By the kernel's proportional size; where it cannot be read, by the resident one. A process that has ended counts
    nothing."""
    files = {
        "proc/7/smaps_rollup": "00-ff ---p 0 00:00 0 [rollup]\nRss: 8192 kB\nPss: 5120 kB\nPss_File: 2048 kB\n",
        "proc/8/status": "Name:\tvllm\nVmRSS:\t    3072 kB\nRssFile:\t 1024 kB\n",
        "proc/9/status": "Name:\tdefunct\nState:\tZ (zombie)\n",
    }
    root = write(tmp_path, files)
    assert ram_of([7], root) == ProcessRam(5, 2)
    assert ram_of([7, 8, 9, 10], root) == ProcessRam(8, 3)
    assert ram_of([9, 10], root) is None


def test_a_real_process() -> None:
    """What a process allocates shows in its figure."""
    allocate = (
        "import sys; held = bytearray(64 * 2**20); held[::4096] = b'x' * (2**14); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", allocate], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = ram_of([process.pid])
        process.communicate()
    assert found is not None
    assert 64 <= found.used_mb < 64 + 60
    assert ram_of([process.pid]) is None
    assert ram_of([os.getpid()]) is not None
