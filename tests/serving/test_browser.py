"""The server's page in a real browser: needs `pip install playwright` and a Chromium, of its own or on the path."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serving.running import Running, running
from tests.tiny_folder import CONTEXT
from tests.tiny_folder import folder as folder

from coldpress import SnapKVPress
from coldpress.loading.models import load_model

pytestmark = pytest.mark.slow
api = pytest.importorskip("playwright.sync_api")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with api.sync_playwright() as found:
        try:
            started = found.chromium.launch(executable_path=path, args=ARGUMENTS)
        except api.Error as error:
            pytest.skip(f"no browser: {error}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(load_model(str(folder), device="cpu"), SnapKVPress(0.5, window_size=8)) as found:
        yield found


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide", "narrow"])
def page(request: pytest.FixtureRequest, browser: Any, server: Running) -> Iterator[Any]:
    """The page, in which no script has failed."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened.set_default_timeout(15_000)
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(server.url)
    yield opened
    assert not faults
    opened.close()


def test_a_document_is_compressed_asked_and_removed(page: Any) -> None:
    expect = api.expect
    expect(page.locator("#state")).to_contain_text("positions")
    page.fill("#text", CONTEXT)
    page.click("#add")
    expect(page.locator("#added")).to_contain_text("removed")
    expect(page.locator("#rows tr")).to_have_count(1)
    assert page.eval_on_selector("#which", "one => one.value") != ""  # the new document is chosen
    page.fill("#question", "What is the password?")
    page.fill("#most", "5")
    page.click("#ask")
    expect(page.locator("#figures")).to_contain_text("not read again")
    assert page.inner_text("#answer")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing is off screen
    with page.expect_download() as download:
        page.get_by_role("button", name="What is kept").click()
    assert "what survives" in Path(download.value.path()).read_text(encoding="utf-8")
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#rows tr")).to_have_count(0)


def test_what_is_wrong_is_said_where_it_was_typed(page: Any) -> None:
    expect = api.expect
    page.click("#add")
    expect(page.locator("#added")).to_have_text("There is no text yet: paste one, or choose a file.")
    page.fill("#text", CONTEXT)
    page.fill("#ratio", "much")
    page.click("#add")
    expect(page.locator("#added")).to_contain_text("The fraction removed must be a number such as 0.5; got much.")
    page.fill("#ratio", "2")
    page.click("#add")
    expect(page.locator("#added")).to_contain_text("compression_ratio")
    page.click("#ask")
    expect(page.locator("#figures")).to_have_text("There is no question yet.")
    expect(page.locator("#rows tr")).to_have_count(0)
