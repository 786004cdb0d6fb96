"""Active learning of reward models: compare both strategies of `label.active_learning` with random choice.

    rlhf run recipes/quickstart.yaml --to label --run-dir RUN
    python benchmarks/active_labels.py RUN RESULTS.jsonl --plot active-labels.png

The task is the quickstart: RUN holds its SFT model and eight completions per question for 320 questions, with gold
scores. A label reveals only their order (scores that differ by at most 1 are a tie). Each seed holds out a fifth of
the questions and draws 20 of the others with K completions each as the first set. Then the number of labels is doubled
three times, choosing at random, by the uncertainty of the current reward model, or by the disagreement of three reward
models that differ in their seed. All strategies start from the same labels and models, label equally many completions
of equally many questions, and train from scratch on all labels so far. The result is the accuracy of one reward model
(the first of the three, trained with the same seed) on all pairs of the held-out questions that are not ties.

Intervals are Student's t, 95 %, over seeds; differences are paired by seed. Results are kept in RESULTS.jsonl; only
missing ones are computed. Takes about one minute of one core per seed and K.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from rlhf_cli.console import console
from rlhf_cli.data.records import Ranking, prompt_key
from rlhf_cli.data.sources import read_records
from rlhf_cli.data.splits import Split
from rlhf_cli.labeling.active_learning import Item, Strategy, select
from rlhf_cli.labeling.scoring import tiers_from_scores
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.reward_model.data import encode_group
from rlhf_cli.stages.reward_model.evaluation import accuracy
from rlhf_cli.stages.reward_model.settings import RewardModelSettings
from rlhf_cli.stages.reward_model.trainer import RewardTrainer

STRATEGIES: tuple[Strategy, ...] = ("random", "uncertainty", "disagreement")
MEMBERS = 3
HOLDOUT, TIE_MARGIN, TEMPLATE = 0.2, 1.0, "{prompt}\n"
SETTINGS = RewardModelSettings(
    learning_rate=3e-3, batch_size=4, micro_batch_size=4, epochs=4.0, warmup_share=0.0, checkpoint_steps=10**9
)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 12: 2.201}
"""97.5 % quantile of Student's t, by number of values in the mean."""


