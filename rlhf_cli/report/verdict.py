"""Did it work, how sure is that, and what should be distrusted: in sentences, from the figures of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_cli.intervals import percent, percent_span
from rlhf_cli.labeling.warnings import one_line
from rlhf_cli.pipeline.record import RECIPE
from rlhf_cli.pipeline.run_comparison import RunComparison
from rlhf_cli.pipeline.stage_states import planned_stages
from rlhf_cli.quoting import word
from rlhf_cli.report.gather import RunFiles

Outcome = Literal["better", "worse", "undecided", "unknown"]

_LONGER, _SHORTER = 1.25, 0.8
"""Ratios of mean lengths from which length is named as a reason to distrust a win rate."""
_ONE_SEED = (
    "It is one training run: another seed may give another result. `rlhf compare` measures how much they differ."
)
_VARIED = 0.75
"""Ratio of distinct word pairs below which the loss of variety is named."""
_FAR = 30.0
"""Nats per completion from which the KL is named."""


@dataclass(frozen=True)
class Verdict:
    """The first lines of a report.

    Attributes:
        outcome: of PPO, or of what was evaluated.
        headline: in a few words.
        reason: the figure behind it, with its interval.
        doubts: what to distrust, each a sentence.
    """

    outcome: Outcome
    headline: str
    reason: str
    doubts: tuple[str, ...]


def verdict(run: RunFiles) -> Verdict:
    """Return the verdict on a run."""
    doubts = tuple(_doubts(run))
    pair = first_pair(run)
    if pair is None:
        headline = "Evaluated by an earlier version" if "evaluate" in run.manifests else "Not evaluated"
        return Verdict("unknown", headline, _not_evaluated(run), doubts)
    rate = deciding(pair)
    policy, baseline = pair["policy"], pair["baseline"]
    jointly = f" for all {rate['pairs']} pairs of models together" if rate.get("pairs", 1) > 1 else ""
    reason = (
        f"{policy} is preferred to {baseline} in {percent(rate['value'])} of comparisons on {rate['n']:,} held-out "
        f"prompts (95% interval{jointly} {percent_span(rate['low'], rate['high'])})"
    )
    reason += f": {outcomes_of(pair)}." if pair.get("outcomes") else "."
    if rate["low"] is None or rate["low"] <= 0.5 <= rate["high"]:
        return Verdict("undecided", "It cannot be told whether it worked", reason, doubts)
    if rate["high"] < 0.5:
        return Verdict("worse", f"It did not work: {baseline} was better", reason, doubts)
    controlled = pair["length_controlled_win_rate"]
    if controlled.get("low") is not None and controlled["low"] <= 0.5:
        headline = "It worked according to this judge, but perhaps by length alone"
    elif _is_judged_by_a_reward_model(run):
        headline = f"It worked according to {'its own' if _is_the_judge_its_own(run) else 'a'} reward model"
    else:
        headline = "It worked"
    return Verdict("better", headline, reason, doubts)


def verdict_on_comparison(runs: Sequence[RunFiles], comparison: RunComparison) -> Verdict:
    """Return the verdict on several runs: whether a group of them is better than the first."""
    doubts = [f"`{run.name}`: {doubt}" for run in runs for doubt in _doubts(run) if doubt != _ONE_SEED]
    if any(len(group.runs) == 1 for group in comparison.groups):
        doubts.append(_ONE_SEED)
    decided = [pair for pair in comparison.pairs if pair.better is not None]
    reason = "; ".join(pair.says for pair in comparison.pairs)
    if not decided:
        return Verdict("undecided", "It cannot be told which setting is better", reason, tuple(doubts))
    headline = "; ".join(f"{pair.better} is better" for pair in decided)
    return Verdict("better", headline, reason, tuple(doubts))


def first_pair(run: RunFiles) -> Mapping[str, Any] | None:
    """Return the comparison of the policy with the baseline, if it was evaluated."""
    return run.evaluation["pairs"][0] if run.evaluation is not None else None


def deciding(pair: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the win rate with the interval that decides: with several pairs of models, all of theirs hold together."""
    return pair.get("win_rate_joint", pair["win_rate"])


def outcomes_of(pair: Mapping[str, Any]) -> str:
    """Return how many comparisons a policy won, tied and lost, such as "48 wins, 1 tie and 11 losses"."""
    wins, ties, losses = (pair["outcomes"][name] for name in ("wins", "ties", "losses"))
    lost = f"{losses:,} {'loss' if losses == 1 else 'losses'}"
    return f"{wins:,} {'win' if wins == 1 else 'wins'}, {ties:,} {'tie' if ties == 1 else 'ties'} and {lost}"


