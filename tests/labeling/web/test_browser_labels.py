"""Twenty items in a real browser, by keys and by mouse: what the store holds in the end is what was entered."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.labeling.session.plan import LabelPlan
from tests.labeling.web.browser_support import (
    Tiers,
    drag,
    given,
    opened,
    read_labels,
    shown_completions,
    title,
    wait_for_next,
)
from tests.labeling.web.web_support import make_store, numbered_items, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


def some_tiers(rng: random.Random, letters: list[str]) -> list[list[str]]:
    """An order of the letters with ties."""
    rng.shuffle(letters)
    tiers: list[list[str]] = []
    for letter in letters:
        if tiers and rng.random() < 0.3:
            tiers[-1].append(letter)
        else:
            tiers.append([letter])
    return tiers


def type_tiers(page: Page, tiers: list[list[str]]) -> None:
    for tier in tiers:
        page.keyboard.type("=".join(tier))


def drag_tiers(page: Page, tiers: list[list[str]]) -> None:
    """Build an order from its worst tier upwards, so that places between and ties are both needed."""
    for tier in reversed(tiers):
        drag(page, "abcd".index(tier[0]), "[data-drop='gap:0']")
        for letter in tier[1:]:
            drag(page, "abcd".index(letter), "[data-drop='tier:0']")


class CompletionScorer:
    """Somebody at the page who remembers what they said."""

    def __init__(self, page: Page, name: str, enter: Callable[[Page, list[list[str]]], None]) -> None:
        self.page, self.name, self.enter = page, name, enter
        self.rng = random.Random(name)
        self.said: dict[str, tuple[str, Tiers]] = {}

    def prompt(self) -> str:
        return self.page.locator("#prompt").inner_text()

    def rank(self, submit: Callable[[], None]) -> None:
        before, prompt, texts = title(self.page), self.prompt(), shown_completions(self.page)
        tiers = some_tiers(self.rng, list(texts))
        self.enter(self.page, tiers)
        submit()
        wait_for_next(self.page, before)
        self.said[prompt] = ("ranked", [{texts[letter] for letter in tier} for tier in tiers])

    def pass_on(self, how: str, act: Callable[[], None]) -> None:
        before, prompt = title(self.page), self.prompt()
        act()
        wait_for_next(self.page, before)
        self.said[prompt] = (how, [])


def test_twenty_items_by_keys_and_by_mouse_come_out_as_they_were_entered(browser: Browser, tmp_path: Path) -> None:
    plan = LabelPlan(overlap=2, set_aside_after=3, guidelines="# Be fair\n\n- ties are fine")
    store = make_store(tmp_path / "labels.sqlite", numbered_items(20), plan)
    with served(store, ["Ada", "Ben"]) as links:
        with opened(browser, links.annotators["Ada"]) as page:
            page.wait_for_selector("#help-dialog[open]")  # the guidelines, before the first label
            assert "Be fair" in page.locator("#guidelines").inner_text()
            page.keyboard.press("Escape")
            ada = by_keys(page)
            assert page.locator("#message-title").inner_text() == "Nothing is left for you"
        with opened(browser, links.annotators["Ben"]) as page:
            page.locator("#help-close").click()
            ben = by_mouse(page)
    labels = read_labels(store)
    assert given(labels, "Ada") == ada
    assert given(labels, "Ben") == ben
    assert len(ada) == len(ben) == 20
    assert [label.reason for label in labels if label.outcome == "flagged"] == ["cut <b>off</b>"]
    assert [label.note for label in labels if label.note] == ["a note\nof s and u"]


def by_keys(page: Page) -> dict[str, tuple[str, Tiers]]:
    keys = page.keyboard
    ada = CompletionScorer(page, "Ada", type_tiers)

    def enter() -> None:
        keys.press("Enter")

    for _ in range(4):
        ada.rank(enter)
    ada.pass_on("skipped", lambda: keys.press("s"))
    ada.rank(enter)
    # Goes back twice, over the skip, and says something else.
    for _ in range(2):
        before = title(page)
        keys.press("u")
        wait_for_next(page, before)
    assert ada.said[ada.prompt()] == ("skipped", [])
    ada.rank(enter)
    assert page.locator(".pool .chip").count() == 0  # the one after it has what it was given before
    for _ in range(4):
        keys.press("Backspace")
    ada.rank(enter)
    # What was begun is there again after going back in the middle of it.
    keys.type("c=a")
    before = title(page)
    keys.press("u")
    wait_for_next(page, before)
    last = title(page)
    keys.press("Enter")
    wait_for_next(page, last)
    assert title(page) == before
    assert page.locator(".tier .chip").count() == 2
    keys.press("Backspace")
    keys.press("Backspace")
    # Reloads half way.
    keys.type("b=d")
    page.locator("#saved", has_text="draft saved").wait_for()
    before, texts = title(page), shown_completions(page)
    page.reload()
    page.wait_for_selector("#task:visible")
    assert title(page) == before
    assert page.locator(".tier").all_inner_texts()[0].split()[:2] == ["1", "B"]
    keys.type("zaqc")  # z and q are no answers
    prompt = ada.prompt()
    keys.press("Enter")
    wait_for_next(page, before)
    ada.said[prompt] = ("ranked", [{texts["b"], texts["d"]}, {texts["a"]}, {texts["c"]}])
    # Not whole: says so and stays.
    before = title(page)
    keys.type("ca")
    keys.press("Enter")
    assert page.locator("#problem").inner_text() == "B, D have no place yet."
    assert title(page) == before
    keys.press("Backspace")
    keys.press("Backspace")
    # A note, in which letters are letters.
    keys.press("n")
    keys.type("a note\nof s and u")
    keys.press("Escape")
    while page.locator("#task").is_visible():
        ada.rank(enter)
    return ada.said


def by_mouse(page: Page) -> dict[str, tuple[str, Tiers]]:
    ben = CompletionScorer(page, "Ben", drag_tiers)

    def submit() -> None:
        page.locator("#submit").click()

    ben.rank(submit)
    ben.pass_on("skipped", lambda: page.locator("#skip").click())

    def flag() -> None:
        page.locator("#flag").click()
        page.locator("#reason").fill("cut <b>off</b>")
        page.locator("#flag-send").click()

    ben.pass_on("flagged", flag)
    ben.rank(submit)
    before = title(page)
    page.locator("#undo").click()
    wait_for_next(page, before)
    for position in range(4):
        drag(page, position, "#pool")
    ben.rank(submit)
    while page.locator("#task").is_visible():
        ben.rank(submit)
    return ben.said
