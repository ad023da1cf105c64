"""Clients of the packaged cortex, run inside the container by its Python: `package_clients.py STOP_FILE`.

Some read streams, some send short requests, each over a new connection, until the file exists. Prints a line of JSON:
how many ended well, and what else happened.
"""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from pathlib import Path

URL = "http://127.0.0.1:31313/v1/chat/completions"
STREAMS, SHORT = 2, 3
done = {"streams": 0, "short": 0}
failures: list[str] = []


def ask(*, stream: bool, tokens: int) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens, "stream": stream}
    request = urllib.request.Request(URL, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=100) as answer:
        return bytes(answer.read())


def work(kind: str, stop: Path) -> None:
    while not stop.exists():
        try:
            answer = ask(stream=kind == "streams", tokens=60 if kind == "streams" else 1)
            good = answer.rstrip().endswith(b"data: [DONE]") if kind == "streams" else b'"choices"' in answer
            if not good:
                failures.append(f"{kind}: {answer[-300:]!r}")
        except OSError as error:
            failures.append(f"{kind}: {error!r}")
        done[kind] += 1


if __name__ == "__main__":
    kinds = ["streams"] * STREAMS + ["short"] * SHORT
    threads = [threading.Thread(target=work, args=(kind, Path(sys.argv[1]))) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({**done, "failures": failures}))