def _not_evaluated(run: RunFiles) -> str:
    recorded = f"{word(run.folder / RECIPE)} " if (run.folder / RECIPE).is_file() else "RECIPE "
    command = f"`rlhf evaluate {recorded}--run-dir {word(run.folder)}`"
    if "evaluate" in run.manifests:
        return f"Its `evaluation.json` is missing. To write it, run {command[:-1]} --force`."
    if "ppo" in run.manifests:
        return (
            "PPO is finished, but its completions were not compared with those of the model it started from: run "
            f"{command}."
        )
    to_come = [stage for stage in planned_stages(run.folder) if stage not in run.manifests]
    again = f"`rlhf run {recorded}--run-dir {word(run.folder)}`"
    rest = f" Still to run: {', '.join(to_come)}; {again} continues." if to_come else ""
    return f"Finished so far: {', '.join(run.manifests)}.{rest}"


def _doubts(run: RunFiles) -> Iterator[str]:
    pair = first_pair(run)
    if pair is not None:
        yield from _doubts_of_pair(run, pair)
    if run.health is not None:
        for finding in run.health["findings"]:
            if finding["severity"] != "fine":
                yield f"Training, {finding['subject']}: {finding['seen']}. Usually: {finding['means']}."
    for stage, warnings in run.label_warnings.items():
        what = "Labels" if stage == "label" else f"Judgments of `{stage}`"
        for one in warnings:
            yield f"{what}, {one_line(one.about)}: {one_line(one.text)}."
    if run.quality is not None and run.quality.get("warning"):
        yield f"Reward model: {run.quality['warning']}."
    for stage, manifest in run.manifests.items():
        if skipped := sum(manifest.skipped.values()):
            reasons = "; ".join(f"{reason} ({count:,})" for reason, count in manifest.skipped.items())
            yield f"`{stage}` skipped {skipped:,} {'record' if skipped == 1 else 'records'}: {reasons}."
    yield _ONE_SEED


def _doubts_of_pair(run: RunFiles, pair: Mapping[str, Any]) -> Iterator[str]:
    assert run.evaluation is not None
    rate = deciding(pair)
    if rate["low"] is not None and rate["low"] <= 0.5 <= rate["high"]:
        yield f"{rate['n']:,} prompts are too few to tell models apart that are this close: evaluate on more."
    if _is_judged_by_a_reward_model(run):
        yield (
            "The judge is a reward model. Where PPO was trained against it, a win shows that training worked, not that "
            "people would prefer the completions."
        )
    elif run.evaluation["judge"] == "people":
        yield "The judges are people: `rlhf label stats` shows how often they agree with one another and themselves."
    elif run.evaluation["judge"] == "judges":
        yield "The judges are language models, which have biases of their own: compare them with labels of people."
    else:
        yield "The judge is a function: it sees only what it was written to see. Read the samples."
        if _labeled_by_its_judge(run):
            yield "The same function ranked the training labels: training aimed at completions that it prefers."
    models = run.evaluation["models"]
    yield from _doubts_of_variety(models[pair["policy"]], models[pair["baseline"]])
    ratio = models[pair["policy"]]["tokens"]["value"] / max(1e-9, models[pair["baseline"]]["tokens"]["value"])
    if not _SHORTER <= ratio <= _LONGER:
        controlled = pair["length_controlled_win_rate"]
        found = (
            ""
            if controlled.get("value") is None
            else f" At equal lengths the win rate is {percent(controlled['value'])}."
        )
        yield f"Completions have {ratio:.2f} times the length of the baseline's, and judges often prefer length.{found}"
    kl = pair.get("kl_nats", {}).get("k1", {}).get("value")
    if kl is not None and kl > _FAR:
        yield f"The KL is {kl:.0f} nats per completion: rewards are unreliable this far from the starting model."


def _is_judged_by_a_reward_model(run: RunFiles) -> bool:
    return run.evaluation is not None and run.evaluation["judge"] == "reward model"


def _is_the_judge_its_own(run: RunFiles) -> bool:
    """Whether the reward model of the evaluation is the one that PPO was trained against."""
    return _is_one_input(run, ("ppo", "reward_model"), ("evaluate", "reward_model"))


def _labeled_by_its_judge(run: RunFiles) -> bool:
    """Whether one function ranked the training labels and judges the evaluation."""
    return _is_one_input(run, ("label", "function"), ("evaluate", "judge_function"))


def _is_one_input(run: RunFiles, *inputs: tuple[str, str]) -> bool:
    """Whether inputs, each a stage and a name, have one content."""
    digests = {
        run.manifests[stage].identity["inputs"].get(name) if stage in run.manifests else None for stage, name in inputs
    }
    return len(digests) == 1 and None not in digests


def _doubts_of_variety(policy: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[str]:
    found, before = (one.get("distinct_2", {}).get("value") for one in (policy, baseline))
    if found is not None and before and found < _VARIED * before:
        yield (
            f"The completions are less varied than the baseline's: distinct-2 is {found:.2f} instead of {before:.2f}. "
            "Read some in a row."
        )
