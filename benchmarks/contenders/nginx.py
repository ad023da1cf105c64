"""nginx: the lower bound. It only forwards, and writes its access log."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

from benchmarks.contenders.contender import Contender, ContenderUnavailable, Launch, Place

_CONFIG = """
daemon off;
master_process on;
worker_processes {workers};
worker_rlimit_nofile 65536;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
{user}
events {{ worker_connections 32768; }}
http {{
    access_log {directory}/access.log combined{log_buffer};
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_max_body_size 64m;
    keepalive_requests 1000000;
    keepalive_timeout 600s;
    tcp_nodelay on;
    upstream engine {{
        server 127.0.0.1:{engine_port};
        keepalive 16384;
        keepalive_requests 1000000;
        keepalive_timeout 600s;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=16384;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


def _prepare(place: Place, workers: int = 1) -> Launch:
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise ContenderUnavailable("nginx is not installed (apt-get install nginx-light)")
    config = place.directory / "nginx.conf"
    config.write_text(
        _CONFIG.format(
            directory=place.directory,
            engine_port=place.engine_port,
            port=place.port,
            workers=workers,
            user="user root;" if os.geteuid() == 0 else "",
            log_buffer=" buffer=64k flush=1s",
        ),
        encoding="utf-8",
    )
    return Launch([program, "-c", str(config), "-e", str(place.directory / "error.log")], version=_version(program))


def _version(program: str) -> str:
    done = subprocess.run([program, "-v"], capture_output=True, text=True, check=False, timeout=10)
    found = re.search(r"nginx/(\S+)", done.stderr)
    return found[1] if found else Path(program).name


_ON = (
    "proxy_pass to one server, keep-alive on both sides, buffering off, access log on (64 KiB buffer); no routing, "
    "no key, no metrics"
)
NGINX = Contender("nginx", "nginx", _ON, _prepare)
NGINX_2 = Contender("nginx-2", "nginx, two workers", _ON, partial(_prepare, workers=2), workers=2)
"""Memory of a second worker on this machine, for any contender."""
