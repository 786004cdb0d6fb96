"""One browser for all tests of the pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.labeling.web.browser_support import BROWSERS, PATH

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
