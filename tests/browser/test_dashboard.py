"""What an operator does with the dashboard: sees a cold load, a drain and a dead neuron, chats, and needs no mouse."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.cortex.accounts.sign_in.small_issuer import SmallIssuer
from tests.e2e.dev import Dev
from tests.services import NODE, Answer, running_fleet

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]
MODEL, LARGE = "Qwen/Qwen3-8B", "Qwen/Qwen3.6-27B"
PAGES = ("fleet", "models", "requests", "timeline", "usage", "logs", "playground", "configuration")


def opened(page: Page, dev: Dev, name: str) -> None:
    page.goto(f"{dev.url}/#/{name}")
    expect(page.get_by_role("heading", level=1)).to_have_text(name.capitalize())


def test_a_load_from_click_to_answer(page: Page, dev: Dev) -> None:
    """The plan is shown first, then the load until it is done; the answer then streams into the playground."""
    opened(page, dev, "models")
    card = page.get_by_role("region", name=f"Model {MODEL}")
    expect(card).to_contain_text("on no host")
    card.get_by_role("button", name="Load", exact=True).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(re.compile(r"On (one|two), GPU \d"))
    dialog.get_by_role("button", name="Load", exact=True).click()
    expect(card.get_by_role("progressbar")).to_be_visible()
    expect(card.get_by_role("listitem")).to_contain_text("loaded")
    opened(page, dev, "playground")
    page.get_by_role("combobox", name="Model").select_option(MODEL)
    page.get_by_label("Message").fill("Hello")
    page.get_by_label("Message").press("Enter")
    expect(page.get_by_role("article", name="Model")).to_contain_text("first token after")
    opened(page, dev, "timeline")
    expect(page.get_by_role("button", name=re.compile("Qwen3-8B loaded"))).not_to_have_count(0)
    opened(page, dev, "logs")
    page.get_by_role("combobox", name="Model").select_option(MODEL)
    expect(page.get_by_role("log")).to_contain_text("Application startup complete")
    opened(page, dev, "usage")
    expect(page.get_by_role("rowheader", name=MODEL)).to_be_visible()


def test_what_is_chosen_stands_in_the_address(page: Page, dev: Dev) -> None:
    """A model links to its requests and its log; back, forward and a reload keep what was chosen."""
    post(dev, "/fleet/load", {"model": MODEL})
    opened(page, dev, "models")
    page.get_by_label("Only those on a host").check()
    expect(page).to_have_url(re.compile("only=present$"))
    page.get_by_role("link", name=f"Logs of {MODEL}").click()
    expect(page.get_by_role("log", name=f"Log of {MODEL}")).to_contain_text("Application startup complete")
    page.go_back()
    page.get_by_role("link", name=f"Requests for {MODEL}").click()
    page.get_by_label("Only errors").check()
    page.go_back()
    expect(page.get_by_role("heading", level=1)).to_have_text("Models")
    page.go_forward()
    page.reload()
    expect(page.get_by_label("Only errors")).to_be_checked()
    expect(page.get_by_role("combobox", name="Model")).to_have_value(MODEL)


def test_a_cold_start_in_the_playground(page: Page, dev: Dev) -> None:
    """It says what is being done for the request before the answer comes."""
    opened(page, dev, "playground")
    page.get_by_role("combobox", name="Model").select_option(LARGE)
    page.get_by_label("Message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status").first).to_be_visible()
    expect(page.get_by_role("article", name="Model")).to_contain_text("first token after")


def test_a_request_from_its_wait_to_its_end(page: Page, tmp_path: Path) -> None:
    """A cold start is seen while it waits, and then, still open, with the phases of its load; an error is seen."""
    gate, engine = tmp_path / "gate", tmp_path / "engine"  # the load goes on once the page has shown it
    engine.write_text(
        f'#!/bin/sh\nuntil [ -e {gate} ]; do sleep 0.1; done\nexec {sys.executable} -m neuron.sim "$@"\n',
        encoding="utf-8",
    )
    engine.chmod(0o755)
    neuron = {
        "harnesses": [{"name": "sim"}],
        "harness": {"sim": {"command": [str(engine)]}},
        "simulate": {"devices": ["RTX 4090"]},
    }
    models = [{"id": "org/small", "harness": "sim", "vram_mb": 1000}]
    body = {"model": "org/small", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    answers: list[Answer] = []
    with running_fleet(tmp_path, neuron, {}, {"models": models}) as fleet:
        page.goto(f"{fleet.cortex.url}/#/requests")
        live, ended = page.get_by_role("list", name="Live requests"), page.get_by_role("list", name="Ended requests")
        asking = threading.Thread(
            target=lambda: answers.append(fleet.cortex.request("/v1/chat/completions", body)), daemon=True
        )
        asking.start()
        live.get_by_role("button", name=re.compile("waiting for an engine.*small")).focus(timeout=60_000)
        page.keyboard.press("Enter")
        expect(live).to_contain_text(re.compile(f"loading.* on {NODE}"))
        gate.touch()
        asking.join()
        assert [answer.status for answer in answers] == [200]
        found = ended.get_by_role("listitem").first
        expect(found.get_by_role("button", name=re.compile("200.*small.*cold start"))).to_be_visible()
        expect(found.get_by_role("list", name="Where its time went")).to_contain_text(
            re.compile(f"loading: .* on {NODE}")
        )
        assert fleet.cortex.request("/v1/chat/completions", {**body, "model": "nowhere"}).status == 404
        page.get_by_label("Only errors").check()
        expect(ended.get_by_role("button", name=re.compile("404 model_not_found"))).to_contain_text("nowhere")
        expect(ended.get_by_role("button", name=re.compile("200"))).to_have_count(0)


def test_a_drain(page: Page, dev: Dev) -> None:
    opened(page, dev, "fleet")
    host = page.get_by_role("listitem", name="Host one")
    host.get_by_role("button", name="Drain").click()
    expect(page.get_by_role("dialog")).to_contain_text(re.compile(r"goes on: \d+ requests? now"))
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    host.get_by_role("button", name="Drain").click()
    page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    expect(host).to_contain_text("draining")
    host.get_by_role("button", name="Resume").click()
    page.get_by_role("dialog").get_by_role("button", name="Resume").click()
    expect(host).to_contain_text("healthy")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_no_barriers(page: Page, dev: Dev, name: str, theme: str) -> None:
    """axe finds nothing serious, also on a phone, where nothing is wider than the screen."""
    page.emulate_media(color_scheme="light" if theme == "light" else "dark")
    opened(page, dev, name)
    for width in (1200, 360):
        page.set_viewport_size({"width": width, "height": 800})
        found = Axe().run(page).response["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_with_the_keyboard_alone(page: Page, dev: Dev) -> None:
    opened(page, dev, "fleet")
    page.keyboard.press("2")
    expect(page.get_by_role("heading", level=1)).to_have_text("Models")
    page.keyboard.press("/")
    page.keyboard.type("27B")
    expect(page.get_by_role("region", name=re.compile("^Model "))).to_have_count(1)
    page.get_by_role("button", name="Load", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_killed_engine(page: Page, dev: Dev) -> None:
    """`kill -9`: the page shows that it was started again, without a reload, and the timeline that it was."""
    opened(page, dev, "models")
    card = page.get_by_role("region", name=f"Model {MODEL}")
    if not card.get_by_role("listitem").count():
        post(dev, "/fleet/load", {"model": MODEL})
    expect(card.get_by_role("listitem")).to_contain_text("loaded")
    (engine,) = (each for each in psutil.Process(dev.process.pid).children(recursive=True) if is_engine(each, MODEL))
    engine.kill()
    expect(card.get_by_role("listitem")).to_contain_text(re.compile("recovering|loading"))
    expect(card.get_by_role("listitem")).to_contain_text("loaded")
    opened(page, dev, "timeline")
    expect(page.get_by_role("button", name=re.compile("Qwen3-8B recovering"))).not_to_have_count(0)


def is_engine(process: psutil.Process, model: str) -> bool:
    command = process.cmdline()
    return "neuron.sim" in command and model in command


def test_a_neuron_that_hangs(page: Page, dev: Dev) -> None:
    opened(page, dev, "fleet")
    host = page.get_by_role("listitem", name="Host one")
    expect(host).to_contain_text("healthy")
    found = re.search(r"one at http://127\.0\.0\.1:(\d+)", dev.text())
    assert found is not None
    neuron = next(
        each
        for each in psutil.Process(dev.process.pid).children(recursive=True)
        if any(one.laddr.port == int(found[1]) for one in each.net_connections("tcp") if one.status == "LISTEN")
    )
    neuron.suspend()
    try:
        expect(host).to_contain_text("down")
    finally:
        neuron.resume()
    expect(host).to_contain_text("healthy")


def test_a_closed_cortex(page: Page, tmp_path: Path) -> None:
    """The page asks for a key, shows what its role may see, a neuron that is killed and comes back, and says so when
    cortex is gone."""
    (tmp_path / "keys.toml").write_text('[[keys]]\nname = "alice"\nkey = "secret"\nrole = "viewer"')
    neuron = {"harnesses": [{"name": "sim"}], "simulate": {"devices": ["RTX 4090"]}}
    with running_fleet(tmp_path, neuron, {"keys": {"file": "keys.toml"}}, {}) as fleet:
        page.goto(f"{fleet.cortex.url}/")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Go on").click()
        expect(page.get_by_role("alert")).to_contain_text("valid API key")
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Go on").click()
        host = page.get_by_role("listitem", name=f"Host {NODE}")
        expect(host).to_contain_text("healthy")
        expect(page.get_by_text("alice (viewer)")).to_be_visible()
        expect(page.get_by_role("button", name="Drain")).to_have_count(0)
        os.kill(fleet.neuron.pid, signal.SIGKILL)
        expect(host).to_contain_text("down")
        fleet.neuron.kill_and_restart()
        expect(host).to_contain_text("healthy")
    expect(page.get_by_role("alert")).to_contain_text("what you see is")


def test_models_that_do_not_load(page: Page, tmp_path: Path) -> None:
    """The failure is shown, and that the state directory cannot be made. In the playground a question without an answer
    comes back, or the next request would have two in a row, and another kind of request stops the one that waits: its
    answer would have other fields."""
    faults = {"org/broken": "oom-at-load", "org/stuck": "never-ready"}
    models = [{"id": name, "harness": "sim", "vram_mb": 1000, "args": ["--fault", faults[name]]} for name in faults]
    neuron = {"harnesses": [{"name": "sim"}], "simulate": {"devices": ["RTX 4090"]}}
    (tmp_path / "file").touch()
    with running_fleet(tmp_path, neuron, {"state_dir": "file/state"}, {"models": models}) as fleet:
        page.goto(f"{fleet.cortex.url}/#/logs")
        expect(page.get_by_text("No host has an engine")).to_be_visible()
        assert fleet.cortex.request("/fleet/load", {"model": "org/broken"}).status != 200
        expect(page.get_by_role("log", name="Log of org/broken")).to_contain_text("CUDA out of memory")
        page.goto(f"{fleet.cortex.url}/#/models")
        expect(page.get_by_role("alert")).to_contain_text("file/state cannot be written: Not a directory")
        broken = page.get_by_role("region", name="Model org/broken")
        broken.get_by_role("button", name="Load", exact=True).click()
        page.get_by_role("dialog").get_by_role("button", name="Load", exact=True).click()
        expect(broken.get_by_role("listitem")).to_contain_text(f"failed on {NODE}; for")
        expect(broken).to_contain_text("CUDA out of memory")
        page.goto(f"{fleet.cortex.url}/#/playground")
        page.get_by_role("combobox", name="Model").select_option("org/stuck")
        message, stop = page.get_by_label("Message"), page.get_by_role("button", name="Stop")
        message.fill("Hello")
        message.press("Enter")
        expect(page.get_by_role("article", name="You")).to_have_text("Hello")
        stop.click()
        expect(page.get_by_role("article", name="You")).to_have_count(0)
        expect(message).to_have_value("Hello")
        page.get_by_role("button", name="embeddings").click()
        page.get_by_label("Text").press("Enter")
        expect(stop).to_be_visible()
        page.get_by_role("button", name="rerank").click()
        expect(stop).to_have_count(0)


def test_a_sign_out(page: Page, tmp_path: Path, issuer: SmallIssuer) -> None:
    """A sign-in comes back to the page that was asked for. After a sign-out the browser stays signed out, although the
    issuer would sign it in again at once."""
    neuron = {"harnesses": [{"name": "sim"}], "simulate": {"devices": ["RTX 4090"]}}
    with running_fleet(tmp_path, neuron, {"auth": {"oidc": issuer.settings()}}, {}) as fleet:
        page.goto(f"{fleet.cortex.url}/#/models")
        page.get_by_role("link", name="Sign in").click()
        expect(page.get_by_text("oidc:alice (viewer)")).to_be_visible()
        expect(page.get_by_role("heading", level=1)).to_have_text("Models")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("link", name="Sign in")).to_be_visible()
        page.get_by_role("link", name="Sign in").click()
        expect(page.get_by_text("oidc:alice (viewer)")).to_be_visible()


def post(dev: Dev, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        dev.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
