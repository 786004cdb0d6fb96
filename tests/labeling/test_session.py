"""A labeling session by hand: who gets what, what is taken and refused, and what comes out."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from rlhf_cli.data.records import Candidates, Message
from rlhf_cli.errors import DataError, DiskError, UsageError
from rlhf_cli.labeling.label_records import read_labels, write_labels
from rlhf_cli.labeling.label_sources import labels_of
from rlhf_cli.labeling.session.assignment import LEASE_MS, shown_order
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.progress import tasks_note
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.store import FORMAT, LabelStore
from rlhf_cli.labeling.session.types import (
    COMPLETION_LETTERS,
    Entry,
    InvalidLabelError,
    LabelConflictError,
    LabelTask,
    PlanChangedError,
    UnknownTaskError,
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "label" / "labels.sqlite"


def items(count: int, answers: int = 3) -> list[Candidates]:
    return [Candidates(f"question {n}", tuple(f"answer {n}.{k}" for k in range(answers))) for n in range(count)]


def opened(store: Path, clock: Clock, count: int = 6, gold: tuple[Candidates, ...] = (), **plan) -> LabelSession:
    session = LabelSession(store, clock=clock)
    session.prepare(LabelPlan(**plan), items(count), gold)
    return session


def best_first(task: LabelTask) -> Entry:
    """Ranks answers by their text, so that what comes out is known whatever order they were shown in."""
    order = sorted(range(len(task.completions)), key=lambda position: task.completions[position])
    return Entry(tuple((position,) for position in order))


def label_all(session: LabelSession, annotator: int, *, most: int = 10_000) -> list[LabelTask]:
    done = []
    while len(done) < most and (task := session.next(annotator)) is not None:
        session.submit(annotator, task.id, best_first(task), key=f"{annotator}-{task.id}-{len(done)}", active_seconds=0)
        done.append(task)
    return done


def test_a_task_says_which_completions_were_cut_off_wherever_they_are_shown(store, clock):
    session = LabelSession(store, clock=clock)
    given = [Candidates(f"question {n}", ("whole", "cut", "whole too"), cut_off=(None, 64, None)) for n in range(12)]
    session.prepare(LabelPlan(repeat_share=0.5), [*given, *items(2)])
    session.close()
    session = LabelSession(store, clock=clock)  # another process
    told = set()
    for task in label_all(session, session.annotator("Ann").id):
        shown = dict(zip(task.completions, task.endings, strict=True))
        told |= set(shown.items())
    cut = {("cut", "cut off at the limit of 64 tokens"), ("whole", ""), ("whole too", "")}
    assert told == cut | {(text, "") for item in items(2) for text in item.completions}


def test_a_later_order_of_the_completions_keeps_which_was_cut_off(store, clock):
    session = LabelSession(store, clock=clock)
    session.prepare(LabelPlan(), [Candidates("question", ("a", "b"))])  # not known then
    session.prepare(LabelPlan(overlap=2), [Candidates("question", ("b", "a"), cut_off=(8, None))])
    task = session.next(session.annotator("Ann").id)
    assert dict(zip(task.completions, task.endings, strict=True)) == {"a": "", "b": "cut off at the limit of 8 tokens"}


def test_different_limits_do_not_tell_the_sources_of_completions_apart(store, clock):
    session = LabelSession(store, clock=clock)
    session.prepare(LabelPlan(), [Candidates("question", ("a", "b", "c"), cut_off=(8, 16, None))])
    task = session.next(session.annotator("Ann").id)
    assert sorted(task.endings) == ["", "cut off at the token limit", "cut off at the token limit"]


def test_every_item_is_given_once_to_a_person_and_ranked_by_as_many_as_asked(store, clock):
    session = opened(store, clock, count=5, overlap=2)
    people = [session.annotator(name).id for name in ("Ann", "Bo", "Cy")]
    given = {who: [task.prompt for task in label_all(session, who)] for who in people}
    assert all(len(set(prompts)) == len(prompts) for prompts in given.values())
    assert Counter(prompt for prompts in given.values() for prompt in prompts) == {f"question {n}": 2 for n in range(5)}
    assert given[people[2]] == []
    assert session.progress().is_complete


def test_what_comes_out_is_in_the_items_own_order_whatever_was_shown(store, clock):
    session = opened(store, clock, count=8)
    ann = session.annotator("Ann").id
    tasks = label_all(session, ann)
    labels = session.labels()
    assert [label.prompt for label in labels] == [f"question {n}" for n in range(8)]
    assert all(label.tiers == ((0,), (1,), (2,)) for label in labels)
    shown = {task.prompt: task.completions for task in tasks}
    assert all(tuple(label.completions[index] for index in label.shown) == shown[label.prompt] for label in labels)
    assert len({label.shown for label in labels}) > 1, "the orders shown never differ"


def test_orders_are_blind_seeded_and_each_as_likely():
    orders = Counter(shown_order(7, f"item {n}", "Ann", 3) for n in range(6_000))
    assert len(orders) == 6
    assert all(880 < count < 1_120 for count in orders.values())
    assert shown_order(7, "item", "Ann", 5) == shown_order(7, "item", "ANN", 5)
    assert [shown_order(7, f"i{n}", "Ann", 4) for n in range(9)] != [
        shown_order(8, f"i{n}", "Ann", 4) for n in range(9)
    ]
    assert [shown_order(7, f"i{n}", "Ann", 4) for n in range(9)] != [shown_order(7, f"i{n}", "Bo", 4) for n in range(9)]


def test_an_answer_that_is_sent_twice_counts_once(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    first = session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
    again = session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
    elsewhere = session.submit(ann, task.id, best_first(task), key="another key", active_seconds=0)
    assert first.is_new
    assert (again.action, again.is_new) == (first.action, False) == (elsewhere.action, elsewhere.is_new)
    assert len(session.labels()) == 1


def test_another_answer_to_the_same_task_is_refused_and_the_first_stays(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
    other = Entry(tuple(reversed(best_first(task).tiers)))
    with pytest.raises(LabelConflictError, match="another label already"):
        session.submit(ann, task.id, other, key="k2", active_seconds=0)
    with pytest.raises(LabelConflictError):
        session.skip(ann, task.id, key="k3", active_seconds=0)
    following = session.next(ann)
    with pytest.raises(LabelConflictError, match="key was used before"):
        session.submit(ann, following.id, best_first(following), key="k", active_seconds=0)
    assert [label.tiers for label in session.labels()] == [((0,), (1,), (2,))]


def test_nobody_answers_for_another(store, clock):
    session = opened(store, clock)
    ann, bo = session.annotator("Ann").id, session.annotator("Bo").id
    task = session.next(ann)
    for number in (task.id, 999):
        with pytest.raises(UnknownTaskError):
            session.submit(bo, number, best_first(task), key="k", active_seconds=0)
    with pytest.raises(UnknownTaskError):
        session.task(bo, task.id)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        pytest.param(Entry(((0,), (1,))), "answer c has no place yet", id="one lacks"),
        pytest.param(Entry(), "answers a, b, c have no place yet", id="all lack"),
        pytest.param(Entry(((0,), (1,), (2,), (0,))), "answer a has two places", id="twice"),
        pytest.param(Entry(((0,), (1,), (2,), (3,))), "answer number 3 does not exist", id="too many"),
        pytest.param(Entry(((0, 1, 2), ())), "a tier is empty", id="empty tier"),
        pytest.param(Entry(((0,), (1,), (2,)), strength=2), "unexpected strength", id="strength not asked"),
        pytest.param(Entry(((0,), (1,), (2,)), marks={"fun": (1, 1, 1)}), "unknown criterion `fun`", id="criterion"),
        pytest.param(Entry(((0,), (1,), (2,)), note="x" * 10_001), "the note has 10,001 characters", id="long note"),
        pytest.param(Entry(((0,), (1,), (2,)), note="\ud800"), "the note has an invalid character", id="surrogate"),
    ],
)
def test_a_label_that_is_not_whole_is_refused_and_changes_nothing(store, clock, entry, says):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    with pytest.raises(InvalidLabelError, match=says):
        session.submit(ann, task.id, entry, key="k", active_seconds=0)
    assert session.labels() == []
    assert session.next(ann) == task


def test_marks_and_strengths_are_asked_for_and_kept_by_answer(store, clock):
    session = LabelSession(store, clock=clock)
    session.prepare(LabelPlan(criteria=("honest",), strengths=True), items(1, answers=2))
    ann = session.annotator("Ann").id
    task = session.next(ann)
    ranked = best_first(task).tiers
    with pytest.raises(InvalidLabelError, match="how much better"):
        session.submit(ann, task.id, Entry(ranked, marks={"honest": (1, 2)}), key="a", active_seconds=0)
    with pytest.raises(InvalidLabelError, match="answer b needs a mark for `honest`"):
        session.submit(ann, task.id, Entry(ranked, 3, {"honest": (1, None)}), key="b", active_seconds=0)
    with pytest.raises(InvalidLabelError, match="answer a needs a mark for `honest`"):
        session.submit(ann, task.id, Entry(ranked, 3, {"honest": (6, 1)}), key="c", active_seconds=0)
    marks = tuple(5 if answer == "answer 0.0" else 1 for answer in task.completions)
    session.submit(ann, task.id, Entry(ranked, 3, {"honest": marks}), key="d", active_seconds=0)
    (label,) = session.labels()
    assert (label.strength, dict(label.marks)) == (3, {"honest": (5, 1)})
    assert label.ranking().margin == pytest.approx(2 / 3)


def test_a_tie_of_two_has_no_strength(store, clock):
    session = LabelSession(store, clock=clock)
    session.prepare(LabelPlan(strengths=True), items(1, answers=2))
    ann = session.annotator("Ann").id
    task = session.next(ann)
    with pytest.raises(InvalidLabelError, match="unexpected strength"):
        session.submit(ann, task.id, Entry(((0, 1),), 1), key="k", active_seconds=0)
    assert session.submit(ann, task.id, Entry(((0, 1),)), key="k", active_seconds=0).is_new


def test_going_back_opens_one_answer_after_the_other_and_both_can_change(store, clock):
    session = opened(store, clock, count=3)
    ann = session.annotator("Ann").id
    first, second, third = label_all(session, ann)
    assert session.progress().is_complete
    back = session.undo(ann, key="u1")
    assert (back.id, back.draft) == (third.id, best_first(third))
    assert session.undo(ann, key="u1").id == third.id, "an undo that is sent twice goes back once"
    assert session.undo(ann, key="u2").id == second.id
    assert session.next(ann).id == second.id
    changed = Entry(tuple(reversed(best_first(second).tiers)))
    session.submit(ann, second.id, changed, key="new 2", active_seconds=0)
    assert session.next(ann).id == third.id
    assert not session.progress().is_complete
    session.skip(ann, third.id, key="new 3", active_seconds=0)
    tiers = {label.prompt: (label.outcome, label.tiers) for label in session.labels()}
    assert tiers[first.prompt] == ("ranked", ((0,), (1,), (2,)))
    assert tiers[second.prompt] == ("ranked", ((2,), (1,), (0,)))
    assert tiers[third.prompt] == ("skipped", ())


def test_there_is_nothing_to_take_back_before_the_first_answer(store, clock):
    session = opened(store, clock)
    assert session.undo(session.annotator("Ann").id, key="u") is None


def test_a_skipped_item_goes_to_others_until_it_is_set_aside(store, clock):
    session = opened(store, clock, count=1, set_aside_after=2)
    ann, bo, cy = (session.annotator(name).id for name in ("Ann", "Bo", "Cy"))
    session.skip(ann, session.next(ann).id, key="a", active_seconds=0, reason="not my field")
    assert session.next(ann) is None
    session.flag(bo, session.next(bo).id, key="b", active_seconds=0, reason="a phone number")
    assert session.next(cy) is None
    progress = session.progress()
    assert (progress.done, progress.set_aside, progress.is_complete) == (1, 1, True)
    assert [(label.outcome, label.reason) for label in session.labels()] == [
        ("skipped", "not my field"),
        ("flagged", "a phone number"),
    ]


def test_a_flag_needs_a_reason(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    with pytest.raises(InvalidLabelError, match="needs a reason"):
        session.flag(ann, session.next(ann).id, key="k", active_seconds=0, reason="  ")


def test_an_item_in_hand_is_kept_for_its_person_but_not_for_ever(store, clock):
    session = opened(store, clock, count=1)
    ann, bo = session.annotator("Ann").id, session.annotator("Bo").id
    task = session.next(ann)
    assert session.next(bo) is None
    clock.now += LEASE_MS / 1000 - 1
    session.save_draft(ann, task.id, Entry(((0,),)), active_seconds=5)
    clock.now += 2
    assert session.next(bo) is None, "a draft shows that somebody is at it"
    clock.now += LEASE_MS / 1000
    taken = session.next(bo)
    assert taken.prompt == task.prompt
    session.submit(bo, taken.id, best_first(taken), key="b", active_seconds=0)
    session.submit(ann, task.id, best_first(task), key="a", active_seconds=0)
    assert len(session.labels()) == 2, "late work is not thrown away"


def test_a_draft_outlives_the_session_and_time_goes_on_from_it(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    clock.now += 100
    draft = Entry(((2,), (0,)), note="hm")
    session.save_draft(ann, task.id, draft, active_seconds=42)
    session.close()
    again = LabelSession(store, clock=clock)
    resumed = again.next(again.annotator("ann").id)
    assert (resumed.id, resumed.draft, resumed.active_seconds) == (task.id, draft, 42.0)


def test_a_late_draft_does_not_touch_an_answer(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
    session.save_draft(ann, task.id, Entry(((1,),)), active_seconds=0)
    assert session.undo(ann, key="u").draft == best_first(task)


def test_active_time_is_never_more_than_passed(store, clock):
    session = opened(store, clock, count=2)
    ann = session.annotator("Ann").id
    for claimed, passed in ((1e12, 30.0), (7.0, 60.0)):
        task = session.next(ann)
        for wrong in (-1.0, float("nan")):
            with pytest.raises(InvalidLabelError, match="active time"):
                session.save_draft(ann, task.id, Entry(), active_seconds=wrong)
        clock.now += passed
        session.submit(ann, task.id, best_first(task), key=f"{claimed}", active_seconds=claimed)
    assert sorted(label.active_seconds for label in session.labels()) == [7.0, 30.0]


def test_hidden_repeats_come_late_once_in_another_order_and_count_apart(store, clock):
    session = opened(store, clock, count=120, repeat_share=0.2)
    ann = session.annotator("Ann").id
    tasks = label_all(session, ann)
    labels = session.labels()
    repeats = [label for label in labels if label.purpose == "repeat"]
    assert 12 < len(repeats) < 40
    assert len({label.item for label in repeats}) == len(repeats)
    first = {label.item: label for label in labels if label.purpose == "label"}
    assert all(label.shown == tuple(reversed(first[label.item].shown)) for label in repeats)
    place = {}
    for number, task in enumerate(tasks):
        assert number - place.setdefault(task.prompt, number) in {0, *range(5, 200)}
    assert session.progress().labels == 120


def test_the_number_of_hidden_tasks_is_told_from_the_beginning_and_never_which(store, clock):
    gold = tuple(Candidates(f"gold {n}", ("good", "bad"), ((0,), (1,))) for n in range(3))
    session = opened(store, clock, count=40, gold=gold, repeat_share=0.2, gold_share=0.1)
    ann, told = session.annotator("Ann").id, set()
    while (task := session.next(ann)) is not None:
        for _ in range(2):  # before and after the label
            progress = session.progress(ann)
            told.add((progress.mine + progress.left_for_me, progress.hidden))
            session.submit(ann, task.id, best_first(task), key=f"key {task.id}", active_seconds=0)
    labels = session.labels()
    hidden = sum(label.purpose != "label" for label in labels)
    assert told == {(len(labels), hidden)}
    assert len(labels) == 40 + hidden > 45
    note = tasks_note(session.progress(ann), session.plan)
    assert note == f"{len(labels)} tasks: 40 prompts, and {hidden} that check the labels"


def test_more_tasks_than_prompts_are_explained(store, clock):
    session = opened(store, clock, count=30, repeat_share=0.2, seed=1)
    progress = session.progress(session.annotator("Ann").id)
    count = progress.hidden
    assert count > 0
    note = f"{30 + count} tasks: 30 prompts, {count} of them twice to measure your consistency"
    assert tasks_note(progress, session.plan) == note
    plain = opened(store.with_name("plain.sqlite"), clock, count=30)
    assert tasks_note(plain.progress(plain.annotator("Ann").id), plain.plan) == ""


def test_gold_is_shown_among_the_others_and_keeps_its_known_order(store, clock):
    gold = tuple(Candidates(f"gold {n}", ("good", "bad"), ((0,), (1,))) for n in range(3))
    session = opened(store, clock, count=60, gold=gold, gold_share=0.2)
    label_all(session, session.annotator("Ann").id)
    found = [label for label in session.labels() if label.purpose == "gold"]
    assert len(found) == 3
    assert all(label.known == ((0,), (1,)) for label in found)
    assert session.progress().labels == 60


def test_the_same_plan_again_changes_nothing_and_new_items_keep_old_labels(store, clock):
    session = opened(store, clock, count=4)
    ann = session.annotator("Ann").id
    label_all(session, ann)
    session.prepare(LabelPlan(), items(4))
    assert sqlite3.connect(store).execute("SELECT count(*) FROM plans").fetchone() == (1,)
    session.prepare(LabelPlan(), items(6))
    assert [task.prompt for task in label_all(session, ann)] == ["question 4", "question 5"]
    session.prepare(LabelPlan(overlap=2), items(6))
    assert session.progress().labels_left == 6
    session.prepare(LabelPlan(), items(2))
    assert [label.prompt for label in session.labels()] == ["question 0", "question 1"]


def test_labels_keep_the_hash_of_the_guidelines_that_were_shown(store, clock):
    session = opened(store, clock, count=2, guidelines="be kind")
    ann = session.annotator("Ann").id
    label_all(session, ann, most=1)
    session.prepare(LabelPlan(guidelines="be strict"), items(2))
    label_all(session, ann)
    hashes = [label.guidelines for label in session.labels()]
    assert hashes == [LabelPlan(guidelines=text).guidelines_hash for text in ("be kind", "be strict")]


def test_enough_is_a_share_of_the_items(store, clock):
    session = opened(store, clock, count=4, enough=0.5)
    ann = session.annotator("Ann").id
    label_all(session, ann, most=1)
    assert not session.progress().is_complete
    label_all(session, ann, most=1)
    assert session.progress().is_complete


def test_one_name_is_one_person_and_a_name_is_no_trick(store, clock):
    session = opened(store, clock)
    assert session.annotator("  Ann   Lee ") == session.annotator("ann lee")
    for name in ("", "   ", "x" * 61, "a\x1b[31mb", "a\u202eb", "tab\x00"):
        with pytest.raises(InvalidLabelError):
            session.annotator(name)


def test_two_processes_over_one_file_see_each_other(store, clock):
    one = opened(store, clock, count=4)
    other = LabelSession(store, clock=clock)
    ann, bo = one.annotator("Ann").id, other.annotator("Bo").id
    first, second = one.next(ann), other.next(bo)
    assert first.prompt != second.prompt
    one.submit(ann, first.id, best_first(first), key="k", active_seconds=0)
    assert other.progress().labels == 1
    assert other.labels() == one.labels()


def test_a_transaction_that_fails_leaves_nothing_in_memory_either(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)

    def fail_after_writing() -> None:
        with session.transaction():
            session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_writing()
    assert session.labels() == []
    assert session.submit(ann, task.id, best_first(task), key="k", active_seconds=0).is_new


def test_a_refused_label_does_not_harm_others_of_the_same_transaction(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    with session.transaction():
        task = session.next(ann)
        with pytest.raises(InvalidLabelError):
            session.submit(ann, task.id, Entry(), key="x", active_seconds=0)
        session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
    assert len(LabelSession(store).labels()) == 1


def test_the_file_itself_refuses_to_change_or_delete_a_row_or_to_answer_twice(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
    raw = sqlite3.connect(store)
    tables = [row[0] for row in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    assert len(tables) == 9
    filled = [table for table in tables if raw.execute(f"SELECT count(*) FROM {table}").fetchone()[0]]
    assert {"items", "plans", "listed", "annotators", "assignments", "actions"} <= set(filled)
    for table in filled:
        for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET rowid = rowid + 1000"):
            with pytest.raises(sqlite3.IntegrityError, match="only added"):
                raw.execute(statement)
    with pytest.raises(sqlite3.IntegrityError, match="has a label"):
        raw.execute("INSERT INTO actions VALUES (99, 1, 'skipped', 'z', '{}', NULL, 1, 0, 0)")


def test_conversations_and_strange_texts_come_out_as_they_went_in(store, clock, tmp_path):
    prompt = (Message("system", "be\u202ebrief"), Message("user", "\x1b[31m<script>"))
    texts = ("", "line\nline\r\n", "\U0001f600 \u0000", "' OR 1=1 --")
    session = LabelSession(store, clock=clock)
    session.prepare(LabelPlan(), [Candidates(prompt, texts)])
    label_all(session, session.annotator("Ann").id)
    (label,) = session.labels()
    assert (label.prompt, label.completions) == (prompt, texts)
    write_labels(tmp_path / "labels.jsonl", [label])
    assert list(read_labels(tmp_path / "labels.jsonl")) == [label]
    assert labels_of(tmp_path) == [label]
    assert labels_of(tmp_path / "labels.jsonl") == [label]


def test_what_is_no_store_is_named_and_left_alone(tmp_path, clock):
    text = tmp_path / "text.sqlite"
    text.write_text("I am no database at all, and somebody needs me. " * 50)
    with pytest.raises(DataError, match="not a label store"):
        LabelSession(text)
    assert text.read_text().startswith("I am no database")
    foreign = tmp_path / "foreign.sqlite"
    sqlite3.connect(foreign).execute("CREATE TABLE mine (x)")
    with pytest.raises(DataError, match="but not a label store"):
        LabelSession(foreign)
    with pytest.raises(DataError, match="no such label store"):
        LabelSession(tmp_path / "absent.sqlite", create=False)
    with pytest.raises(DataError, match="no labels found"):
        labels_of(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        LabelSession(tmp_path / "file" / "labels.sqlite")


@pytest.mark.parametrize("other", [FORMAT - 1, FORMAT + 1])
def test_a_store_of_another_format_is_refused(store, clock, other):
    opened(store, clock).close()
    raw = sqlite3.connect(store)
    raw.executescript(f"DROP TRIGGER meta_no_update; UPDATE meta SET value = '{other}' WHERE name = 'format';")
    raw.close()
    with pytest.raises(UsageError, match=f"has format {other}, but this rlhf reads format {FORMAT}"):
        LabelSession(store)


def test_entries_of_strangers_are_checked_by_type():
    assert Entry.of({"tiers": [[1, 0]], "note": "x"}) == Entry(((0, 1),), note="x")
    for plain in ([], {"tiers": "ab"}, {"tiers": [["0"]]}, {"tiers": [[True]]}, {"strength": "1"}, {"marks": {"a": 1}},
                  {"note": 3}, {"marks": {"a": ["1"]}}, {"tires": []}):  # fmt: skip
        with pytest.raises(InvalidLabelError):
            Entry.of(plain)


def test_letters_of_answers_are_no_commands():
    assert len(COMPLETION_LETTERS) == len(set(COMPLETION_LETTERS)) == 16
    assert not set(COMPLETION_LETTERS) & set("fnqsu")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("ranking", [[0], [1]], "`ranking` must hold each of the 3 completions once"),
        ("ranking", [[0], [1], [1, 2]], "`ranking` must hold"),
        ("shown", [0, 1, 3], "`shown` must hold"),
        ("known", [[0]], "`known` must hold"),
        ("strength", 5, "`strength` must be 1 to 4, got 5"),
        ("marks", {"honest": [1, 2]}, "`marks` of 'honest'"),
        ("marks", {"honest": [1, 2, 9]}, "`marks` of 'honest'"),
        ("outcome", "liked", "`outcome` is 'liked'"),
        ("completions", None, "NoneType"),
        ("completions", ["a", 3, "b"], "must hold strings"),
        ("ranking", [[0.0], [1], [2]], "must be whole numbers"),
        ("shown", [0, True, 2], "must be whole numbers"),
        ("strength", True, "must be whole numbers"),
        ("active_seconds", "x", "`active_seconds` must be a number of at least 0, got 'x'"),
        ("active_seconds", float("inf"), "`active_seconds` must be a number of at least 0, got inf"),
        ("at", 5, "`at` must be a string, got 5"),
        ("at", "yesterday", "yesterday"),
        ("annotator", 5, "`annotator` must be a string, got 5"),
        ("item", [1], "`item` must be a string, got [1]"),
        ("note", None, "`note` must be a string, got None"),
        ("reason", {}, "`reason` must be a string, got {}"),
    ],
)
def test_a_label_that_contradicts_itself_is_named_by_its_line(store, clock, tmp_path, field, value, says):
    session = opened(store, clock, count=2)
    label_all(session, session.annotator("Ann").id)
    write_labels(tmp_path / "labels.jsonl", session.labels())
    lines = (tmp_path / "labels.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {field: value})
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"labels\.jsonl:2: invalid label") as raised:
        list(read_labels(tmp_path / "labels.jsonl"))
    assert says in str(raised.value)


def test_what_is_left_gives_no_repeat_and_no_gold_item_away(store, clock):
    gold = tuple(Candidates(f"gold {n}", ("good", "bad"), ((0,), (1,))) for n in range(4))
    session = opened(store, clock, count=60, gold=gold, gold_share=0.1, repeat_share=0.1)
    ann = session.annotator("Ann").id
    totals = set()
    while (task := session.next(ann)) is not None:
        before = session.progress(ann)
        totals.add(before.mine + before.left_for_me)
        session.submit(ann, task.id, best_first(task), key=f"{task.id}", active_seconds=0)
        after = session.progress(ann)
        assert after.left_for_me == before.left_for_me - 1
    hidden = Counter(label.purpose for label in session.labels())
    assert hidden["repeat"] > 2
    assert hidden["gold"] > 2
    assert totals == {hidden.total()}


def test_a_label_under_other_guidelines_than_those_shown_is_refused_and_goes_in_after_a_look(store, clock):
    session = opened(store, clock, count=2, guidelines="be kind")
    ann = session.annotator("Ann").id
    task = session.next(ann)
    other = LabelSession(store, clock=clock)
    other.prepare(LabelPlan(guidelines="be strict"), items(2))
    with pytest.raises(PlanChangedError):
        session.submit(ann, task.id, best_first(task), key="k", active_seconds=0, plan=task.plan)
    assert session.labels() == []
    again = session.next(ann)
    assert (again.id, again.plan) == (task.id, LabelPlan(guidelines="be strict").display_hash)
    session.submit(ann, task.id, best_first(task), key="k", active_seconds=0, plan=again.plan)
    (label,) = session.labels()
    assert label.guidelines == LabelPlan(guidelines="be strict").guidelines_hash


def test_an_answer_that_stands_is_acknowledged_again_whatever_is_asked_now(store, clock):
    session = opened(store, clock, count=2)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    session.submit(ann, task.id, best_first(task), key="k", active_seconds=0, plan=task.plan)
    session.prepare(LabelPlan(criteria=("honest",)), items(2))
    assert not session.submit(ann, task.id, best_first(task), key="k", active_seconds=0, plan=task.plan).is_new


def test_a_late_copy_of_an_answer_that_was_taken_back_is_not_acknowledged(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
    session.undo(ann, key="u")
    with pytest.raises(LabelConflictError, match="was undone"):
        session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
    assert session.labels() == []


def test_a_gold_order_that_is_corrected_counts_for_labels_given_before_too(store, clock):
    def gold(*tiers):
        return [Candidates("gold", ("x", "y"), tiers)]

    session = LabelSession(store, clock=clock)
    session.prepare(LabelPlan(gold_share=0.9), items(9), gold((0,), (1,)))
    label_all(session, session.annotator("Ann").id)
    assert [label.known for label in session.labels() if label.purpose == "gold"] == [((0,), (1,))]
    session.prepare(LabelPlan(gold_share=0.9), items(9), gold((1,), (0,)))
    assert [label.known for label in session.labels() if label.purpose == "gold"] == [((1,), (0,))]


def test_what_was_an_item_can_become_gold_with_its_answers_in_another_order(store, clock):
    session = LabelSession(store, clock=clock)
    session.prepare(LabelPlan(), [Candidates("q", ("bad", "good"))])
    session.prepare(LabelPlan(gold_share=0.9), items(5), [Candidates("q", ("good", "bad"), ((0,), (1,)))])
    label_all(session, session.annotator("Ann").id)
    (found,) = [label for label in session.labels() if label.purpose == "gold"]
    assert (found.completions, found.known) == (("bad", "good"), ((1,), (0,)))


def test_the_same_answers_in_another_order_are_the_same_item(store, clock):
    session = opened(store, clock, count=3)
    label_all(session, session.annotator("Ann").id)
    turned = [Candidates(item.prompt, tuple(reversed(item.completions))) for item in items(3)]
    session.prepare(LabelPlan(), turned)
    assert session.progress().is_complete
    best = [label.completions[label.tiers[0][0]] for label in session.labels()]
    assert best == [f"answer {n}.0" for n in range(3)]


def test_going_back_leaves_alone_what_the_plan_has_no_longer(store, clock):
    session = opened(store, clock, count=2)
    ann = session.annotator("Ann").id
    label_all(session, ann)
    session.prepare(LabelPlan(), items(1))
    assert session.undo(ann, key="u").prompt == "question 0"
    assert session.undo(ann, key="u2") is None
    session.prepare(LabelPlan(), items(2)[1:])
    assert session.next(ann) is None, "what was reopened is asked for no longer"


@pytest.mark.parametrize(("enough", "count", "needed"), [(0.07, 100, 7), (0.55, 100, 55), (0.28, 25, 7), (1 / 3, 3, 1)])
def test_a_share_is_not_lost_to_rounding(store, clock, enough, count, needed):
    session = opened(store, clock, count=count, enough=enough)
    ann = session.annotator("Ann").id
    label_all(session, ann, most=needed - 1)
    assert not session.progress().is_complete
    label_all(session, ann, most=1)
    assert session.progress().is_complete


def test_a_clock_that_is_set_back_keeps_nobody_waiting_and_loses_no_time(store, clock):
    session = opened(store, clock, count=1)
    ann, bo = session.annotator("Ann").id, session.annotator("Bo").id
    task = session.next(ann)
    clock.now -= 86_400
    assert session.next(bo) is not None
    session.submit(ann, task.id, best_first(task), key="k", active_seconds=30)
    assert [label.active_seconds for label in session.labels()] == [30.0]


@pytest.mark.parametrize(
    "draft",
    [
        Entry(((0,), (0,))),
        Entry(((3,),)),
        Entry(strength=2),
        Entry(marks={"fun": (1,)}),
        Entry(marks={"honest": (9,)}),
        Entry(marks={"honest": (1, 1, 1, 1)}),
        Entry(note="x" * 10_001),
    ],
)
def test_a_draft_that_no_label_could_begin_with_is_refused(store, clock, draft):
    session = opened(store, clock, criteria=("honest",))
    ann = session.annotator("Ann").id
    with pytest.raises(InvalidLabelError):
        session.save_draft(ann, session.next(ann).id, draft, active_seconds=0)


def test_the_same_draft_again_is_no_new_row(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    clock.now += 100
    for seconds in (1, 2, 3, 30):
        session.save_draft(ann, task.id, Entry(((0,),)), active_seconds=seconds)
    assert sqlite3.connect(store).execute("SELECT count(*) FROM drafts").fetchone() == (2,)


def test_a_name_is_the_same_however_its_accents_are_written(store, clock):
    session = opened(store, clock)
    assert session.annotator("Jos\u00e9") == session.annotator("Jose\u0301")


def test_looking_at_labels_needs_no_permission_to_write_and_waits_for_nobody(store, clock):
    session = opened(store, clock)
    label_all(session, session.annotator("Ann").id)
    expected = session.labels()
    writer = sqlite3.connect(store, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert LabelSession(store, read_only=True).labels() == expected
    writer.execute("ROLLBACK")
    writer.close()
    session.close()
    before = sorted(store.parent.iterdir())
    looking = LabelSession(store, read_only=True)
    assert looking.labels() == expected
    with pytest.raises(DiskError):
        looking.annotator("Bo")
    looking.close()
    assert sorted(store.parent.iterdir()) == before


@pytest.mark.parametrize("table", ["meta (name, value)", "meta (x)", "other (x)"])
def test_a_database_of_somebody_else_is_no_label_store(tmp_path, table):
    path = tmp_path / "theirs.sqlite"
    sqlite3.connect(path).execute(f"CREATE TABLE {table}")
    for read_only in (True, False):
        with pytest.raises(DataError, match="but not a label store"):
            LabelSession(path, read_only=read_only)


def test_what_was_entered_outlives_a_skip_that_is_taken_back(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
    assert session.undo(ann, key="u").draft == best_first(task)
    session.skip(ann, task.id, key="s", active_seconds=0)
    assert session.undo(ann, key="u2").draft == best_first(task)
    session.save_draft(ann, task.id, Entry(((1,),)), active_seconds=0)
    session.skip(ann, task.id, key="s2", active_seconds=0)
    assert session.undo(ann, key="u3").draft == Entry(((1,),))
    assert LabelSession(store, clock=clock).task(ann, task.id).draft == Entry(((1,),))


def test_a_draft_written_over_a_ranking_that_was_taken_back_outlives_a_skip(store, clock):
    session = opened(store, clock)
    ann = session.annotator("Ann").id
    task = session.next(ann)
    session.submit(ann, task.id, best_first(task), key="k", active_seconds=0)
    session.undo(ann, key="u")
    session.save_draft(ann, task.id, Entry(((1,),)), active_seconds=0)
    session.skip(ann, task.id, key="s", active_seconds=0)
    assert session.undo(ann, key="u2").draft == Entry(((1,),))


def test_what_is_left_for_one_person_is_what_they_have_not_had(store, clock):
    session = opened(store, clock, count=6, overlap=2)
    ann, bo = session.annotator("Ann").id, session.annotator("Bo").id
    label_all(session, ann, most=4)
    assert (session.progress(ann).left_for_me, session.progress(bo).left_for_me) == (2, 6)
    label_all(session, bo, most=1)
    assert session.progress(bo).left_for_me == 5


def test_what_is_committed_is_forced_to_the_disk(store):
    connection = LabelStore(store).connection
    full = 2
    assert connection.execute("PRAGMA synchronous").fetchone() == (full,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
