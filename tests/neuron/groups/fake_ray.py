"""A stand-in for the `ray` command: `ray start` of a head, and of a node that joins it."""

from __future__ import annotations

import argparse
import socket
import threading


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["start"])
    for flag in ("--head", "--block", "--disable-usage-stats"):
        parser.add_argument(flag, action="store_true")
    for option in ("--port", "--address", "--num-gpus", "--node-ip-address", "--include-dashboard", "--temp-dir"):
        parser.add_argument(option)
    given = parser.parse_args()
    if given.head:
        nodes: list[socket.socket] = []
        with socket.create_server((given.node_ip_address, int(given.port))) as server:
            while True:
                nodes.append(server.accept()[0])
    host, _, port = given.address.rpartition(":")
    with socket.create_connection((host, int(port))):
        print("SUCC scripts.py:1251 -- Ray runtime started.", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
