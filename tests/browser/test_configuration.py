"""The page Configuration: a mistake in a file, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.services import running_fleet

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


def test_a_mistake_in_a_file(page: Page, tmp_path: Path) -> None:
    """It is shown with its key, and goes when the file is mended, without a reload of the page. A change that needs a
    restart stays listed, and secrets are hidden."""
    neuron = {"harnesses": [{"name": "sim"}], "simulate": {"devices": ["RTX 4090"]}}
    file = tmp_path / "cortex.toml"
    with running_fleet(
        tmp_path, neuron, {"log_level": "warning", "gateway": {"metrics_token": "hide me"}}, {}
    ) as fleet:
        page.goto(f"{fleet.cortex.url}/#/configuration")
        now, reload = page.get_by_role("region", name="The files now"), page.get_by_role("region", name="A reload")
        expect(now).to_contain_text("Nothing is wrong")
        expect(page.get_by_role("rowheader", name="gateway.listen", exact=True)).to_be_visible()
        good = file.read_text(encoding="utf-8")
        file.write_text(good.replace('"warning"', '"loud"'), encoding="utf-8")
        expect(now).to_contain_text("log_level = 'loud'")
        expect(reload).to_contain_text("would change nothing as long as the files have errors")
        file.write_text(good.replace('"warning"', '"error"'), encoding="utf-8")
        expect(now).to_contain_text("Nothing is wrong")
        expect(reload).to_contain_text("log_level warning -> error")
        expect(page.get_by_role("row", name="gateway.metrics_token")).to_contain_text("not shown")
