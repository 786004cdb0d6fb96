"""`rlhf compare`: runs that differ in settings and seeds, from what `evaluate` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rlhf_cli.cli.app import app
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.pipeline.manifest import Manifest, list_outputs, versions
from rlhf_cli.pipeline.run_comparison import compare_runs

PROMPTS = [f"question {number}" for number in range(40)]


@dataclass
class Runs:
    """Writes run directories with the artifacts of `ppo` and `evaluate`."""

    folder: Path

    def write(
        self, name: str, gold: float, *, seed: int = 0, prompts=PROMPTS, judge="judge", reward="rm", baseline="sft",
        data="data", **settings,
    ):  # fmt: skip
        run = self.folder / name
        generator = np.random.default_rng([seed, int(1000 * gold)])
        rows = [
            {
                "prompt": prompt, "gold_policy": gold + generator.normal(0, 0.5), "reward_policy": gold,
                "winner": "policy" if gold > 0 else "tie", "kl_nats": 5.0, "tokens_policy": 12, "finished_policy": True,
            }
            for prompt in prompts
        ]  # fmt: skip
        ppo = {"ppo.kl_coef": 0.05, "seed": seed} | settings
        inputs = {"judge_function": judge, "reward_model": reward, "policy": name, "baseline": baseline}
        self._artifact(run / "ppo", "ppo", ppo, {"prompts": data}, {"weights": "w"})
        evaluate = {"evaluate.tie_margin": 0.0, "seed": seed}
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        self._artifact(run / "evaluate", "evaluate", evaluate, inputs, {"samples.jsonl": lines})
        return str(run)

    def _artifact(self, folder, stage, settings, inputs, files):
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        identity = {"stage": stage, "settings": settings, "inputs": inputs, "upstream": {}}
        manifest = Manifest(
            stage=stage, fingerprint="f", identity=identity, settings={}, outputs=list_outputs(folder),
            versions=versions(), skipped={}, metrics={}, summary=[], started="", finished="", seconds=1.0,
        )  # fmt: skip
        manifest.write(folder)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def seeds_of(runs, gold: float, kl_coef: float, noise=(0.0, 0.02, -0.02)) -> list[str]:
    return [
        runs.write(f"{kl_coef}-{seed}", gold + noise[seed], seed=seed, **{"ppo.kl_coef": kl_coef}) for seed in range(3)
    ]


def test_seeds_of_two_settings_are_two_groups_named_by_the_setting(runs):
    found = compare_runs([*seeds_of(runs, 1.0, 0.1), *seeds_of(runs, 2.0, 0.02)])
    assert [(group.name, group.seeds) for group in found.groups] == [
        ("ppo.kl_coef 0.1", [0, 1, 2]),
        ("ppo.kl_coef 0.02", [0, 1, 2]),
    ]
    (pair,) = found.pairs
    gold = pair.measures["gold"]
    assert gold.second - gold.first == pytest.approx(1.0, abs=0.2)
    for measure in (gold.prompts, gold.seeds, gold.both):
        assert measure.low is not None
        assert 0.5 < measure.low < 1.0
    assert pair.says.startswith("ppo.kl_coef 0.02 scores higher than ppo.kl_coef 0.1")
    assert "other seeds" in pair.says


def test_seeds_that_disagree_decide_nothing(runs):
    noise = (-1.0, 0.0, 1.0)
    names = [*seeds_of(runs, 1.0, 0.1), *seeds_of(runs, 1.4, 0.02, noise)]
    (pair,) = compare_runs(names).pairs
    assert pair.measures["gold"].prompts.low > 0, "these models differ"
    assert "3 seeds per group are too few" in pair.says


def test_equal_runs_cannot_be_told_apart(runs):
    (pair,) = compare_runs([*seeds_of(runs, 1.0, 0.1), *seeds_of(runs, 1.01, 0.02)]).pairs
    assert pair.says.startswith("no difference in gold score can be detected with 40 prompts")


def test_two_single_runs_say_that_the_seed_is_not_known(runs):
    names = [runs.write("a", 0.0), runs.write("b", 3.0, **{"ppo.kl_coef": 0.2})]
    (pair,) = compare_runs(names).pairs
    assert "with one run per group, other seeds may order them differently" in pair.says
    assert pair.measures["gold"].seeds.low is None


def test_several_comparisons_need_more_to_be_sure(runs):
    # Seeds that differ by 0.16 decide between 1.0 and 1.75 for one comparison, and not where there are four.
    noise = (0.0, 0.16, -0.16)
    first, second = seeds_of(runs, 1.0, 0.1), seeds_of(runs, 1.75, 0.02, noise)
    (alone,) = compare_runs([*first, *second]).pairs
    others = [name for number in range(3) for name in seeds_of(runs, 1.0 + number / 100, 0.2 + number / 10)]
    among = compare_runs([*first, *second, *others]).pairs[0]
    assert (alone.better, among.better) == ("ppo.kl_coef 0.02", None)
    assert "together" not in alone.says
    assert among.says.endswith("95% holds for all 4 comparisons together")
    assert among.measures == alone.measures, "the table shows each pair alone"


def test_groups_can_be_named_with_commas(runs):
    first, second = (
        [runs.write(f"{name}{seed}", gold, seed=seed) for seed in (0, 1)] for name, gold in (("a", 1.0), ("b", 2.0))
    )
    found = compare_runs([",".join(first), ",".join(second)])
    assert [group.name for group in found.groups] == ["a0, a1", "b0, b1"]


def test_runs_that_differ_in_their_data_alone_are_two_groups(runs):
    found = compare_runs([runs.write("a", 1.0), runs.write("b", 2.0, data="other")])
    assert [group.name for group in found.groups] == ['ppo: prompts "data"', 'ppo: prompts "other"']


def test_a_comma_makes_a_group_of_one_run(runs):
    found = compare_runs([f"{runs.write('a', 1.0)},", runs.write("b", 1.0, seed=1)])
    assert [group.name for group in found.groups] == ["a", "b"]


def test_preferences_over_different_baselines_decide_nothing(runs):
    """Each of two single runs has its own SFT model and its own judge, as after two whole pipelines."""
    changed = {"judge": "x", "baseline": "other", "reward": "own", "ppo.kl_coef": 0.2}
    found = compare_runs([runs.write("a", 0.0), runs.write("b", 3.0, **changed)])
    (pair,) = found.pairs
    assert not {"gold", "reward", "preferred", "kl"} & pair.measures.keys()
    assert pair.better is None
    assert pair.says.startswith("nothing says which is better")
    assert any("different baselines or judges" in note for note in found.notes)


def test_each_seed_may_have_its_own_baseline_in_both_groups(runs):
    def written(kl_coef: float, gold: float) -> list[str]:
        changes = [{"seed": seed, "baseline": f"sft-{seed}", "ppo.kl_coef": kl_coef} for seed in range(3)]
        return [runs.write(f"{kl_coef}-{number}", gold, **one) for number, one in enumerate(changes)]

    (pair,) = compare_runs([*written(0.1, 1.0), *written(0.02, 2.0)]).pairs
    assert {"preferred", "kl"} <= pair.measures.keys()


def test_scores_of_different_judges_are_not_compared_and_it_is_said(runs):
    names = [runs.write("a", 0.0), runs.write("b", 3.0, judge="other", **{"ppo.kl_coef": 0.2})]
    found = compare_runs(names)
    assert "gold" not in found.pairs[0].measures
    assert "reward" in found.pairs[0].measures
    assert "gold scores are not compared: they come from different judge functions" in found.notes


def test_prompts_that_not_all_share_are_left_out_and_counted(runs):
    names = [runs.write("a", 0.0), runs.write("b", 3.0, prompts=[*PROMPTS[10:], "new"], **{"ppo.kl_coef": 0.2})]
    found = compare_runs(names)
    assert found.prompts == 30
    assert found.notes == ("11 of 41 prompts are skipped: not all runs were evaluated on them",)


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    first, again = runs.write("a", 1.0), runs.write("b", 1.0, seed=1)
    with pytest.raises(UsageError, match="differ in nothing but the seed") as caught:
        compare_runs([first, again])
    assert "with commas" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="no such run directory"):
        compare_runs([first, str(tmp_path / "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no finished evaluation"):
        compare_runs([first, str(tmp_path / "empty")])
    other = runs.write("c", 1.0, prompts=["else"], **{"ppo.kl_coef": 0.2})
    with pytest.raises(DataError, match="none is in all of them"):
        compare_runs([first, other])
    twice = runs.write("d", 1.0)
    with pytest.raises(UsageError, match="have the same seed"):
        compare_runs([f"{first},{twice}", other])
    samples = Path(other) / "evaluate" / "samples.jsonl"
    samples.write_text(samples.read_text().replace("else", "elsa"))
    with pytest.raises(DataError, match="sha256"):
        compare_runs([first, other])


def test_the_command_prints_a_table_within_80_columns(runs):
    names = [*seeds_of(runs, 1.0, 0.1), *seeds_of(runs, 2.0, 0.02)]
    shown = CliRunner().invoke(app, ["compare", *names])
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "A  ppo.kl_coef 0.1  (seeds 0, 1, 2)" in shown.stdout
    assert "gold score" in shown.stdout
    plain = json.loads(CliRunner().invoke(app, ["compare", *names, "--json"]).stdout)
    gold = plain["comparisons"][0]["measures"]["gold"]
    assert gold["difference_over_both"].keys() == {"value", "low", "high", "n"}
    assert plain["groups"][1]["seeds"] == [0, 1, 2]
