"""What an operator does to models: each action says before what it would do, and is watched until it is done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.processes import eventually
from tests.services import NODE, running_fleet

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


def test_displacement_sleep_wake_and_restart(page: Page, tmp_path: Path) -> None:
    models = [{"id": name, "harness": "sim", "vram_mb": 20_000} for name in ("org/a", "org/b")]
    neuron = {"harnesses": [{"name": "sim"}], "simulate": {"devices": ["RTX 4090"]}}
    with running_fleet(tmp_path, neuron, {"placement": {"min_residency_secs": 0}}, {"models": models}) as fleet:
        assert fleet.cortex.request("/fleet/load", {"model": "org/a"}).status == 200
        page.goto(f"{fleet.cortex.url}/#/models")
        first, second = (page.get_by_role("region", name=f"Model {name}") for name in ("org/a", "org/b"))
        engine, dialog = first.get_by_role("listitem"), page.get_by_role("dialog")
        expect(engine).to_contain_text("loaded")

        second.get_by_role("button", name="Load", exact=True).click()
        expect(dialog).to_contain_text(f"Displaces org/a on {NODE}")
        dialog.get_by_role("button", name="Cancel").click()

        def act(verb: str, effect: str) -> None:
            first.get_by_role("button", name=f"{verb} org/a on {NODE}").click()
            expect(dialog).to_contain_text(f"{verb} org/a on {NODE}?")
            expect(dialog).to_contain_text(re.compile(effect))
            dialog.get_by_role("button", name=verb).click()
            expect(dialog).to_have_count(0)

        act("Sleep", "goes to sleep on")
        expect(engine).to_contain_text("sleeping")
        act("Wake", "Displaces nothing")
        expect(engine).to_contain_text("loaded")
        process, before = fleet.engine_of("org/a")[0].pid, fleet.status_of("org/a")
        assert before is not None

        def again() -> bool:
            now = fleet.status_of("org/a")
            return now is not None and now["status"] == "loaded" and now["since"] != before["since"]

        act("Restart", "is started again on .*displaces nothing")
        eventually(again, "the engine is started again", within_secs=60)
        expect(engine).to_contain_text("loaded")
        assert fleet.engine_of("org/a")[0].pid != process
        assert fleet.status_of("org/b") is None