class NoStop:
    """A stop request that is never made."""

    requested = False

    def check(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Question:
    """A prompt with its completions and their gold scores."""

    ranking: Ranking
    scores: tuple[float, ...]

    def label(self, answers: Sequence[int]) -> Ranking:
        """Return the gold ranking of some of the completions."""
        texts = tuple(self.ranking.completions[number] for number in answers)
        tiers = tiers_from_scores([self.scores[number] for number in answers], TIE_MARGIN)
        return Ranking(self.ranking.prompt, texts, tiers)


@dataclass
class Costs:
    """CPU seconds by activity."""

    training: float = 0.0
    scoring: float = 0.0


@dataclass
class Labels:
    """Labels so far: question -> completions."""

    answers: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def rankings(self, questions: Sequence[Question]) -> list[Ranking]:
        """Return the labels in the order they were made."""
        return [questions[number].label(answers) for number, answers in self.answers.items()]

    def with_chosen(
        self,
        questions: Sequence[Question],
        pool: Sequence[int],
        rewards: Sequence[dict[int, list[float]]],
        strategy: Strategy,
        count: int,
        answers: int,
        seed: int,
    ) -> Labels:
        """Return these labels and `count` more, chosen from the unlabeled questions of the pool."""
        left = [number for number in pool if number not in self.answers]
        items = []
        for number in left:
            row = questions[number].ranking
            given = np.array([model[number] for model in rewards]) if strategy != "random" else None
            items.append(Item(prompt_key(row.prompt), row.completions, False, given))
        found = select(items, by=strategy, prompts=count, completions=answers, seed=seed)
        return Labels(self.answers | {left[one.item]: one.completions for one in found.selected})


class Experiment:
    """The experiment for one seed and one K.

    Args:
        source: the SFT model.
        questions: all questions.
        answers: K, completions labeled per question.
        seed: random seed of everything.
    """

    def __init__(self, source: ModelSource, questions: Sequence[Question], answers: int, seed: int) -> None:
        self.source, self.questions, self.answers, self.seed = source, questions, answers, seed
        self.costs = Costs()
        is_out = [Split(HOLDOUT, seed).holds_out(one.ranking.prompt) for one in questions]
        self.held_out = [number for number, out in enumerate(is_out) if out]
        # A question whose completions are all equal gives no label.
        self.pool = [n for n, out in enumerate(is_out) if not out and len(set(questions[n].ranking.completions)) > 1]

    def run(self, budgets: Sequence[int]) -> list[dict]:
        """Return the accuracy of each strategy at each number of labeled questions."""
        begin = Labels().with_chosen(self.questions, self.pool, [], "random", budgets[0], self.answers, self.seed)
        first = self._train(begin, MEMBERS)
        start = [self._row(strategy, begin, first[0]) for strategy in STRATEGIES[:1]]
        found = [dict(start[0], strategy=strategy) for strategy in STRATEGIES]
        for strategy in STRATEGIES:
            labels, models = begin, first
            for before, budget in itertools.pairwise(budgets):
                asked = {"random": 0, "uncertainty": 1, "disagreement": MEMBERS}[strategy]
                rewards = [self._score(model, self.pool) for model in models[:asked]]
                more = budget - before
                # A draw depends only on prompt and seed, so every round needs another seed.
                seed = self.seed * 1_000 + budget
                labels = labels.with_chosen(self.questions, self.pool, rewards, strategy, more, self.answers, seed)
                is_last = budget == budgets[-1]
                models = self._train(labels, MEMBERS if strategy == "disagreement" and not is_last else 1)
                found.append(self._row(strategy, labels, models[0]))
        return found

    def _row(self, strategy: Strategy, labels: Labels, model: RewardModel) -> dict:
        rankings = labels.rankings(self.questions)
        rewards = self._score(model, self.held_out)
        gold = [self.questions[number].label(range(len(self.questions[number].scores))) for number in self.held_out]
        pairs = [a == b for ranking in rankings for a, b in itertools.combinations(ranking.levels(), 2)]
        return {
            "answers": self.answers,
            "seed": self.seed,
            "strategy": strategy,
            "questions": len(rankings),
            "pairs": len(pairs),
            "accuracy": accuracy(gold, [rewards[number] for number in self.held_out]),
            "ties": fmean(pairs),
        }

    def _train(self, labels: Labels, members: int) -> list[RewardModel]:
        start = time.process_time()
        models = [self._train_one(labels, self.seed * MEMBERS + member) for member in range(members)]
        self.costs.training += time.process_time() - start
        return models

    def _train_one(self, labels: Labels, seed: int) -> RewardModel:
        scorer = new_reward_model(self.source, template=TEMPLATE, lora=LoraSettings(), seed=seed)
        groups = [encode_group(scorer, ranking) for ranking in labels.rankings(self.questions)]
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            RewardTrainer(scorer, groups, SETTINGS, seed=seed, work=work, stop=NoStop()).train()
        return scorer

    def _score(self, model: RewardModel, numbers: Sequence[int]) -> dict[int, list[float]]:
        """Rewards of all completions of some questions."""
        start = time.process_time()
        rows = [self.questions[number].ranking for number in numbers]
        prompts = [row.prompt for row in rows for _ in row.completions]
        texts = [text for row in rows for text in row.completions]
        flat = iter(model.score(prompts, texts, batch_size=128))
        found = {number: [next(flat) for _ in row.completions] for number, row in zip(numbers, rows, strict=True)}
        self.costs.scoring += time.process_time() - start
        return found


def main() -> None:
    """Run missing experiments, print the tables, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of the quickstart, up to `label`")
    parser.add_argument("results", type=Path, help="JSONL file of the results, created if missing")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--answers", type=int, nargs="+", default=[2, 4], help="labeled completions per question")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[20, 40, 80, 160], help="numbers of labeled questions"
    )
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console.quiet = True
    source, questions = ModelSource(str(options.run / "sft")), read_questions(options.run / "label" / "rankings.jsonl")
    found = [json.loads(line) for line in options.results.open(encoding="utf-8")] if options.results.exists() else []
    done = {(row["answers"], row["seed"]) for row in found}
    # Seed by seed, so that an interrupted run has equally many of each K.
    for seed, answers in itertools.product(options.seeds, options.answers):
        if (answers, seed) in done:
            continue
        experiment = Experiment(source, questions, answers, seed)
        rows = experiment.run(options.budgets)
        found += rows
        with options.results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        costs = dataclasses.asdict(experiment.costs)
        print(f"seed {seed}, {answers} completions: CPU seconds", {what: round(value) for what, value in costs.items()})
    curves = by_strategy(found)
    for answers in options.answers:
        table(answers, curves)
    if options.plot:
        draw(options.answers, curves, options.plot)


def read_questions(path: Path) -> list[Question]:
    """Read the rankings of the `label` stage with their gold scores, which labels do not reveal."""
    rankings = read_records(str(path), "ranking", max_skip=1.0, keep_blank=True).records
    scores = [json.loads(line)["scores"] for line in path.open(encoding="utf-8")]
    return [Question(ranking, tuple(row)) for ranking, row in zip(rankings, scores, strict=True)]


Curves = dict[tuple[int, str], dict[int, dict[int, dict]]]
"""(answers, strategy) -> labeled questions -> seed -> row."""


def by_strategy(rows: Sequence[dict]) -> Curves:
    """Group the rows of the results."""
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        curves[row["answers"], row["strategy"]][row["questions"]][row["seed"]] = row
    return curves


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its interval."""
    return fmean(values), STUDENT[len(values)] * stdev(values) / len(values) ** 0.5


def table(answers: int, curves: Curves) -> None:
    """Print the accuracy of random choice, the gain of each strategy, and the share of ties in its labels."""
    base = curves[answers, "random"]
    seeds = sorted(next(iter(base.values())))
    print(f"\n{answers} completions per question, {len(seeds)} seeds\n")
    columns = ["questions", "pairs", "random", *STRATEGIES[1:], *(f"ties, {name}" for name in STRATEGIES)]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    first = min(base)  # where all strategies are equal
    for budget, of_seed in sorted(base.items()):
        mean, half = interval([of_seed[seed]["accuracy"] for seed in seeds])
        cells = [f"{budget}", f"{of_seed[seeds[0]]['pairs']}", f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"]
        for name in STRATEGIES[1:]:
            if budget == first:
                cells.append("")
                continue
            other = curves[answers, name][budget]
            gains = [other[seed]["accuracy"] - of_seed[seed]["accuracy"] for seed in seeds]
            mean, half = interval(gains)
            cells.append(f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})")
        for name in STRATEGIES:
            cells.append(f"{fmean(curves[answers, name][budget][seed]['ties'] for seed in seeds):.0%}")
        print("| " + " | ".join(cells) + " |")
    for name in STRATEGIES[1:]:
        print(f"\n{name}: questions needed for random's final accuracy: {saved(answers, name, curves, seeds)}")


def saved(answers: int, name: str, curves: Curves, seeds: Sequence[int], resamples: int = 2_000) -> str:
    """Number of questions at which a strategy reaches random's final accuracy, by bootstrap over seeds."""
    budgets = sorted(curves[answers, name])

    def needed(drawn: Sequence[int]) -> float:
        def mean(strategy: str, budget: int) -> float:
            return fmean(curves[answers, strategy][budget][seed]["accuracy"] for seed in drawn)

        goal, means = mean("random", budgets[-1]), [mean(name, budget) for budget in budgets]
        for (low, before), (high, after) in itertools.pairwise(zip(budgets, means, strict=True)):
            if before < goal <= after:
                return low * (high / low) ** ((goal - before) / (after - before))  # linear in log(budget)
        return float("inf")

    draw = random.Random(0)
    found = sorted(needed(draw.choices(seeds, k=len(seeds))) for _ in range(resamples))
    ends = (needed(seeds), found[int(0.025 * resamples)], found[int(0.975 * resamples) - 1])
    words = [f"more than {budgets[-1]}" if end == float("inf") else f"{end:.0f}" for end in ends]
    return f"{words[0]} ({words[1]} to {words[2]}) of {budgets[-1]}"


def draw(answers: Sequence[int], curves: Curves, path: Path) -> None:
    """Plot accuracy over labeled questions, one panel per K; bands are intervals over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(answers), figsize=(5 * len(answers), 3.8), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], answers, strict=True):
        for name, color in zip(STRATEGIES, ("#444444", "#d1702c", "#2b6cb0"), strict=True):
            curve = curves[count, name]
            budgets = sorted(curve)
            found = [interval([row["accuracy"] for row in curve[budget].values()]) for budget in budgets]
            means, halves = np.array(found).T
            axis.plot(budgets, means, marker="o", color=color, label=name)
            axis.fill_between(budgets, means - halves, means + halves, color=color, alpha=0.13, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
        pairs = count * (count - 1) // 2
        axis.set_title(f"{count} completions per question: {pairs} pair{'s' if pairs > 1 else ''} each")
        axis.set_xlabel("labeled questions")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("accuracy on held-out pairs")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
