"""`cortex login` and `cortex logout` as processes, against a real issuer and a real cortex."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.cortex.accounts.sign_in.small_issuer import SmallIssuer
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import TOP
from tests.cortex.protocol_v1_neuron import V1Neuron


class Terminal:
    """A user's shell. `home` is where their settings are."""

    def __init__(self, home: Path, url: str) -> None:
        self.tokens = home / "cortex/tokens.json"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("CORTEX_")}
        self.environ = {**environ, "XDG_CONFIG_HOME": str(home), "CORTEX_URL": url, "BROWSER": "true"}

    async def start(self, *arguments: str, **environ: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "cortex", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=TOP,
            env=self.environ | environ,
        )

    async def run(self, *arguments: str, **environ: str) -> tuple[int, str, str]:
        """Status, output and errors."""
        process = await self.start(*arguments, **environ)
        output, errors = await process.communicate()
        return process.returncode or 0, output.decode(), errors.decode()

    def change(self, **fields: object) -> None:
        """Of the only kept token."""
        ((url, entry),) = json.loads(self.tokens.read_text(encoding="utf-8")).items()
        self.tokens.write_text(json.dumps({url: entry | fields}), encoding="utf-8")


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, issuer: SmallIssuer) -> RunningCortex:
    """Whose issuer has a public client."""
    issuer.secret = None
    return await start_cortex([benjy], [{"id": "org/small"}], auth={"oidc": issuer.settings()})


@pytest.fixture
def terminal(tmp_path: Path, cortex: RunningCortex) -> Terminal:
    return Terminal(tmp_path, f"{cortex.url}/v1/")


async def test_with_a_code_for_another_device(terminal: Terminal, cortex: RunningCortex, issuer: SmallIssuer) -> None:
    """The person enters the code anywhere; then commands are theirs, until they sign out. Only they can read the
    token, and a key in the environment counts before it."""
    assert "cortex login" in (await terminal.run("status"))[2]
    login = await terminal.start("login")
    assert login.stdout is not None
    shown = (await login.stdout.readline()).decode()
    assert shown == f"Open {issuer.url}/activate and enter the code ABCD-EFGH\n"
    await issuer.asked.wait()  # too early
    issuer.approved = True
    output, errors = await login.communicate()
    assert (login.returncode, output.decode()) == (0, f"signed in at {cortex.url} as alice\n"), errors
    assert stat.S_IMODE(terminal.tokens.stat().st_mode) == 0o600
    assert (await terminal.run("status"))[0] == 0
    assert "needs the role admin; oidc:alice has the role viewer" in (await terminal.run("keys", "list"))[2]
    assert (await terminal.run("status", CORTEX_API_KEY="sk-wrong"))[0] == 1
    assert (await terminal.run("logout"))[1] == f"signed out of {cortex.url}\n"
    assert issuer.refresh_tokens == set()
    assert (await terminal.run("status"))[0] == 1
    assert (await terminal.run("logout"))[1] == f"not signed in at {cortex.url}\n"


async def test_with_a_browser_on_this_machine(terminal: Terminal, cortex: RunningCortex, issuer: SmallIssuer) -> None:
    """Where the issuer offers no codes. What does not come from the issuer is not taken for its answer."""
    issuer.offers_device = False
    login = await terminal.start("login")
    assert login.stdout is not None
    address = (await login.stdout.readline()).decode().removeprefix("Open ").strip()
    port = re.search(r"127\.0\.0\.1%3A(\d+)%2Fcallback", address)
    assert port is not None
    async with aiohttp.ClientSession() as browser:
        async with browser.get(f"http://127.0.0.1:{port[1]}/callback?state=guessed&code=x") as answer:
            assert answer.status == 400
        async with browser.get(address) as answer:
            assert (answer.status, "close this page" in await answer.text()) == (200, True)
    output, errors = await login.communicate()
    assert (login.returncode, output.decode()) == (0, f"signed in at {cortex.url} as alice\n"), errors
    assert (await terminal.run("status"))[0] == 0


async def test_a_token_that_ends(terminal: Terminal, cortex: RunningCortex, issuer: SmallIssuer) -> None:
    """It is renewed, also by several commands at a time, each refresh token once; and an error says when the person
    has to sign in again."""
    issuer.approved = True
    assert (await terminal.run("login"))[0] == 0
    terminal.change(expires_at=1)
    found = await asyncio.gather(*(terminal.run("status") for _ in range(3)))
    assert [status for status, _, _ in found] == [0, 0, 0], found
    issuer.refresh_tokens.clear()
    terminal.change(expires_at=1)
    status, _, errors = await terminal.run("status")
    assert status == 1
    assert f"has ended (invalid_grant): sign in again with `cortex login --url {cortex.url}/v1/`" in errors


async def test_a_person_without_a_role(terminal: Terminal, issuer: SmallIssuer) -> None:
    """The command says why, and keeps no token."""
    issuer.approved, issuer.person["groups"] = True, []
    status, _, errors = await terminal.run("login")
    assert (status, "alice has signed in, but has no role here" in errors) == (1, True)
    assert not terminal.tokens.exists()


async def test_a_cortex_without_an_issuer(tmp_path: Path, start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The command says so."""
    cortex = await start_cortex([benjy], [])
    status, _, errors = await Terminal(tmp_path, cortex.url).run("login")
    assert (status, "cortex.toml has no [auth.oidc]" in errors) == (1, True)
