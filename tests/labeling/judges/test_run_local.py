"""`run_judges` with local models: cached, interrupted between batches, shared among processes, beside endpoints."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError, Interrupted
from rlhf_cli.labeling.judges import local
from tests.stops import StopAtCheck

ITEMS = [Candidates(f"question {number}", ("yes", "no " * (1 + number), "maybe")) for number in range(5)]
QUESTIONS = 5 * 3 * 2


def kept(folder: Path) -> dict[str, list[str]]:
    """Keys in each file of verdicts."""
    return {
        path.name: [json.loads(line)["key"] for line in path.read_text().splitlines()]
        for path in sorted((folder / "kept" / "label").glob("verdicts*.jsonl"))
    }


@pytest.fixture
def few_at_once(monkeypatch) -> None:
    monkeypatch.setattr(local, "QUESTIONS_AT_ONCE", 4)


def test_a_local_model_labels_and_is_not_loaded_again_for_what_it_said(roomy_llama, judged, report, votes, monkeypatch):
    found = judged(ITEMS, panel=[{"model": str(roomy_llama)}])
    assert [ranking is not None for ranking in found.rankings] == [True] * 5
    (one,) = report()["judges"]
    assert (one["name"], one["questions"], one["replies_of_this_run"]) == ("roomy-llama", QUESTIONS, QUESTIONS)
    assert 0.0 < one["says_a_letter"] < 0.2, "an untrained model says anything"
    assert any("hardly understands the question" in warning["advice"] for warning in report()["warnings"])
    for vote in votes():
        first, second = vote["chances"]
        assert vote["ranking"][0] == [vote["shown"][0 if first > second else 1]]
    monkeypatch.setattr(local, "load_policy", lambda *_: pytest.fail("nothing is left to ask"))
    again = judged(ITEMS, panel=[{"model": str(roomy_llama)}])
    assert again == found
    assert report()["judges"][0]["replies_of_this_run"] == 0


def test_other_weights_are_another_judge(roomy_llama, tiny_llama, judged, tmp_path):
    judged(ITEMS, panel=[{"model": str(roomy_llama)}])
    with pytest.raises(DataError, match="ranked none of 5 prompts"):  # its room is too small for all of them
        judged(ITEMS, panel=[{"model": str(tiny_llama)}])
    assert len(kept(tmp_path)["verdicts.jsonl"]) == 2 * QUESTIONS


def test_what_is_too_long_is_said(tiny_llama, judged, report):
    with pytest.raises(DataError):
        judged(ITEMS, panel=[{"model": str(tiny_llama)}])
    assert report()["judges"][0]["failures"] == {"longer than the judge reads": QUESTIONS}
    assert any(
        f"cannot read {QUESTIONS} of {QUESTIONS} questions" in warning["text"] for warning in report()["warnings"]
    )


def test_a_signal_between_batches_keeps_what_was_said(roomy_llama, judged, report, tmp_path, few_at_once):
    stop = StopAtCheck(3)  # it is asked before the first batch, then after each
    with pytest.raises(Interrupted):
        judged(ITEMS, panel=[{"model": str(roomy_llama)}], stop=stop)
    assert len(kept(tmp_path)["verdicts.jsonl"]) == 8
    judged(ITEMS, panel=[{"model": str(roomy_llama)}])
    keys = kept(tmp_path)["verdicts.jsonl"]
    assert len(keys) == len(set(keys)) == QUESTIONS
    assert report()["judges"][0]["replies_of_this_run"] == QUESTIONS - 8


class Thread(ProcessGroup):
    """One of several "processes" that are threads here."""

    def __init__(self, index: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        super().__init__()
        self.index, self.count = index, barrier.parties
        self._barrier, self._board = barrier, board

    def all_gather_object(self, item: Any) -> list[Any]:
        self._board[self.index] = json.dumps(item)
        self._barrier.wait()
        found = [json.loads(self._board[index]) for index in range(self.count)]
        self._barrier.wait()
        return found


def test_processes_share_the_questions_to_a_local_model_and_rank_0_asks_endpoints(
    roomy_llama, judged, endpoint, report, votes, tmp_path, few_at_once, monkeypatch
):
    # Loading swaps functions of transformers for a while, which threads share and processes do not.
    load, one_at_a_time = local.load_policy, threading.Lock()

    def alone_loaded(source: Any) -> Any:
        with one_at_a_time:
            return load(source)

    monkeypatch.setattr(local, "load_policy", alone_loaded)
    panel = [{"model": str(roomy_llama)}, {"url": endpoint.url, "name": "judge"}]
    alone = judged(ITEMS, panel=panel)
    said = votes()
    for file in (tmp_path / "kept" / "label").iterdir():
        file.unlink()
    endpoint.requests.clear()
    barrier, board, results = threading.Barrier(2, timeout=60), {}, {}

    def work(index: int) -> None:
        results[index] = judged(ITEMS, panel=panel, processes=Thread(index, barrier, board))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == alone
    assert results[1].rankings == []
    assert len(endpoint.requests) == QUESTIONS
    files = kept(tmp_path)
    assert len(files["verdicts-1.jsonl"]) == QUESTIONS // 2
    keys = [key for found in files.values() for key in found]
    assert len(keys) == len(set(keys)) == 2 * QUESTIONS
    for one, other in zip(votes(), said, strict=True):
        chances, expected = one.pop("chances"), other.pop("chances")
        assert one == other
        assert chances == (None if expected is None else pytest.approx(expected, rel=1e-4))
    # What each process kept is found by a run of one.
    judged(ITEMS, panel=panel)
    assert len(endpoint.requests) == QUESTIONS
    assert [judge["replies_of_this_run"] for judge in report()["judges"]] == [0, 0]
