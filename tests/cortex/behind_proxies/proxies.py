"""nginx and caddy in front of a cortex, in their stock configurations and with the snippets of docs/proxies.md."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.contract.documents import TOP
from tests.ports import free_port

STOCK_NGINX = "server { listen 127.0.0.1:PORT; location / { proxy_pass http://CORTEX; } }"
STOCK_CADDY = "http://127.0.0.1:PORT {\n\treverse_proxy CORTEX\n}\n"


def snippet(language: str) -> str:
    """The fenced block of docs/proxies.md in this language."""
    text = (TOP / "docs" / "proxies.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return str(block)


def documented_nginx() -> str:
    """The snippet, without the TLS that a test has no certificate for."""
    text = snippet("nginx").replace("127.0.0.1:31313", "CORTEX").replace("listen 443 ssl;", "listen 127.0.0.1:PORT;")
    return re.sub(r"^ *ssl_.*$", "", text, flags=re.MULTILINE)


def documented_caddy() -> str:
    """The snippet, on a port without TLS."""
    text = snippet("caddyfile").replace("127.0.0.1:31313", "CORTEX")
    return text.replace("llm.example.com {", "http://127.0.0.1:PORT {")


@contextlib.asynccontextmanager
async def nginx(cortex_url: str, directory: Path, server: str) -> AsyncIterator[str]:
    """The URL of a running nginx: its distribution's nginx.conf with `server` in place of the enabled sites."""
    port = free_port()
    conf = nginx_conf(directory, filled(server, port, cortex_url))
    command = ("nginx", "-c", str(conf), "-g", "daemon off;", "-e", f"{directory}/error.log")
    async with _running(*command, port=port):
        yield f"http://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def caddy(cortex_url: str, directory: Path, site: str) -> AsyncIterator[str]:
    """The URL of a running caddy."""
    port = free_port()
    conf = caddyfile(directory, filled(site, port, cortex_url))
    command = ("caddy", "run", "--config", str(conf), "--adapter", "caddyfile")
    async with _running(*command, port=port, home=directory):
        yield f"http://127.0.0.1:{port}"


def nginx_conf(directory: Path, server: str) -> Path:
    """The distribution's file, with all that it writes below `directory`. Skips the test without nginx."""
    stock = Path("/etc/nginx/nginx.conf")
    if shutil.which("nginx") is None or not stock.exists():
        pytest.skip("nginx is not installed")
    site, conf = directory / "site.conf", directory / "nginx.conf"
    site.write_text(server, encoding="utf-8")
    text = stock.read_text(encoding="utf-8")
    text = re.sub(r"^include .*modules-enabled.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^user .*$", "user root;" if os.getuid() == 0 else "", text, flags=re.MULTILINE)
    text = re.sub(r"^pid .*$", f"pid {directory}/pid;", text, flags=re.MULTILINE)
    text = re.sub(r"/var/log/nginx", str(directory), text)
    text = re.sub(r"include /etc/nginx/(conf\.d|sites-enabled)/\*.*;", "", text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
    conf.write_text(text.replace("http {", f"http {{ {paths} include {site};", 1), encoding="utf-8")
    return conf


def caddyfile(directory: Path, site: str) -> Path:
    """Skips the test without caddy."""
    if shutil.which("caddy") is None:
        pytest.skip("caddy is not installed")
    conf = directory / "Caddyfile"
    conf.write_text("{\n\tadmin off\n\tauto_https off\n}\n" + site, encoding="utf-8")
    return conf


def filled(text: str, port: int, cortex_url: str) -> str:
    return text.replace("CORTEX", urlsplit(cortex_url).netloc).replace("PORT", str(port))


@contextlib.asynccontextmanager
async def _running(*command: str, port: int, home: Path | None = None) -> AsyncIterator[None]:
    environment = os.environ if home is None else {**os.environ, "HOME": str(home), "XDG_DATA_HOME": str(home)}
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    assert process.stderr is not None
    output = asyncio.create_task(process.stderr.read())
    try:
        for _ in range(500):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            if process.returncode is not None:
                raise AssertionError((await output).decode())
            await asyncio.sleep(0.02)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        await output
