"""The one writer, the load with kill -9 (a short one), and the administrator's figures."""

from __future__ import annotations

import asyncio
import json
import re
import time
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry, InvalidLabelError, Receipt
from rlhf_cli.labeling.web.admin import AdminSnapshots, comments, pace_per_hour
from rlhf_cli.labeling.web.pages import ASSETS, PAGES
from rlhf_cli.labeling.web.writer import Writer
from tests.conftest import ROOT
from tests.labeling.web.web_support import make_store, numbered_items
from tests.scripts import load_script

WHOLE = Entry(((0,), (1,), (2,), (3,)))


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_or_doubled_when_the_server_is_killed(tmp_path: Path) -> None:
    result = load_script(ROOT / "benchmarks" / "label_server.py").measure(tmp_path, clients=20, seconds=5.0, kills=1)
    assert (result["lost"], result["doubled"], result["damaged"]) == (0, 0, 0)
    assert result["acknowledged"] >= 40  # of 100, on a machine that does other things, too
    assert result["stored"] >= result["acknowledged"]


def test_the_benchmark_notices_a_lost_and_a_doubled_label(tmp_path: Path) -> None:
    benchmark = load_script(ROOT / "benchmarks" / "label_server.py")
    store = make_store(tmp_path / "labels.sqlite", numbered_items(2))
    session = LabelSession(store)
    ada = session.annotator("Ada").id
    task = session.next(ada)
    assert task is not None
    session.submit(ada, task.id, WHOLE, key="one", active_seconds=0)
    session.undo(ada, key="back")
    session.submit(ada, task.id, WHOLE, key="two", active_seconds=0)
    session.close()
    measured = benchmark.Measured(acknowledged=[("Ada", "one"), ("Ada", "never")])
    assert benchmark.check(store, measured) == {"stored": 3, "lost": 1, "doubled": 2, "damaged": 0}


def test_calls_that_wait_share_one_transaction_and_a_refusal_harms_only_itself(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels.sqlite", numbered_items(8))
    session = LabelSession(store)
    people = [session.annotator(f"person {number}").id for number in range(4)]
    tasks = [session.next(number) for number in people]
    depths: list[bool] = []

    def give(who: int, task: Any, entry: Entry) -> Any:
        def call(own: LabelSession) -> Receipt:
            depths.append(own._db.store.is_writing)
            return own.submit(who, task.id, entry, key="k", active_seconds=0)

        return call

    async def run() -> list[Any]:
        writer = Writer(session)
        blocker = asyncio.ensure_future(writer.run(lambda _: time.sleep(0.2)))
        await asyncio.sleep(0.05)
        entries = [WHOLE, Entry(((0,),)), WHOLE, WHOLE]
        calls = [writer.run(give(who, task, entry)) for who, task, entry in zip(people, tasks, entries, strict=True)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        await blocker
        await asyncio.to_thread(writer.close)
        return results

    results = asyncio.run(run())
    assert [type(result) for result in results] == [Receipt, InvalidLabelError, Receipt, Receipt]
    assert depths == [True] * 4
    again = LabelSession(store)
    assert len(again.labels()) == 3
    again.close()


def test_a_call_that_fails_in_a_way_nobody_expected_takes_no_other_with_it(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels.sqlite", numbered_items(4))
    session = LabelSession(store)

    def fail(own: LabelSession) -> None:
        own.annotator("Eve")
        raise ZeroDivisionError

    async def run() -> list[Any]:
        writer = Writer(session)
        blocker = asyncio.ensure_future(writer.run(lambda _: time.sleep(0.1)))
        await asyncio.sleep(0.03)
        calls = [writer.run(lambda own: own.annotator("Ada").name), writer.run(fail)]
        calls.append(writer.run(lambda own: own.annotator("Ben").name))
        results = await asyncio.gather(*calls, return_exceptions=True)
        await blocker
        names = await writer.run(lambda own: [person.name for person in own.annotators()])
        await asyncio.to_thread(writer.close)
        return [*results, names]

    first, failed, third, names = asyncio.run(run())
    assert (first, third) == ("Ada", "Ben")
    assert isinstance(failed, ZeroDivisionError)
    assert names == ["Ada", "Ben"]


def label_at(seconds: float, **more: Any) -> LabelRecord:
    at = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return LabelRecord("item", "Prompt?", ("a", "b"), "Ada", tiers=((0,), (1,)), at=at, **more)


def test_pace_counts_rankings_that_are_needed_over_the_last_quarter_of_an_hour() -> None:
    now = 1_800_000_000.0
    assert pace_per_hour([label_at(now)], now) is None
    labels = [label_at(now - 600), label_at(now - 300), label_at(now - 60), label_at(now - 3600)]
    others = [label_at(now - 1, purpose="gold"), label_at(now - 1, outcome="skipped")]
    assert pace_per_hour(labels + others, now) == pytest.approx(3 * 3600 / 600)


def test_comments_are_what_people_said_newest_first() -> None:
    labels = [
        label_at(1, note="a note"),
        label_at(3, outcome="flagged", reason="cut off"),
        label_at(2),
        label_at(4, outcome="skipped"),
    ]
    assert [(row["kind"], row["text"]) for row in comments(labels)] == [
        ("skipped", ""),
        ("flagged", "cut off"),
        ("note", "a note"),
    ]


def test_the_administrator_sees_figures_of_all_labels_and_downloads_them(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels.sqlite", numbered_items(3))
    session = LabelSession(store)
    ada = session.annotator("Ada").id
    for number in range(2):
        task = session.next(ada)
        assert task is not None
        session.submit(ada, task.id, WHOLE, key=str(number), active_seconds=0)

    async def look() -> tuple[dict[str, Any], bytes]:
        admin = AdminSnapshots(store)
        shown = await admin.snapshot(), await admin.labels_jsonl()
        admin.close()
        return shown

    shown, exported = asyncio.run(look())
    session.close()
    assert shown["progress"]["labels"] == 2
    assert [(row["name"], row["labels"]) for row in shown["annotators"]] == [("Ada", 2)]
    assert [json.loads(line)["annotator"] for line in exported.splitlines()] == ["Ada", "Ada"]


def test_pages_name_nothing_that_is_not_served_and_hold_no_script_of_their_own() -> None:
    folder = files("rlhf_cli.labeling.web") / "assets"
    assert {entry.name for entry in folder.iterdir()} == set(ASSETS) | set(PAGES.values())
    for name in (*PAGES.values(), *ASSETS):
        text = (folder / name).read_text(encoding="utf-8")
        assert "innerHTML" not in text
        assert "https://" not in text
        if name.endswith(".html"):
            assert "style=" not in text
            assert " onclick" not in text
            assert text.count("<script") == text.count('<script type="module" src="/assets/')


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_color_of_text_has_enough_contrast_on_every_ground_it_stands_on(scheme: int) -> None:
    """WCAG 2.2, 1.4.3: (L1 + 0.05) / (L2 + 0.05) >= 4.5."""
    style = (files("rlhf_cli.labeling.web") / "assets" / "style.css").read_text(encoding="utf-8")
    block = style.split(":root {")[1 + scheme].split("}")[0]
    colors = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block))
    grounds = ("ground", "surface", "raised")
    pairs = [(text, ground) for text in ("ink", "muted", "accent") for ground in grounds]
    for text, ground in [
        *pairs,
        ("on-accent", "accent"),
        ("warn", "warn-ground"),
        ("warn", "surface"),
        ("ink", "tint"),
    ]:
        low, high = sorted((luminance(colors[text]), luminance(colors[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}"
