"""Makes the pictures of docs/labeling-web.md: `python -m tests.labeling.web.screenshots` from the repository's root.

The texts are this project's own samples (data_samples). Needs playwright and a browser on this machine.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Literal

from rlhf_cli.data.records import Candidates, Message
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry
from rlhf_cli.labeling.web.tokens import ServerLinks
from tests.conftest import ROOT
from tests.labeling.web.browser_support import PATH
from tests.labeling.web.web_support import served

IMAGES = ROOT / "docs" / "images"
DESKTOP, PHONE = (1280, 900), (390, 844)
PICTURES: tuple[tuple[str, tuple[int, int], Literal["light", "dark"]], ...] = (
    ("desktop-light", DESKTOP, "light"),
    ("desktop-dark", DESKTOP, "dark"),
    ("phone", PHONE, "light"),
)
GUIDELINES = """# What makes an answer better

Prefer the answer that helps the person most: right first, then complete, then short.

- A wrong answer is worse than a short one.
- Politeness counts, but less than help.
- If two answers are equally good, tie them.

Skip what you cannot judge. Flag what nobody should be asked."""
CODE = """Half an hour in the cold is too short: wait until the dough is twice as big.

```python
import time

for minute in range(60, 0, -1):
    print(f"{minute} minutes left")
    time.sleep(60)
```

Then press it with a finger: it is ready when the dent comes back slowly."""


def sample_items() -> list[Candidates]:
    """A conversation, then sampled answers to questions."""
    conversation = (
        Message("user", "My bread came out dense again. What went wrong?"),
        Message("assistant", "Dense bread has often not risen long enough. How long did you let it rise?"),
        Message("user", "About half an hour, in a cold kitchen. Can you write me a small timer in Python, too?"),
    )
    answers = (
        CODE,
        "Everyone knows this. Buy bread.",
        "Give the dough another hour in a warm room; in a cold kitchen it takes two. The timer of your phone will do.",
        "Add a little more water, because a dry dough does not rise well. For the timer: `sleep 3600 && echo ready`.",
    )
    lines = (ROOT / "data_samples" / "rankings.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Candidates(row["prompt"], tuple(row["completions"])) for row in rows] + [Candidates(conversation, answers)]


def label_some(store: Path, plan: LabelPlan, names: tuple[str, ...]) -> None:
    """Half an hour of work by three people."""
    began, rng = time.time() - 1500, random.Random(3)
    now = [began]
    session = LabelSession(store, clock=lambda: now[0])
    items = sample_items()
    session.prepare(plan, items[:-1])
    for step in range(16):
        for name in names[: 3 if step % 3 == 0 else 2]:
            who = session.annotator(name).id
            task = session.next(who)
            assert task is not None
            now[0] += 25 + 12 * rng.random()
            given = {"key": f"{step}", "active_seconds": 15 + 20 * rng.random()}
            count = len(task.completions)
            drawn = [(len(text) * rng.random(), place) for place, text in enumerate(task.completions)]
            order = [place for _, place in sorted(drawn)]
            marks = {name: tuple(rng.randint(2, 5) for _ in range(count)) for name in plan.criteria}
            if step == 7 and name == "Ben":
                session.flag(who, task.id, reason="the question is cut off in the middle", **given)
            elif step == 9 and name == "Ada":
                session.skip(who, task.id, **given)
            else:
                note = "B is right, but rude" if (step, name) == (12, "Ben") else ""
                session.submit(who, task.id, Entry(tuple((place,) for place in order), None, marks, note), **given)
    session.prepare(plan, [items[-1], *items[:-1]])
    session.close()


def photograph(links: ServerLinks, name: str) -> None:
    """All pictures."""
    from playwright.sync_api import sync_playwright

    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=PATH, args=["--no-sandbox"])
        for what, size, scheme in PICTURES:
            context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
            page = context.new_page()
            page.goto(links.annotators[name])
            page.wait_for_selector("#task:visible")
            while page.locator(".pool .chip").count() < 4:  # the pictures before this one left a draft
                page.keyboard.press("Backspace")
            page.keyboard.type("c=ab" if what != "phone" else "ca")
            page.locator("#saved").get_by_text("draft saved").wait_for(state="attached")
            page.wait_for_timeout(300)
            page.screenshot(path=IMAGES / f"label-{what}.png")
            page.goto(links.administrator)
            page.wait_for_selector("#people tr")
            page.wait_for_timeout(300)
            page.screenshot(path=IMAGES / f"label-admin-{what}.png")
            context.close()
        browser.close()


def main() -> None:
    """Make the store, serve it, take the pictures."""
    plan = LabelPlan(overlap=2, criteria=("helpful", "honest"), guidelines=GUIDELINES, set_aside_after=2)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "labels.sqlite"
        label_some(store, plan, ("Ada", "Ben", "Cleo"))
        with served(store, ["Cleo"]) as links:
            photograph(links, "Cleo")


if __name__ == "__main__":
    main()
