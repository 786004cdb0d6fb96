"""Which labels a run directory has: those its stage was finished with, or those that people are at."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.errors import DataError
from rlhf_cli.labeling.label_records import write_labels
from rlhf_cli.labeling.label_sources import STORE, labels_of, store_of, waits_for_people
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry

BEGAN = {"identity": {"settings": {"label.by": "human"}}}


@pytest.fixture
def run(tmp_path):
    """A run that waits for people, with one label of two."""
    session = LabelSession(tmp_path / STORE)
    session.prepare(LabelPlan(), [Candidates(f"q{n}", ("a", "b")) for n in range(2)])
    rank(session)
    session.close()
    return tmp_path


def rank(session, *tiers):
    who = session.annotator("Ann").id
    task = session.next(who)
    session.submit(who, task.id, Entry(tiers or ((0,), (1,))), key=f"key {task.id} {tiers}", active_seconds=0)


def finish(run):
    labels = labels_of(run)
    (run / "label").mkdir()
    write_labels(run / "label" / "labels.jsonl", labels)


def test_of_a_run_that_waits_they_are_in_the_store(run):
    assert waits_for_people(run)
    assert store_of(run) == run / STORE
    assert len(labels_of(run)) == 1 == len(labels_of(run / STORE))


def test_of_a_finished_run_they_are_those_it_was_finished_with_and_later_ones_are_warned_of(run, capsys):
    finish(run)
    assert not waits_for_people(run)
    assert store_of(run) is None
    assert len(labels_of(run)) == 1
    assert capsys.readouterr().err == ""
    session = LabelSession(run / STORE)
    rank(session)
    assert len(labels_of(run)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "1 labels in" in said
    assert "are newer than the finished `label` stage" in said


def test_a_finished_stage_that_began_anew_waits_again(run):
    finish(run)
    (run / ".label.began.json").write_text(json.dumps(BEGAN))
    assert waits_for_people(run)
    (run / ".label.began.json").write_text(json.dumps({"identity": {"settings": {"label.by": "function"}}}))
    assert not waits_for_people(run)
    (run / ".label.began.json").write_text("torn")
    assert not waits_for_people(run)


def test_where_there_are_none_it_says_so(tmp_path):
    with pytest.raises(DataError, match="no labels found"):
        labels_of(tmp_path)
    (tmp_path / "labels.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        labels_of(tmp_path / "labels.jsonl")
