"""The contenders by name."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contenders.aiohttp_proxy import AIOHTTP
from benchmarks.contenders.contender import Contender
from benchmarks.contenders.cortex import cortex
from benchmarks.contenders.direct import DIRECT
from benchmarks.contenders.nginx import NGINX, NGINX_2
from benchmarks.contenders.packages import PACKAGES
from benchmarks.contenders.process import REPOSITORY


def contenders(checkout: Path = REPOSITORY, baseline: Path | None = None) -> dict[str, Contender]:
    """All contenders: cortex from `checkout` and, if given, from `baseline`."""
    lineup = [
        NGINX,
        NGINX_2,
        cortex(checkout),
        cortex(checkout, "cortex-2", "cortex, two workers", workers=2),
        cortex(checkout, "cortex-v1", "cortex, protocol v1 neuron", protocol_v1=True),
        cortex(checkout, "cortex-py", "cortex, not compiled", interpreted=True),
        *PACKAGES,
        AIOHTTP,
        DIRECT,
    ]
    if baseline is not None:
        lineup.append(cortex(baseline, "cortex-base", f"cortex of {baseline.name}"))
    return {contender.name: contender for contender in lineup}
