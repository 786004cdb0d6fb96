"""The labeling page while completions are sampled: what its server says of it, and that it ends when sampling fails."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Growth
from rlhf_cli.labeling.web.serving import serve
from tests.labeling.web.browser_support import opened
from tests.labeling.web.web_support import Client, numbered_items, served, whole_answer

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def next_of(client: Client, name: str) -> dict:
    return json.loads(client.ask("POST", "/api/next", token=client.of(name), body={})[2])


def test_tasks_appear_as_they_are_sampled(tmp_path: Path):
    store, items = tmp_path / "labels.sqlite", numbered_items(3)
    with closing(LabelSession(store)) as sampler:
        sampler.begin_growth(LabelPlan(), items[:1], growth=Growth(1, 3))
        is_sampling = [True]
        with served(store, ["Ada"], is_sampling=lambda: is_sampling[0]) as links:
            client = Client(links)
            task = client.task_of("Ada")
            body = whole_answer(task, "first")
            given = json.loads(client.ask("POST", "/api/submit", token=client.of("Ada"), body=body)[2])
            assert given["task"] is None
            assert given["is_sampling"] is True
            assert given["progress"]["growth"] == {"sampled": 1, "prompts": 3}
            assert (given["progress"]["mine"], given["progress"]["left_for_me"]) == (1, 2)
            assert given["tasks"] == "", "as many tasks as prompts"
            sampler.grow(items[1:2], Growth(2, 3))
            assert next_of(client, "Ada")["task"]["prompt"] == "Question 1?"
            is_sampling[0] = False
            assert next_of(client, "Ada")["is_sampling"] is False
            sampler.prepare(LabelPlan(), items)
            assert next_of(client, "Ada")["progress"]["growth"] is None


def test_the_server_ends_when_sampling_fails(tmp_path: Path):
    store, failed = tmp_path / "labels.sqlite", threading.Event()
    with closing(LabelSession(store)) as sampler:
        sampler.begin_growth(LabelPlan(), numbered_items(1), growth=Growth(1, 3))
    result = serve(store, port=0, annotators=["Ada"], announce=lambda links: failed.set(), stop=failed)
    assert result is None


def test_a_page_that_waits_goes_on_by_itself(browser: Browser, tmp_path: Path):
    store, items = tmp_path / "labels.sqlite", numbered_items(3, answers=2)
    with closing(LabelSession(store)) as sampler:
        sampler.begin_growth(LabelPlan(), items[:1], growth=Growth(1, 3))
        with (
            served(store, ["Ada"], is_sampling=lambda: True) as links,
            opened(browser, links.annotators["Ada"]) as page,
        ):
            pace = page.locator("#pace")
            page.get_by_text("Question 0?").wait_for()
            assert "1 of 3 prompts sampled" in pace.inner_text()
            page.keyboard.type("a")
            sampler.grow(items[1:2], Growth(2, 3))
            page.get_by_text("2 of 3 prompts sampled").wait_for()
            assert page.locator("#pool [data-position]").count() == 1, "what was entered stays"
            for number in range(2):
                page.get_by_text(f"Question {number}?").wait_for()
                page.keyboard.type("ab" if number else "b")
                page.keyboard.press("Enter")
            page.get_by_role("heading", name="The next task is on its way").wait_for()
            assert "2 of 3 prompts sampled" in page.locator("#message-text").inner_text()
            sampler.prepare(LabelPlan(), items)
            page.get_by_text("Question 2?").wait_for()
            page.keyboard.type("ab")
            page.keyboard.press("Enter")
            page.get_by_text("Labeling is complete").wait_for()
            assert "sampled" not in pace.inner_text()
        assert [label.prompt for label in sampler.labels()] == [f"Question {n}?" for n in range(3)]
