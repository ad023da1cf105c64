"""The dashboard's files, as cortex serves them. What they do in a browser: tests/browser."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

import cortex.api.dashboard
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron

STATIC = Path(str(cortex.api.dashboard.__file__)).with_name("static")
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture
async def running(start_cortex: StartCortex, benjy: V1Neuron) -> RunningCortex:
    return await start_cortex([benjy], [])


async def test_a_browser_gets_the_page(running: RunningCortex) -> None:
    """With a policy that lets it load from cortex alone."""
    async with running.http.get(f"{running.url}/", headers=BROWSER) as response:
        assert response.status == 200
        assert response.content_type == "text/html"
        policy = response.headers["Content-Security-Policy"]
        page = await response.text()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in re.findall(r'(?:src|href)="(/dashboard/[^"]+)"', page):
        async with running.http.get(f"{running.url}{path}") as response:
            assert response.status == 200


async def test_other_clients_learn_where_everything_is(running: RunningCortex) -> None:
    async with running.http.get(f"{running.url}/", headers={"Accept": "application/json"}) as response:
        assert (response.status, response.headers["Vary"]) == (200, "Accept")
        assert (await response.json())["openapi"] == "/openapi.json"


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("app.js", "text/javascript"),
        ("style.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
        ("pages/fleet.js", "text/javascript"),
    ],
)
async def test_files(running: RunningCortex, path: str, content_type: str) -> None:
    """A file that the browser has is not sent again."""
    async with running.http.get(f"{running.url}/dashboard/{path}") as response:
        assert response.status == 200
        assert response.content_type == content_type
        assert await response.read() == (STATIC / path).read_bytes()
        tag = response.headers["ETag"]
    async with running.http.get(f"{running.url}/dashboard/{path}", headers={"If-None-Match": tag}) as response:
        assert response.status == 304
        assert await response.read() == b""


@pytest.mark.parametrize("path", ["nope.js", "../pages.py", "%2e%2e/pages.py", "vendor", "/etc/passwd"])
async def test_other_files_are_not_served(running: RunningCortex, path: str) -> None:
    async with running.http.get(f"{running.url}/dashboard/{path}") as response:
        assert response.status == 404


def test_vendored_libraries_are_what_they_are_said_to_be() -> None:
    vendor = STATIC / "vendor"
    told = json.loads((vendor / "vendor.json").read_text())["files"]
    found = {path.name for path in vendor.iterdir() if path.suffix in {".js", ".css"}}
    assert found == told.keys()
    for name, facts in told.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == facts["sha256"], name
        assert (vendor / f"LICENSE-{facts['package']}.txt").exists()


def test_nothing_is_fetched_from_elsewhere() -> None:
    ours = [
        path for path in STATIC.rglob("*") if path.suffix in {".js", ".html", ".css"} and path.parent.name != "vendor"
    ]
    assert len(ours) > 5
    for path in ours:
        assert not re.search(r"(?:https?:)?//[a-z]+\.[a-z]", path.read_text()), path


@pytest.fixture
async def closed(start_cortex: StartCortex, benjy: V1Neuron) -> RunningCortex:
    keys = [f'[[keys]]\nname = "{role}"\nkey = "secret-{role}"\nrole = "{role}"' for role in ("viewer", "operator")]
    return await start_cortex([benjy], [], keys="\n".join(keys))


@pytest.mark.parametrize(
    ("key", "viewer"),
    [
        (None, {"name": None, "role": None, "may_act": False, "may_configure": False, "leaves": False}),
        ("wrong", {"name": None, "role": None, "may_act": False, "may_configure": False, "leaves": False}),
        (
            "secret-viewer",
            {"name": "viewer", "role": "viewer", "may_act": False, "may_configure": False, "leaves": False},
        ),
        (
            "secret-operator",
            {"name": "operator", "role": "operator", "may_act": True, "may_configure": False, "leaves": False},
        ),
    ],
)
async def test_who_is_looking(closed: RunningCortex, key: str | None, viewer: dict[str, object]) -> None:
    """The page and its files need no key: what they show does."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    for path in ("/", "/dashboard/app.js"):
        async with closed.http.get(f"{closed.url}{path}", headers={**headers, **BROWSER}) as response:
            assert response.status == 200
    async with closed.http.get(f"{closed.url}/dashboard/me", headers=headers) as response:
        assert await response.json() == viewer
    async with closed.http.get(f"{closed.url}/fleet", headers=headers) as response:
        assert response.status == (200 if viewer["name"] else 401)
