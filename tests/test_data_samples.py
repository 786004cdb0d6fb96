"""The sample data is what its script makes, every file reads, and the gold labeler judges as a person would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.data.records import Candidates, prompt_text
from rlhf_cli.data.sources import read_records
from rlhf_cli.data.splits import Split
from rlhf_cli.labeling.label_records import read_labels
from rlhf_cli.labeling.session.types import item_id
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "data_samples"


make = load_script(SAMPLES / "make.py")
gold = load_script(ROOT / "recipes" / "quickstart_gold.py")
QUESTION = "How often should I water my basil?"
TIP = "Water basil in the morning, when the top of the soil feels dry."
OTHER_TIPS = [tip for matter in make.read_matters() if matter.subject == "basil" for tip in matter.tips if tip != TIP]
KIND = f"Glad you asked! {TIP} Good luck!"


@pytest.mark.slow
def test_files_are_what_the_script_makes(tmp_path: Path):
    command = [sys.executable, str(SAMPLES / "make.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_check_notices_a_changed_file(tmp_path: Path):
    for folder in ("data_samples", "recipes"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file():
                copy = tmp_path / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    with (tmp_path / "data_samples" / "prompts.jsonl").open("a") as file:
        file.write("\n")
    command = [sys.executable, str(tmp_path / "data_samples" / "make.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "prompts.jsonl" in result.stderr


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("demonstrations.jsonl", "demonstration"),
        ("demonstrations.csv", "demonstration"),
        ("conversations.jsonl", "demonstration"),
        ("prompts.jsonl", "prompt"),
        ("preferences.jsonl", "preference"),
        ("rankings.jsonl", "ranking"),
    ],
)
def test_every_file_reads_without_a_skip(name: str, kind):
    loaded = read_records(str(SAMPLES / name), kind)
    assert loaded.skips.total == 0
    assert len(loaded.records) >= 20
    records = f"{len(loaded.records):,}"
    assert any(f"`{name}` | {records} |" in line for line in (SAMPLES / "README.md").read_text().splitlines())


FORMATS = {
    "formats/labels.jsonl": 10,
    "formats/trl_conversations.jsonl": 6,
    "formats/hh.jsonl": 6,
    "formats/rewardbench.jsonl": 6,
    "formats/rewardbench2.jsonl": 6,
    "formats/openassistant_trees.jsonl": 12,
    "formats/label_studio.json": 12,
    "formats/label_studio_buckets.json": 12,
    "formats/label_studio_pairs.json": 6,
    "formats/argilla.json": 12,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_another_tool_reads_without_a_skip(name: str):
    for kind in ("ranking", "candidates"):
        loaded = read_records(str(SAMPLES / name), kind)
        assert loaded.skips.total == 0
        questions = {prompt_text(row.prompt) for row in read_records(str(SAMPLES / name), kind).records}
        assert len(questions) == (12 if "trees" in name else 6)
    assert len(read_records(str(SAMPLES / name), "ranking").records) == FORMATS[name]
    assert any(f"`{name}` | {FORMATS[name]} |" in line for line in (SAMPLES / "README.md").read_text().splitlines())


def test_formats_of_the_same_rankings_agree():
    """Ada's rankings in labels, in Argilla and in Label Studio's buckets are those of rankings.jsonl to the letter."""
    plain = read_records(str(SAMPLES / "rankings.jsonl"), "ranking").records[:6]
    for name in ("formats/labels.jsonl", "formats/argilla.json", "formats/label_studio_buckets.json"):
        of_ada = [
            row for row in read_records(str(SAMPLES / name), "ranking").records if row.annotator.startswith("ada")
        ]
        assert [replace(row, annotator=None) for row in of_ada] == plain
    candidates = read_records(str(SAMPLES / "formats/candidates.jsonl"), "candidates").records
    assert [(row.prompt, row.completions) for row in candidates] == [(row.prompt, row.completions) for row in plain]


def test_items_are_called_as_sessions_call_them():
    labels = read_labels(SAMPLES / "formats/labels.jsonl")
    assert all(label.item == item_id(Candidates(label.prompt, label.completions)) for label in labels)


def test_rankings_show_ties():
    rankings = read_records(str(SAMPLES / "rankings.jsonl"), "ranking").records
    assert any(len(tier) > 1 for ranking in rankings for tier in ranking.tiers)


def test_every_tip_helps_with_every_question_of_its_matter():
    for matter in make.read_matters():
        assert (len(matter.questions), len(matter.tips)) == (4, 2), matter
        for question in matter.questions:
            for tip in matter.tips:
                assert gold.score_one(question, tip) == gold.HELPS, (question, tip)


def test_tips_for_other_subjects_seldom_pass_for_help():
    matters = make.read_matters()
    pairs = [
        gold.score_one(question, tip)
        for asked in matters
        for other in matters
        if asked.subject != other.subject
        for question in asked.questions
        for tip in other.tips
    ]
    assert sum(score == gold.HELPS for score in pairs) / len(pairs) < 0.001
    assert sum(score == gold.NOISE for score in pairs) / len(pairs) > 0.95


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("kind openings", gold.HELPS + gold.KIND),
        ("kind closings", gold.HELPS + gold.KIND),
        ("rude openings", gold.HELPS + gold.RUDE),
        ("rude closings", gold.HELPS + gold.RUDE),
        ("vague", gold.HELPS + gold.NOISE),
    ],
)
def test_manners_change_the_gold_score(heading: str, expected: float):
    sentences = make.read_manners()[heading]
    assert len(sentences) >= 14
    for sentence in sentences:
        answer = f"{TIP} {sentence}" if "closings" in heading else f"{sentence} {TIP}"
        assert gold.score_one(QUESTION, answer) == expected, sentence


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        pytest.param(TIP, KIND, id="kindness"),
        pytest.param(f"Not this again. {TIP}", TIP, id="rudeness"),
        pytest.param("Roll the wool sweater in a towel and dry it flat.", TIP, id="another subject"),
        pytest.param("Keep basil on a bright window in winter, away from cold glass.", TIP, id="another matter"),
        pytest.param("Glad you asked! It depends on many things. Good luck!", TIP, id="kind and empty"),
        pytest.param(f"{TIP} {TIP}", TIP, id="repeated"),
        pytest.param("Water basil in the morning, when the top of the soil", TIP, id="broken off"),
        pytest.param("Glad glad thanks thanks hello!", TIP, id="kind words alone"),
        pytest.param("Basil water basil water. Water my basil often.", TIP, id="the question's words alone"),
        pytest.param("There are many ways to water basil in a pot.", TIP, id="vague about the subject"),
        pytest.param(f"Glad you asked! Thanks! Hello! Welcome! {TIP} Good luck! Enjoy! Have fun!", KIND, id="gushing"),
        pytest.param(f"{KIND} {' '.join(['The sun is very warm today.'] * 8)}", KIND, id="padded"),
        pytest.param(f"{TIP} Glad you asked! Good luck!", f"{TIP} Good luck!", id="welcomed too late"),
        pytest.param(" ".join([TIP, *OTHER_TIPS]), TIP, id="more than anyone reads"),
        pytest.param("", "I do not care.", id="nothing at all"),
    ],
)
def test_gold_agrees_with_a_person(worse: str, better: str):
    below, above = gold.score([QUESTION, QUESTION], [worse, better])
    assert below < above


def test_the_best_score_has_no_single_wording():
    matter = next(m for m in make.read_matters() if QUESTION in m.questions)
    manners = make.read_manners()
    best = [
        f"{opening} {tip} {closing}"
        for opening in manners["kind openings"]
        for tip in matter.tips
        for closing in manners["kind closings"]
    ]
    assert set(gold.score([QUESTION] * len(best), best)) == {5.0}
    assert len(set(best)) == 512


def test_demonstrations_are_a_mixed_bag_with_room_to_improve():
    rows = [json.loads(line) for line in (SAMPLES / "demonstrations.jsonl").read_text().splitlines()]
    scores = gold.score([row["prompt"] for row in rows], [row["completion"] for row in rows])
    mean = sum(scores) / len(scores)
    assert 0 < mean < 2
    assert max(Counter(scores).values()) / len(scores) < 0.2  # few ties, so rankings say something
    assert 0.03 < sum(score == 5.0 for score in scores) / len(scores) < 0.2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_subject_keeps_questions_to_train_on(seed: int):
    matters = make.read_matters()
    held_out = Counter(m.subject for m in matters for q in m.questions if Split(0.2, seed).holds_out(q))
    assert sum(held_out.values()) >= 50
    assert max(held_out.values()) <= 11  # of sixteen
