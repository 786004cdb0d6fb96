"""A judge from the hub is one commit of it: verdicts of another are not taken for its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError
from rlhf_cli.labeling.judges import local
from rlhf_cli.models.loading import ModelSource
from tests.hub_server import forget

NAME = "acme/judge"
OLD, NEW = "a" * 40, "b" * 40
ITEMS = [Candidates("why?", ("yes", "no no"))]


@pytest.fixture
def hub(roomy_llama, tmp_path, monkeypatch) -> Path:
    """The hub's local cache, with two commits of a judge, of which `main` is the old one; nothing else is there."""
    folder = tmp_path / "hub" / "models--acme--judge"
    for commit in (OLD, NEW):
        shutil.copytree(roomy_llama, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    forget()
    return folder


def commit_of(**source) -> str | None:
    return local.pin_to_commit(ModelSource(NAME, **source), ProcessGroup()).revision


def test_a_branch_stands_for_the_commit_that_the_cache_holds(hub):
    assert commit_of() == commit_of(revision="main") == OLD
    (hub / "refs" / "main").write_text(NEW)
    assert commit_of() == OLD, "within a process a name means one commit"
    forget()
    assert commit_of() == NEW
    assert commit_of(revision=OLD) == OLD


def test_the_first_process_says_which_commit_it_is(hub):
    class Second(ProcessGroup):
        index, count = 1, 2  # pyright: ignore[reportAssignmentType]

        def __init__(self) -> None:
            pass

        def all_gather_object(self, item):
            return [NEW, item]

    assert local.pin_to_commit(ModelSource(NAME), Second()).revision == NEW


def test_what_is_not_there_is_an_error(hub):
    shutil.rmtree(hub)
    with pytest.raises(ModelError, match=r"acme/judge.*not in the hub's cache"):
        commit_of()


def test_a_new_commit_is_another_judge_and_the_one_that_is_known_is_loaded(hub, judged, report, monkeypatch):
    loaded: list[str | None] = []
    load = local.load_policy

    def watched(source: ModelSource):
        loaded.append(source.revision)
        return load(source)

    monkeypatch.setattr(local, "load_policy", watched)
    for commit, fresh in ((OLD, 2), (OLD, 0), (NEW, 2)):
        (hub / "refs" / "main").write_text(commit)
        forget()
        judged(ITEMS, panel=[{"model": NAME}])
        assert report()["judges"][0]["replies_of_this_run"] == fresh
    assert loaded == [OLD, NEW]
