"""One browser for all tests of the pages, and one server for requests without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.labeling.web.browser_support import BROWSERS, PATH
from tests.labeling.web.web_support import Client, make_store, numbered_items, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The browser of this machine, headless; `rebound.example` is a name of 127.0.0.1 in it."""
    if PATH is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        rules = "MAP rebound.example 127.0.0.1"
        options = ["--no-sandbox", "--disable-gpu", f"--host-resolver-rules={rules}"]
        started = driver.chromium.launch(executable_path=PATH, args=options)
        yield started
        started.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("trust") / "labels.sqlite", numbered_items(6))


@pytest.fixture(scope="module")
def client(store: Path) -> Iterator[Client]:
    with served(store, ["Ada", "Ben"]) as links:
        yield Client(links)
