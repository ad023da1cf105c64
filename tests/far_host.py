"""A host that can vanish: a network namespace behind a virtual cable, with sockets that this process uses."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

_CLONE_NEWNET: Final = 0x40000000
_numbers = itertools.count()


class FarHost:
    """`address` is the far host's, `near_address` is ours on the cable to it."""

    def __init__(self, name: str, near_address: str, address: str) -> None:
        self.name = name
        self.near_address = near_address
        self.address = address

    def new_socket(self) -> socket.socket:
        """A new TCP socket of the far host."""
        made: list[socket.socket] = []
        thread = threading.Thread(target=lambda: made.append(_socket_in(Path("/run/netns", self.name))))
        thread.start()
        thread.join()
        return made[0]

    def listening(self) -> socket.socket:
        """A socket that listens on the far host."""
        sock = self.new_socket()
        sock.bind((self.address, 0))
        sock.listen(128)
        sock.setblocking(False)
        return sock

    def vanish(self) -> None:
        """From now on the host neither receives nor sends; its connections stay open."""
        for chain in ("INPUT", "OUTPUT"):
            _ip("netns", "exec", self.name, "iptables", "-w", "-I", chain, "-j", "DROP")

    def come_back(self) -> None:
        for chain in ("INPUT", "OUTPUT"):
            _ip("netns", "exec", self.name, "iptables", "-w", "-F", chain)


@contextlib.contextmanager
def far_host(*, mtu: int = 1500) -> Iterator[FarHost]:
    """Skips the test where network namespaces cannot be made."""
    if os.getuid() != 0 or shutil.which("ip") is None or shutil.which("iptables") is None:
        pytest.skip("needs root, ip and iptables")
    number = _new_namespace()
    name, near = f"far{number}", f"near{number}"
    high, low = divmod(number, 64)
    network = f"10.{128 + high // 256}.{high % 256}"
    host = FarHost(name, f"{network}.{low * 4 + 1}", f"{network}.{low * 4 + 2}")
    try:
        _ip(
            "link", "add", near, "mtu", str(mtu), "type", "veth", "peer", "name", "eth0", "mtu", str(mtu), "netns", name
        )
        _ip("address", "add", f"{host.near_address}/30", "dev", near)
        _ip("link", "set", near, "up")
        _ip("-netns", name, "address", "add", f"{host.address}/30", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-netns", name, "link", "set", device, "up")
        yield host
    finally:
        _ip("netns", "delete", name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", near)  # a namespace with open sockets lives on


def _new_namespace() -> int:
    """The number of a new namespace, `far<number>`. Another test may use one at the same time, or have left one."""
    while True:
        number = (os.getpid() * 8 + next(_numbers)) % 32768
        try:
            _ip("netns", "add", f"far{number}")
        except subprocess.CalledProcessError as error:
            if "File exists" not in error.stderr:
                pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        else:
            return number


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _socket_in(namespace: Path) -> socket.socket:
    """Runs in a thread of its own, which it leaves in the namespace; a socket stays where it was made."""
    libc = ctypes.CDLL(None, use_errno=True)
    with namespace.open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    return socket.socket()
