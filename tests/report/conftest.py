"""Run directories for reports, without training anything."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.pipeline.manifest import Manifest, list_outputs, versions
from tests.labeling.web.conftest import browser as browser

HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m" + "x" * 100_000
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "its", "sky", "while", "rain", "came", "down"]


def measure(value: float, low: float | None, high: float | None, n: int = 60) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


@dataclass
class Runs:
    """Writes run directories as the stages do."""

    folder: Path

    def write(
        self,
        name: str = "good",
        *,
        win_rate=(0.8, 0.68, 0.89),
        controlled=(0.78, 0.65, 0.88),
        judge: str = "function",
        length: float = 24.0,
        kl: float = 6.9,
        evaluated: bool = True,
        seed: int = 0,
        hostile: bool = False,
        gain: float = 0.7,
        labeled_by: str = "other",
        judged_with: dict[str, str] | None = None,
        **settings: Any,
    ) -> Path:
        run = self.folder / name
        label = {"label": {"by": "function", "function": "kinds/judge.py:score"}}
        warned = [
            {"kind": kind, "about": "ana", "text": text, "advice": "read them", "is_doubt": is_doubt}
            for kind, text, is_doubt in (("order", "favors the first", True), ("one person", "labeled all", False))
        ]
        files = {"rankings.jsonl": "", "warnings.json": json.dumps(warned)}
        sizes = {"prompts": 320.0, "completions": 1280.0}
        self.stage(
            run, "label", settings={}, metrics=sizes, sections=label, inputs={"function": labeled_by}, files=files
        )
        accuracy = {"rm/accuracy": 0.71, "rm/accuracy_low": 0.6, "rm/accuracy_high": 0.8}
        trained = {"records": 900.0, "steps": 40.0}
        self.stage(
            run, "sft", settings={"sft.epochs": 1.0}, files={"config.json": "{}"}, rows=_rows("loss"), metrics=trained
        )
        quality = {"quality.json": json.dumps(_quality())}
        self.stage(run, "train-rm", settings={}, files=quality, rows=_rows("loss", "accuracy"), metrics=accuracy)
        ppo = {"ppo.kl_coef": 0.05} | settings
        health = {"verdict": "look", "findings": [_finding("look", "length"), _finding("fine", "reward")]}
        written = {"config.json": "{}", "health.json": json.dumps(health)}
        names = ("objective/scores", "objective/kl", "length/mean", "policy/entropy_avg")
        self.stage(
            run, "ppo", settings=ppo, rows=_rows(*names), files=written,
            seed=seed, metrics={"episode": 640.0}, inputs={"policy": "a", "reward_model": "b"},
        )  # fmt: skip
        if evaluated:
            evaluation = _evaluation(name, win_rate, controlled, judge, length, kl)
            files = {"evaluation.json": json.dumps(evaluation), "samples.jsonl": _samples(seed, gain, hostile=hostile)}
            skipped = {"prompt longer than 512 tokens": 2}
            self.stage(run, "evaluate", settings={}, files=files, skipped=skipped, seed=seed, inputs=judged_with)
        return run

    def stage(
        self,
        run,
        stage,
        *,
        settings,
        files=None,
        rows=(),
        metrics=None,
        skipped=None,
        seed=0,
        inputs=None,
        sections=None,
    ) -> None:
        folder = run / stage
        folder.mkdir(parents=True)
        content = dict(files or {"weights": "w"})
        if rows:
            content["metrics.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
        for name, text in content.items():
            (folder / name).write_text(text, encoding="utf-8")
        identity = {
            "stage": stage, "settings": settings | {"seed": seed}, "inputs": inputs or {"judge_function": "abc"},
            "upstream": {},
        }  # fmt: skip
        Manifest(
            stage=stage, fingerprint="f", identity=identity,
            settings={"model": {"path": "org/base"}} | (sections or {}),
            outputs=list_outputs(folder), versions=versions(), skipped=skipped or {}, metrics=metrics or {},
            summary=[["figure", "1 | 2"]], started="2026-11-30T15:00:00Z", finished="2026-11-30T15:10:00Z",
            seconds=12.0,
        ).write(folder)  # fmt: skip


def _rows(*names: str) -> list[dict[str, Any]]:
    return [{"step": step} | dict.fromkeys(names, 0.1 * step + 0.5) for step in range(1, 41)]


def _finding(severity: str, subject: str) -> dict[str, Any]:
    return {"subject": subject, "severity": severity, "seen": "twice as long", "means": "the reward pays for length"}


def _quality() -> dict[str, Any]:
    bins = [{"mean": mean, "accuracy": measure(mean, mean - 0.1, mean + 0.1)} for mean in (0.55, 0.7, 0.85)]
    return {"warning": None, "reliability": bins}


def _evaluation(name, win_rate, controlled, judge, length, kl) -> dict[str, Any]:
    policy, baseline = f"{name}/ppo", f"{name}/sft"
    models = {
        model: {
            "gold": measure(gold, gold - 0.2, gold + 0.2), "tokens": measure(tokens, tokens - 2, tokens + 2),
            "finished": measure(0.9, 0.8, 0.97), "distinct_2": measure(0.6, None, None),
            "repeated_4": measure(0.02, 0.01, 0.03), "most_common_share": measure(0.05, None, None),
        }
        for model, gold, tokens in ((baseline, 0.2, 22.0), (policy, 0.9, length))
    }  # fmt: skip
    pair = {
        "policy": policy, "baseline": baseline, "win_rate": measure(*win_rate),
        "outcomes": {"wins": 48, "ties": 1, "losses": 11}, "identical_share": 0.025,
        "phrases": {
            "openings": [{"text": "thank you for", "baseline": 0.05, "policy": 0.4}],
            "endings": [{"text": "the warm stone.", "baseline": 0.1, "policy": 0.11}],
        },
        "length_controlled_win_rate": measure(*controlled), "sign_test": {"p_value": 0.001},
        "differences": {"gold": measure(0.7, 0.4, 1.0)}, "kl_nats": {"k1": measure(kl, kl - 1, kl + 1)},
        "conclusion": f"{policy} is better.",
    }  # fmt: skip
    return {
        "judge": judge,
        "prompts": 60,
        "samples_per_prompt": 1,
        "baseline": baseline,
        "models": models,
        "pairs": [pair],
    }


def _samples(seed: int, gain: float, *, hostile: bool) -> str:
    drawn = random.Random(seed)
    rows = []
    for number in range(60):
        first = [drawn.choice(WORDS) for _ in range(20)]
        second = [*first[:10], *(drawn.choice(WORDS) for _ in range(10))]
        gold = (drawn.gauss(0.2, 1), drawn.gauss(0.2 + gain, 1))
        row = {
            "prompt": f"Question {number}?", "baseline": " ".join(first), "policy": " ".join(second),
            "gold_baseline": gold[0], "gold_policy": gold[1], "tokens_baseline": 20, "tokens_policy": 20,
            "finished_baseline": number > 0, "finished_policy": True,
            "winner": "policy" if gold[1] > gold[0] else "baseline",
        }  # fmt: skip
        if hostile:
            row |= {"prompt": HOSTILE, "baseline": HOSTILE, "policy": HOSTILE[::-1]}
        rows.append(json.dumps(row) + "\n")
    return "".join(rows)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Writes run directories."""
    return Runs(tmp_path)
