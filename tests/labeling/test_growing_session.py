"""A session that people label in while completions are sampled: items arrive, and all counts stay right."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.labeling.aggregation import aggregate
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry, Growth, LabelTask

GOLD = [Candidates(f"gold {n}", ("good", "bad"), known=((0,), (1,))) for n in range(4)]


def items(*numbers: int) -> list[Candidates]:
    return [Candidates(f"question {n}", tuple(f"answer {n}.{k}" for k in range(3))) for n in numbers]


def rank(session: LabelSession, who: int, task: LabelTask) -> None:
    order = sorted(range(len(task.completions)), key=lambda position: task.completions[position])
    entry = Entry(tuple((position,) for position in order))
    session.submit(who, task.id, entry, key=f"{who}-{task.id}", active_seconds=0)


def rank_all(session: LabelSession, who: int, most: int = 1000) -> list[LabelTask]:
    """Rank what is there; returns the tasks."""
    done = []
    while len(done) < most and (task := session.next(who)) is not None:
        rank(session, who, task)
        done.append(task)
    return done


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "labels.sqlite"


def plans(store: Path) -> int:
    with sqlite3.connect(store) as connection:
        return connection.execute("SELECT count(*) FROM plans").fetchone()[0]


def test_items_arrive_while_one_labels_and_the_end_is_that_of_all_at_once(store, tmp_path):
    session, plan = LabelSession(store), LabelPlan()
    session.begin_growth(plan, items(3), growth=Growth(1, 6))
    who = session.annotator("Ann").id
    assert [task.prompt for task in rank_all(session, who)] == ["question 3"]
    assert session.next(who) is None
    session.grow(items(1, 4), Growth(3, 6))
    assert [task.prompt for task in rank_all(session, who)] == ["question 1", "question 4"]
    session.grow(items(0, 2, 5), Growth(6, 6))
    rank_all(session, who, most=1)
    assert not session.progress().is_complete
    session.prepare(plan, items(*range(6)))
    assert session.progress().growth is None
    assert [task.prompt for task in rank_all(session, who)] == ["question 2", "question 5"]
    assert session.progress().is_complete

    at_once = LabelSession(tmp_path / "other.sqlite")
    at_once.prepare(plan, items(*range(6)))
    rank_all(at_once, at_once.annotator("Ann").id)
    assert aggregate(session.labels(), "individual") == aggregate(at_once.labels(), "individual")
    assert [label.prompt for label in session.labels()] == [f"question {n}" for n in range(6)]


@pytest.mark.parametrize("plan", [LabelPlan(), LabelPlan(repeat_share=0.4, seed=3), LabelPlan(gold_share=0.3, seed=1)])
def test_done_and_left_add_up_to_the_same_number_all_the_time(store, plan):
    session = LabelSession(store)
    gold = GOLD if plan.gold_share else ()
    session.begin_growth(plan, items(0), gold, growth=Growth(1, 20))
    who, totals, tasks = session.annotator("Ann").id, [], []
    for sampled in range(1, 21):
        if sampled > 1:
            session.grow(items(sampled - 1), Growth(sampled, 20))
        tasks += rank_all(session, who)
        progress = session.progress(who)
        assert (progress.items, progress.done, progress.labels_left) == (20, sampled, 20 - sampled)
        assert progress.growth == Growth(sampled, 20)
        assert not progress.is_complete
        totals.append(progress.mine + progress.left_for_me)
    session.prepare(plan, items(*range(20)), gold)
    assert session.progress().is_complete
    tasks += rank_all(session, who)
    assert session.progress(who).left_for_me == 0
    assert len(set(totals)) == 1
    assert totals[0] == len(tasks)
    asked = Counter(task.prompt for task in tasks)
    assert {prompt for prompt in asked if prompt.startswith("question")} == {f"question {n}" for n in range(20)}
    repeated = [prompt for prompt, count in asked.items() if count > 1]
    assert bool(repeated) == bool(plan.repeat_share)
    assert any(prompt.startswith("gold") for prompt in asked) == bool(plan.gold_share)
    for prompt in repeated:
        first, second = (n for n, task in enumerate(tasks) if task.prompt == prompt)
        assert second - first >= 5
        assert tasks[second].completions == tasks[first].completions[::-1]


def test_two_annotators_with_overlap_get_what_arrives_through_sessions_of_their_own(store):
    sampler, plan = LabelSession(store), LabelPlan(overlap=2)
    sampler.begin_growth(plan, items(0), growth=Growth(1, 3))
    people = {name: LabelSession(store, create=False) for name in ("Ann", "Bo")}
    ids = {name: session.annotator(name).id for name, session in people.items()}
    seen: dict[str, list] = {name: [] for name in people}
    for arriving in ((), (1,), (2,)):
        if arriving:
            sampler.grow(items(*arriving), Growth(arriving[0] + 1, 3))
        for name, session in people.items():
            seen[name] += [task.prompt for task in rank_all(session, ids[name])]
            assert session.progress().items == 3
    assert seen["Ann"] == seen["Bo"] == ["question 0", "question 1", "question 2"]
    assert people["Bo"].progress().labels == 6


def test_prompts_whose_completions_are_all_equal_are_sampled_and_no_items(store):
    session = LabelSession(store)
    session.begin_growth(LabelPlan(), [], growth=Growth(1, 4))
    assert session.next(session.annotator("Ann").id) is None
    session.grow(items(1), Growth(2, 4))
    session.grow([], Growth(3, 4))
    progress = session.progress(1)
    assert (progress.items, progress.left_for_me) == (2, 2)
    assert str(progress.growth) == "3 of 4 prompts sampled"


def test_enough_is_counted_when_all_is_sampled(store):
    session, plan = LabelSession(store), LabelPlan(enough=0.5)
    session.begin_growth(plan, items(0, 1), growth=Growth(2, 4))
    rank_all(session, session.annotator("Ann").id)
    assert session.progress().done == 2
    assert not session.progress().is_complete
    session.prepare(plan, items(0, 1, 2, 3))
    assert session.progress().is_complete


def test_sampling_that_resumes_goes_on_with_the_plan_and_keeps_an_open_task(store):
    session, plan = LabelSession(store), LabelPlan()
    session.begin_growth(plan, items(0), GOLD, growth=Growth(1, 5))
    who = session.annotator("Ann").id
    rank_all(session, who)
    session.grow(items(1, 2), Growth(3, 5))
    task = session.next(who)
    session.save_draft(who, task.id, Entry(((1,),)), active_seconds=0)
    session.close()

    again = LabelSession(store)
    again.begin_growth(plan, items(0, 1, 2, 3), GOLD, growth=Growth(4, 5))
    assert plans(store) == 1
    assert again.next(who).id == task.id
    assert again.next(who).draft == Entry(((1,),))
    assert again.progress().items == 5


@pytest.mark.parametrize("changed", ["items", "plan", "gold"])
def test_sampling_that_begins_anew_shows_nothing_of_before(store, changed):
    session, plan = LabelSession(store), LabelPlan()
    session.begin_growth(plan, items(0), GOLD, growth=Growth(1, 5))
    who = session.annotator("Ann").id
    rank_all(session, who)
    other = LabelPlan(overlap=2) if changed == "plan" else plan
    gold = GOLD[1:] if changed == "gold" else GOLD
    session.begin_growth(other, items(7) if changed == "items" else items(0), gold, growth=Growth(1, 5))
    assert plans(store) == 2
    assert session.progress().labels == (0 if changed == "items" else 1), "labels belong to texts"
    session.begin_growth(other, items(0, 7), gold, growth=Growth(2, 5))
    assert session.progress().labels == 1


def test_a_finished_growth_is_not_taken_up_again(store):
    session, plan = LabelSession(store), LabelPlan()
    session.begin_growth(plan, items(0), growth=Growth(1, 2))
    session.prepare(plan, items(0, 1))
    session.prepare(plan, items(0, 1))
    assert plans(store) == 2
    assert session.progress().growth is None


def test_a_store_from_before_growth_existed_can_grow_and_is_only_added_to(store):
    session = LabelSession(store)
    session.prepare(LabelPlan(), items(0))
    with sqlite3.connect(store) as connection:
        assert not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'growth'").fetchone()
    assert LabelSession(store, read_only=True).progress().growth is None
    session.begin_growth(LabelPlan(seed=1), items(0), growth=Growth(1, 2))
    assert LabelSession(store, read_only=True).progress().growth == Growth(1, 2)
    with sqlite3.connect(store) as connection, pytest.raises(sqlite3.IntegrityError, match="only added"):
        connection.execute("UPDATE growth SET sampled = 2")


def test_a_rolled_back_growth_leaves_no_trace(store):
    session = LabelSession(store)
    session.prepare(LabelPlan(), items(0))

    def fail_after_growth() -> None:
        with session.transaction():
            session.begin_growth(LabelPlan(seed=1), items(0, 1), growth=Growth(2, 3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_growth()
    assert session.progress().items == 1
    session.begin_growth(LabelPlan(seed=1), items(0, 1), growth=Growth(2, 3))
    assert session.progress().items == 3
