"""The stage while people label: what is sampled is listed at once, whatever ends it, and the result is the same."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.records import prompt_key
from rlhf_cli.data.splits import Split
from rlhf_cli.errors import DiskError, Interrupted, RLHFError, WaitingForLabelsError
from rlhf_cli.generation.generator import Completion
from rlhf_cli.labeling.active_learning import Item, select
from rlhf_cli.labeling.label_sources import STORE
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Entry, Growth
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.completions import chunks_by_length, early_chunks
from rlhf_cli.stages.label import run as label
from tests.stages.context import stage_context

COUNT = 12


class Drawn:
    """Draws texts that depend on the seed alone; `before` runs before each call, with its number."""

    def __init__(
        self, before: Callable[[int], object] = lambda call: None, *, equal: bool = False, finished: bool = True
    ) -> None:
        self.calls: list[int] = []
        self._before, self._equal, self._finished = before, equal, finished

    def generate(self, policy, requests, *, progress=None, stop=lambda: None):
        self._before(len(self.calls))
        stop()
        self.calls.append(len(requests))
        progress(len(requests), len(requests))
        seeds = [0 if self._equal else request.seed for request in requests]
        return [Completion([seed % 50 + 5], f"text {seed}", self._finished) for seed in seeds]


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{'x' * (COUNT - n)} {n}?"}) + "\n" for n in range(COUNT)))

    def run_stage(generator: Drawn, name: str = "run", outcome: bool = False, **human: object) -> Any:
        active = human.pop("active_learning", None)
        section = {"by": "human", "completions_per_prompt": 2, "sampling": {"max_new_tokens": 4, "batch_size": 8}}
        section |= {"human": {"repeat_share": 0.0} | human} | ({"active_learning": active} if active else {})
        recipe = Recipe.model_validate({"model": {"precision": "float32"}, "label": section})
        folders = {"output": tmp_path / name / ".label.output", "work": tmp_path / name / ".label.work"}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        context = stage_context("label", recipe, **folders, policy=str(tiny_llama), prompts=str(prompts))
        found = label.run(context, generator)  # type: ignore[arg-type]
        return (
            found
            if outcome
            else [json.loads(line) for line in (folders["output"] / "rankings.jsonl").read_text().splitlines()]
        )

    return run_stage


def label_ready(run_dir: Path, most: int = 100) -> int:
    """Rank what is there by text; returns how many."""
    if not (run_dir / STORE).is_file():
        return 0
    with closing(LabelSession(run_dir / STORE, create=False)) as session:
        who, count = session.annotator("Ann").id, 0
        while count < most and (task := session.next(who)) is not None:
            order = sorted(range(2), key=lambda position: task.completions[position])
            entry = Entry(tuple((position,) for position in order))
            session.submit(who, task.id, entry, key=f"key {task.id}", active_seconds=0)
            count += 1
    return count


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def progress_of(run_dir: Path):
    with closing(LabelSession(run_dir / STORE, read_only=True)) as session:
        return session.progress()


def test_labels_given_during_sampling_make_the_same_rankings(run, tmp_path):
    labeled = []
    generator = Drawn(lambda call: labeled.append(label_ready(tmp_path / "meanwhile")))
    with pytest.raises(WaitingForLabelsError, match=r"8 of 12 prompts are labeled, 4 labels are missing"):
        run(generator, "meanwhile")
    assert generator.calls == [2, 6, 8, 8], "one prompt first"
    assert labeled == [0, 1, 3, 4]
    label_ready(tmp_path / "meanwhile")
    meanwhile = run(Drawn(), "meanwhile")

    with pytest.raises(WaitingForLabelsError):
        run(Drawn(), "after")
    label_ready(tmp_path / "after")
    assert run(Drawn(), "after") == meanwhile
    assert [int(row["prompt"].split()[1][:-1]) for row in meanwhile] == list(range(COUNT))


def test_annotators_see_which_completions_were_cut_off_during_sampling_and_after(run, tmp_path):
    seen = []

    def look(call: int) -> None:
        if call:
            with closing(LabelSession(tmp_path / "run" / STORE, create=False)) as session:
                task = session.next(session.annotator(f"Ann {call}").id)
                seen.append(task and task.endings)

    with pytest.raises(WaitingForLabelsError):
        run(Drawn(look, finished=False))
    look(99)
    assert len(seen) == 4
    assert set(seen) == {("cut off at the limit of 1 token",) * 2}


def test_the_time_of_all_attempts_counts_and_that_of_people_beside_it(run, tmp_path):
    def slow(call: int) -> None:
        time.sleep(0.05)
        if call == 2:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(Drawn(slow))
    (row,) = lines_of(tmp_path / "run" / ".label.work" / "timing.jsonl")
    assert row["time/rollout"] > 3 * 0.05, "of an attempt that ends while it samples"
    assert row["tokens/rollout"] == 2 + 6
    with pytest.raises(WaitingForLabelsError):
        run(Drawn(lambda call: time.sleep(0.05)))
    with closing(LabelSession(tmp_path / "run" / STORE, create=False)) as session:
        who = session.annotator("Ann").id
        task = session.next(who)
        time.sleep(0.01)
        session.submit(who, task.id, Entry(((0,), (1,))), key="first", active_seconds=0.01)
    label_ready(tmp_path / "run")
    timing = run(Drawn(), outcome=True).timing
    assert timing["time/rollout"] > row["time/rollout"] + 2 * 0.05, "and of the attempt that waited"
    assert timing["tokens/rollout"] == 2 * COUNT
    assert timing["time/step"] > timing["time/rollout"]
    assert timing["time/people"] == pytest.approx(0.01, abs=0.005)


def test_an_attempt_whose_time_cannot_be_written_ends_with_its_own_error(run, tmp_path, capsys):
    (tmp_path / "run" / ".label.work" / "timing.jsonl").mkdir(parents=True)
    with pytest.raises(WaitingForLabelsError):
        run(Drawn())
    said = " ".join(capsys.readouterr().err.split())
    assert "timing.jsonl (Is a directory): the time of this attempt is lost" in said


def test_no_store_that_looks_complete_before_the_first_completions(run, tmp_path):
    def stop_at_first(call: int) -> None:
        assert not (tmp_path / "run" / STORE).exists()
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(Drawn(stop_at_first))
    assert not (tmp_path / "run" / STORE).exists()


@pytest.mark.parametrize("error", [Interrupted(signal.SIGTERM), DiskError("full"), RLHFError("out of memory")])
def test_sampling_that_ends_early_loses_no_label_and_goes_on(run, tmp_path, error):
    def fail_at_third(call: int) -> None:
        label_ready(tmp_path / "run", most=2)
        if call == 2:
            raise error

    with pytest.raises(type(error)):
        run(Drawn(fail_at_third))
    assert progress_of(tmp_path / "run").growth == Growth(4, COUNT)
    assert progress_of(tmp_path / "run").labels == 3
    assert label_ready(tmp_path / "run") == 1, "people go on with what is there"

    seen = []
    again = Drawn(lambda call: seen.append(progress_of(tmp_path / "run")))
    with pytest.raises(WaitingForLabelsError, match="4 of 12 prompts are labeled"):
        run(again)
    assert again.calls == [8, 8]
    assert seen[0].growth == Growth(4, COUNT)
    assert seen[0].labels == 4
    label_ready(tmp_path / "run")
    assert len(run(Drawn())) == COUNT


def test_all_equal_completions_end_as_they_do_without_people(run, tmp_path):
    with pytest.raises(RLHFError, match="nothing to compare"):
        run(Drawn(equal=True))


def test_completions_that_a_selection_drops_are_never_shown(run, tmp_path):
    stores = []
    generator = Drawn(lambda call: stores.append((tmp_path / "run" / STORE).exists()))
    with pytest.raises(WaitingForLabelsError, match=r"0 of 10 prompts"):
        run(generator, active_learning={"by": "random", "prompts": 10, "completions": 2})
    assert not any(stores)
    assert generator.calls == [8, 8, 4], "no small chunks for people who have to wait"


SELECTED = {"by": "random", "prompts": 7}


def selected_of_all(run, tmp_path, name: str = "all") -> list[str]:
    """The texts of the prompts that a random selection takes, of a run that sampled and labeled all prompts."""
    with pytest.raises(WaitingForLabelsError):
        run(Drawn(), name)
    label_ready(tmp_path / name)
    rows = run(Drawn(), name)
    split = Split(0.1, 0)
    items = [Item(prompt_key(row["prompt"]), tuple(row["completions"]), split.holds_out(row["prompt"])) for row in rows]
    taken = select(items, by="random", prompts=7, completions=None, seed=0).selected
    return [sorted(rows[one.item]["completions"]) for one in taken]


def test_a_random_selection_comes_first_and_only_its_prompts_are_sampled(run, tmp_path, capsys):
    labeled = []
    generator = Drawn(lambda call: labeled.append(label_ready(tmp_path / "run")))
    with pytest.raises(WaitingForLabelsError, match=r"of 7 prompts"):
        run(generator, active_learning=SELECTED)
    assert generator.calls == [2, 4, 8], "7 of 12 prompts, and people label meanwhile"
    assert labeled == [0, 1, 2]
    label_ready(tmp_path / "run")
    rows = run(Drawn(), active_learning=SELECTED)
    assert [sorted(row["completions"]) for row in rows] == selected_of_all(run, tmp_path)
    assert "selected by random: 7 of 12 prompts" in " ".join(capsys.readouterr().err.split())
    chosen = (tmp_path / "run" / ".label.output" / "chosen.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in chosen] == [row["prompt"] for row in rows]


def test_a_selected_run_that_is_interrupted_goes_on_with_its_completions(run, tmp_path):
    def stop_at_second(call: int) -> None:
        if call == 1:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(Drawn(stop_at_second), active_learning=SELECTED)
    assert progress_of(tmp_path / "run").growth == Growth(1, 7)
    generator = Drawn()
    with pytest.raises(WaitingForLabelsError):
        run(generator, active_learning=SELECTED)
    assert generator.calls == [4, 8]


def test_a_selection_keeps_completions_of_all_prompts_and_takes_those_of_its_own(run, tmp_path, capsys):
    """As an attempt of an earlier version left them, which sampled before it selected."""
    with pytest.raises(WaitingForLabelsError):
        run(Drawn(), "earlier")
    shutil.rmtree(tmp_path / "earlier" / Path(STORE).parts[0])
    samples = tmp_path / "earlier" / ".label.work" / "samples.jsonl"
    content = samples.read_bytes()
    generator = Drawn()
    with pytest.raises(WaitingForLabelsError):
        run(generator, "earlier", active_learning=SELECTED)
    assert generator.calls == []
    assert samples.read_bytes() == content
    said = capsys.readouterr().err
    assert "14 completions were sampled before" in said
    assert "torn or damaged" not in said
    label_ready(tmp_path / "earlier")
    rows = run(Drawn(), "earlier", active_learning=SELECTED)
    assert [sorted(row["completions"]) for row in rows] == selected_of_all(run, tmp_path)


def test_several_processes_sample_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_cli.stages.label.sampling.world_size", lambda: 2)
    stores = []
    generator = Drawn(lambda call: stores.append((tmp_path / "run" / STORE).exists()))
    with pytest.raises(WaitingForLabelsError):
        run(generator)
    assert not any(stores)
    assert generator.calls == [2, 6, 8, 8], "chunks are the same, so a run resumes with another number of processes"


@pytest.mark.parametrize("count", [0, 1, 2, 5, 30, 100])
@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_early_chunks_hold_each_prompt_once_and_begin_with_one(count, size):
    lengths = [(7 * n) % 13 for n in range(count)]
    chunks = early_chunks(lengths, size)
    assert sorted(number for chunk in chunks for number in chunk) == list(range(count))
    assert all(0 < len(chunk) <= size for chunk in chunks)
    assert size == 1 or not chunks or chunks[0] == [0]
    assert len(chunks) <= len(chunks_by_length(lengths, size)) + 4


def test_early_chunks_go_through_the_prompts_and_put_similar_lengths_together():
    lengths = [50, 1, 2, 3, 4, *([9, 1] * 8)]
    first, second, long, short = early_chunks(lengths, 8)
    assert (first, second) == ([0], [1, 2, 3, 4])
    assert long == [5, 7, 9, 11, 13, 15, 17, 19], "short ones are not sampled before all long ones"
    assert short == [6, 8, 10, 12, 14, 16, 18, 20]
