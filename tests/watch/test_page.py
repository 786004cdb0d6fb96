"""The page: the same figures, as a browser shows them, and the real command that serves it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2 as httpx
import pytest
from axe_playwright_python.sync_playwright import Axe

from rlhf_cli.watch.page import render
from rlhf_cli.watch.state import FRESH, read_live


def test_it_shows_hostile_texts_as_text_and_reloads_while_the_run_goes_on(ppo_run):
    ppo_run.progress()
    page = render(read_live(ppo_run.folder))
    assert '<meta http-equiv="refresh" content="5">' in page
    assert "30 of 60 steps, 1:05 left, updates" in page
    assert "Nothing stands out." in page
    assert "before training" in page
    assert "after step 30 · reward 3.00" in page
    assert page.count('<svg class="chart"') == 7
    assert "<script" not in page
    assert "\u202e" not in page
    assert len(page) < 1_000_000
    (ppo_run.folder / ".progress.json").unlink()
    assert "http-equiv" not in render(read_live(ppo_run.folder))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "9"], "`--port` has no effect without `--serve`"),
        (["--host", "evil"], "`--host` has no effect without `--serve`"),
        (["--serve", "--once"], "`--once` has no effect with `--serve`"),
    ],
)
def test_options_without_effect_are_refused(ppo_run, rlhf_here, options, said):
    code, message = rlhf_here("watch", ppo_run.folder, *options)
    assert (code, said in message) == (2, True)


@contextmanager
def served(folder) -> Iterator[str]:
    """Serve a run with the real command."""
    command = [sys.executable, "-m", "rlhf_cli", "watch", str(folder), "--serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        link = re.match(r"(http://127\.0\.0\.1:\d+) shows ", process.stderr.readline())
        assert link is not None
        try:
            yield link[1]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0


@pytest.mark.slow
def test_the_command_serves_it_to_this_machine_alone(ppo_run):
    ppo_run.progress()
    with served(ppo_run.folder) as link:
        assert "30 of 60 steps" in httpx.get(link).text
        refused = httpx.get(link, headers={"Host": "evil.example"})
        assert (refused.status_code, "unknown Host" in refused.text) == (403, True)
        ppo_run.steps(40)
        time.sleep(1.1 * FRESH)
        assert "after step 40" in httpx.get(link).text, "the files are read again"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(ppo_run, browser, width, scheme):
    ppo_run.progress()
    with served(ppo_run.folder) as link:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        messages: list[str] = []
        requests: set[str] = set()
        page.on("console", lambda message: messages.append(message.text))
        page.on("request", lambda request: requests.add(request.url))
        page.goto(link)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing overflows"
        assert page.locator("svg.chart").count() == 7
        assert messages == []
        assert requests <= {f"{link}/", f"{link}/style.css", f"{link}/favicon.ico"}
        page.close()
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_content(page_with_style(httpx.get(link).text, httpx.get(f"{link}/style.css").text))
        assert Axe().run(page).response["violations"] == []
        page.close()


def page_with_style(page: str, style: str) -> str:
    """Return the page with its style inside, without the reload: axe needs its script, which the server forbids."""
    page = re.sub("<meta http-equiv.*>", "", page)
    return page.replace('<link rel="stylesheet" href="/style.css">', f"<style>{style}</style>")


def test_a_run_whose_stages_are_all_finished_is_called_so(ppo_run):
    shutil.rmtree(ppo_run.work)
    page = render(read_live(ppo_run.folder))
    assert "<strong>Finished</strong>" in page
    assert "when the run resumes" not in page
