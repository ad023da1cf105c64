"""Gateways from the Python package index, each in its own cached virtual environment."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.contenders.contender import Contender, ContenderUnavailable, Launch, Place
from benchmarks.contenders.process import free_port
from benchmarks.engine.answers import MODEL
from benchmarks.load.request import API_KEY
from tests.environment.cache import EnvironmentUnavailable, key_of, prepared
from tests.environment.commands import run

VLLM_ROUTER, SMG, LITELLM = "vllm-router==0.1.17", "smg==1.13.0", "litellm==1.109.1"
_RECIPE = "1"  # raise it when an installation step changes
_INSTALL_SECS = 900

# What the extra `proxy` adds. litellm-proxy-extras holds database migrations, which a proxy without a database never
# runs. The extra pins a version that not every index has, so any version is accepted.
_PROXY_EXTRAS = "litellm-proxy-extras"
_LIST_EXTRAS = f"""
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("litellm"):
    wanted = Requirement(line)
    if wanted.marker and wanted.marker.evaluate({{"extra": "proxy"}}) and not wanted.marker.evaluate({{"extra": ""}}):
        wanted.marker = None
        if wanted.name != "{_PROXY_EXTRAS}":
            print(wanted)
"""
_LITELLM_CONFIG = """
model_list:
  - model_name: {model}
    litellm_params: {{model: openai/{model}, api_base: "{engine}/v1", api_key: none}}
general_settings: {{master_key: {key}}}
litellm_settings: {{telemetry: false, request_timeout: 600}}
"""
_LITELLM_ENV = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LITELLM_LOG": "ERROR"}


def environment(requirement: str, then: Callable[[Path], None] = lambda python: None) -> Path:
    """The `bin` directory of an environment with the package, created on the first call. `then` installs whatever else
    it needs.

    Raises:
        ContenderUnavailable: it cannot be installed.
    """

    def build(directory: Path) -> None:
        python = directory / "bin" / "python"
        run([sys.executable, "-m", "venv", directory], timeout=120)
        install(python, requirement)
        then(python)

    interpreter = f"{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}"
    name = requirement.partition("=")[0]
    try:
        return prepared(f"bench-{name}-{key_of(requirement, _RECIPE, interpreter)}", build) / "bin"
    except EnvironmentUnavailable as error:
        raise ContenderUnavailable(f"{requirement} cannot be installed: {str(error)[-300:]}") from error


def install(python: Path, *arguments: str) -> None:
    """Raises EnvironmentUnavailable."""
    run([python, "-m", "pip", "install", "--quiet", *arguments], timeout=_INSTALL_SECS)


def _vllm_router(place: Place) -> Launch:
    program = environment(VLLM_ROUTER) / "vllm-router"
    command = [str(program), *_router_arguments(place), "--prometheus-host", "127.0.0.1", "--log-level", "warning"]
    return Launch(command, cwd=place.directory, version=VLLM_ROUTER.partition("==")[2])


def _smg(place: Place) -> Launch:
    program = environment(SMG) / "smg"
    command = [str(program), "launch", *_router_arguments(place), "--log-level", "warn"]
    return Launch(command, cwd=place.directory, version=SMG.partition("==")[2])


def _router_arguments(place: Place) -> list[str]:
    """Both come from the same program and take the same options."""
    return [
        *("--host", "127.0.0.1", "--port", str(place.port), "--prometheus-port", str(free_port())),
        *("--worker-urls", place.engine_url, "--policy", "round_robin"),
        *("--max-concurrent-requests", "32768", "--max-payload-size", str(64 << 20)),
    ]


def _litellm_extras(python: Path) -> None:
    install(python, *run([python, "-c", _LIST_EXTRAS], timeout=60).split("\n")[:-1])
    install(python, "--no-deps", _PROXY_EXTRAS)


def _litellm(place: Place) -> Launch:
    program = environment(LITELLM, _litellm_extras) / "litellm"
    config = place.directory / "config.yaml"
    config.write_text(_LITELLM_CONFIG.format(model=MODEL, engine=place.engine_url, key=API_KEY), encoding="utf-8")
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(place.port)]
    return Launch(
        [*command, "--num_workers", "1"], env=_LITELLM_ENV, cwd=place.directory, version=LITELLM.partition("==")[2]
    )


PACKAGES = (
    Contender(
        "vllm-router",
        "vllm-router (Rust)",
        "round robin over one worker, its metrics; no key, log level warning (no request log)",
        _vllm_router,
    ),
    Contender(
        "smg",
        "smg (Rust)",
        "round robin over one worker, its metrics; no key, log level warn (no request log)",
        _smg,
    ),
    Contender(
        "litellm",
        "LiteLLM proxy",
        "one worker process, master key checked, one model; no database, log level error",
        _litellm,
        slowness=20,
        start_secs=120,
    ),
)
