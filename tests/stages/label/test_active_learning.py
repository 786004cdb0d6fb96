"""Active choice in the `label` stage: reward models decide which of the completions get a label."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rlhf_cli.data.records import Candidates, Prompt
from rlhf_cli.data.skips import SkipLog
from rlhf_cli.data.splits import Split
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError, ModelError
from rlhf_cli.generation.generator import Completion
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import StageContext
from rlhf_cli.stages.label import active_learning as label_active_learning
from rlhf_cli.stages.label.active_learning import select_candidates
from rlhf_cli.stages.label.sampling import Sampled
from tests.stages.context import stage_context

PROMPTS = [f"Question {number}?" for number in range(20)]


def reward_model(base: Path, folder: Path, seed: int, std: float = 1.0) -> str:
    """A reward model nobody trained, whose rewards are stored as so many deviations."""
    scorer = new_reward_model(ModelSource(str(base)), template="{prompt}\n", lora=None, seed=seed)
    scorer.std = std
    folder.mkdir()
    save_reward_model(scorer, folder)
    return str(folder)


@pytest.fixture
def models(tiny_llama: Path, tmp_path: Path) -> list[str]:
    return [reward_model(tiny_llama, tmp_path / f"rm{seed}", seed) for seed in (0, 1)]


def sampled(prompts: list[Prompt] | None = None, *, drawn: bool = True) -> Sampled:
    texts = [tuple(f"{'so ' * k}{number}" for k in range(4)) for number in range(20)]
    rows = [Candidates(prompt, own) for prompt, own in zip(prompts or PROMPTS, texts, strict=True)]
    completions = [[Completion([n], text, True) for text in row.completions] for n, row in enumerate(rows)]
    return Sampled(rows, completions if drawn else [], SkipLog(), ProcessGroup())


def context(folder: Path, models: list[str], **active_learning: object) -> StageContext:
    section = {"by": "function", "function": "f.py:f", "completions_per_prompt": 4}
    section |= {"active_learning": {"prompts": 8, "reward_models": models} | active_learning}
    recipe = Recipe.model_validate({"model": {"precision": "float32"}, "data": {"holdout": 0.3}, "label": section})
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return stage_context("label", recipe, output=folder / "out", work=folder / "work", active_learning=models)


def select(given: StageContext, rows: Sampled) -> Sampled:
    assert given.recipe.label is not None
    assert given.recipe.label.active_learning is not None
    return select_candidates(given, given.recipe.label.active_learning, rows)


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "chosen.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("by", ["random", "uncertainty", "disagreement"])
def test_what_is_chosen_is_what_is_written_and_returned(by: str, models: list[str], tmp_path: Path, capsys):
    asked = {"random": [], "uncertainty": models[:1], "disagreement": models}[by]
    chosen = select(context(tmp_path, asked, by=by, completions=2), sampled())
    rows = written(tmp_path)
    assert [row["prompt"] for row in rows] == [row.prompt for row in chosen.candidates]
    for row, candidates, completions in zip(rows, chosen.candidates, chosen.completions, strict=True):
        number = PROMPTS.index(row["prompt"])
        assert candidates.completions == tuple(f"{'so ' * k}{number}" for k in row["completions"])
        assert [completion.text for completion in completions] == list(candidates.completions)
        assert row["held_out"] == Split(0.3, 0).holds_out(row["prompt"])
        assert (row["score"] is None) == (by == "random" or row["held_out"])
    held_out = sum(Split(0.3, 0).holds_out(prompt) for prompt in PROMPTS)
    assert sum(row["held_out"] for row in rows) == round(8 * held_out / 20) > 0
    said = capsys.readouterr().err
    assert f"selected by {by}: 8 of 20 prompts, 2 completions each; " in said
    assert (", of the rest" in said) == (by != "random")
    # Nobody asks what a reward model thinks of held-out completions.
    read = [f"scoring with {Path(model).name}: {4 * (20 - held_out)} completions" for model in asked]
    assert [line for line in said.splitlines() if line.endswith(" completions")] == read


def test_scores_are_of_rewards_as_they_were_trained(tiny_llama: Path, models: list[str], tmp_path: Path):
    """Not of normalized ones, which other stages read: those say how far apart completions are in deviations."""
    narrow = reward_model(tiny_llama, tmp_path / "narrow", 0, std=0.01)
    select(context(tmp_path / "a", models[:1], by="uncertainty"), sampled())
    select(context(tmp_path / "b", [narrow], by="uncertainty"), sampled())
    assert written(tmp_path / "a") == written(tmp_path / "b")
    scorer = load_reward_model(ModelSource(models[0]), template=None)
    best = next(row for row in written(tmp_path / "a") if row["rank"] == 1)
    number = PROMPTS.index(best["prompt"])
    rewards = scorer.score([best["prompt"]] * 4, [f"{'so ' * k}{number}" for k in range(4)])
    entropy = []
    for a in range(4):
        for b in range(a):
            p = 1 / (1 + 2.718281828459045 ** (rewards[b] - rewards[a]))
            entropy.append(label_active_learning.np.log2([1 / p, 1 / (1 - p)]) @ [p, 1 - p])
    assert best["score"] == pytest.approx(sum(entropy) / 6, rel=1e-5)


def test_a_second_attempt_asks_no_reward_model_again(models: list[str], tmp_path: Path, monkeypatch):
    given = context(tmp_path, models, by="disagreement", completions=3)
    first, rows = select(given, sampled()), written(tmp_path)
    (tmp_path / "out" / "chosen.jsonl").unlink()
    scored = []
    monkeypatch.setattr(label_active_learning, "rewards_of", lambda *_: scored.append(1) or pytest.fail("asked again"))
    again = select(given, sampled())
    assert (again.candidates, again.completions, written(tmp_path)) == (first.candidates, first.completions, rows)
    monkeypatch.undo()
    kept = tmp_path / "work" / "chosen.jsonl"
    whole = kept.read_text()
    for damaged in (whole[:-9], whole.replace('"item": ', '"item": 1', 1)):
        kept.write_text(damaged)
        assert select(given, sampled()).candidates == first.candidates
        assert kept.read_text() == whole
    select(given, sampled([f"Other {prompt}" for prompt in PROMPTS]))
    assert kept.read_text() != whole  # which was of other prompts


def test_a_known_order_of_given_completions_stays_known(models: list[str], tmp_path: Path):
    rows = sampled(drawn=False)
    known = ((2,), (0,), (1, 3))
    rows.candidates[:] = [dataclasses.replace(row, known=known) for row in rows.candidates]
    chosen = select(context(tmp_path, models[:1], by="uncertainty", completions=3, prompts=20), rows)
    assert chosen.completions == []
    for row, file in zip(chosen.candidates, written(tmp_path), strict=True):
        assert row.known is not None
        told = [{row.completions[index] for index in tier} for tier in row.known]
        full = rows.candidates[PROMPTS.index(str(row.prompt))]
        left = [{full.completions[i] for i in tier if i in file["completions"]} for tier in known]
        assert told == [tier for tier in left if tier]


def test_prompts_with_nothing_to_compare_are_skipped_and_counted(tmp_path: Path, capsys):
    rows = sampled()
    rows.candidates[:3] = [dataclasses.replace(row, completions=("yes",) * 4) for row in rows.candidates[:3]]
    chosen = select(context(tmp_path, [], by="random", prompts=99), rows)
    assert [row.prompt for row in chosen.candidates] == PROMPTS[3:]
    assert chosen.skips.counts == {"all completions are equal": 3}
    said = " ".join(capsys.readouterr().err.split())
    assert "3 of 20 prompts are skipped: their completions are all equal" in said
    assert "`label.active_learning.prompts: 99` exceeds the 17 prompts: all are labeled" in said
    rows.candidates[:] = [dataclasses.replace(row, completions=("yes",) * 4) for row in rows.candidates]
    with pytest.raises(DataError, match="nothing to select from: the completions of each of 20 prompts"):
        select(context(tmp_path / "none", [], by="random"), rows)


def test_the_report_of_a_selection_before_sampling_counts_what_was_selected(tmp_path: Path, capsys):
    rows = sampled()
    equal = [dataclasses.replace(row, completions=("yes",) * 4) for row in rows.candidates[:3]]
    candidates = [*equal, *rows.candidates[3:8]]
    rows = dataclasses.replace(rows, candidates=candidates, completions=rows.completions[:8], selected_from=20)
    select(context(tmp_path, [], by="random"), rows)
    said = " ".join(capsys.readouterr().err.split())
    assert "3 of the 8 selected prompts are skipped: their completions are all equal; 5 are labeled" in said
    assert "selected by random: 5 of 20 prompts" in said
    assert "exceeds" not in said


def test_an_ensemble_of_copies_is_found_out(models: list[str], tmp_path: Path, capsys):
    copy = shutil.copytree(models[0], tmp_path / "copy")
    select(context(tmp_path / "copies", [models[0], str(copy)], by="disagreement"), sampled())
    said = " ".join(capsys.readouterr().err.split())
    assert "the preferences of the reward models do not differ at all (are they copies of one model?)" in said
    select(context(tmp_path / "two", models, by="disagreement"), sampled())
    assert "do not differ" not in capsys.readouterr().err


def test_a_broken_reward_model_is_named(models: list[str], tmp_path: Path):
    weights = Path(models[0]) / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: weight.fill_(float("nan")) for name, weight in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"rm0` gave a reward that is not finite"):
        select(context(tmp_path, models[:1], by="uncertainty"), sampled())


def test_the_command_labels_what_was_chosen(models: list[str], tiny_llama: Path, tmp_path: Path, rlhf):
    (tmp_path / "gold.py").write_text(
        "def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    settings = {"by": "disagreement", "prompts": 6, "completions": 3, "reward_models": json.dumps(models)}
    flags = [f"--set=label.active_learning.{name}={value}" for name, value in settings.items()]
    flags += ["--set=label.sampling.max_new_tokens=6", "--set=model.precision=float32"]
    arguments = ["label", "--by", "function", "--function", "gold.py:score", "--model", tiny_llama, *flags]
    done = rlhf(*arguments, "--prompts", "p.jsonl", "--run-dir", "run", "--json")
    (stage,) = json.loads(done.stdout)["stages"]
    rankings = [json.loads(line) for line in (tmp_path / "run" / "label" / "rankings.jsonl").read_text().splitlines()]
    chosen = [json.loads(line) for line in (tmp_path / "run" / "label" / "chosen.jsonl").read_text().splitlines()]
    assert stage["metrics"]["prompts"] == 6
    assert [row["prompt"] for row in rankings] == [row["prompt"] for row in chosen]
    assert [len(row["completions"]) for row in rankings] == [3] * 6 == [len(row["completions"]) for row in chosen]
    assert any(row["held_out"] for row in chosen)
    assert (
        "selected by disagreement: 6 of 20 prompts, 3 completions each; 1 of them held out and selected at random"
        in done.stderr
    )
