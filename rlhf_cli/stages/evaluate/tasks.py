"""Benchmarks of lm-evaluation-harness (the package lm-eval), run on every model of an evaluation."""

from __future__ import annotations

import importlib
import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import UsageError
from rlhf_cli.intervals import Measure

if TYPE_CHECKING:
    from rlhf_cli.generation.policy import Policy

_NO_ERROR = "lm-eval gives no standard error"


def task_measures(policy: Policy, task: str, seed: int) -> dict[str, dict[str, Any]]:
    """Run one task, with the harness's own prompts and metrics, and return its figures as JSON holds them.

    Args:
        policy: whose model is evaluated, in memory already or loaded for it.
        task: name of a task or of a group of tasks.
        seed: of few-shot examples.

    Returns:
        "task/metric" -> figure. Its interval is the normal one of the standard error that lm-eval gives.

    Raises:
        UsageError: lm-eval has no such task, or it cannot run here.
    """
    harness, wrappers = (importlib.import_module(name) for name in ("lm_eval", "lm_eval.models.huggingface"))
    with policy.model() as model, policy.autocast():
        wrapped = wrappers.HFLM(
            pretrained=model, tokenizer=policy.format.tokenizer, batch_size=policy.sampling.batch_size
        )
        seeds = {f"{kind}_seed": seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
        try:
            found = harness.simple_evaluate(model=wrapped, tasks=[task], **seeds)
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"lm-eval cannot run the task `{task}` of `evaluate.tasks`: {error}",
                hint="`lm-eval ls tasks` lists the tasks; some need packages or data sets of their own",
            ) from error
    counts = found.get("n-samples", {})
    measures: dict[str, dict[str, Any]] = {}
    for name, metrics in found["results"].items():
        count = int(counts.get(name, {}).get("effective", 0))
        measures |= {f"{name}/{metric}": one.to_json() for metric, one in _measures(metrics, count).items()}
    return measures


def _measures(metrics: dict[str, Any], count: int) -> dict[str, Measure]:
    """Read `{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}`."""
    found = {}
    for key, value in metrics.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if kind == "none" else f"{metric} ({kind})"
        error = metrics.get(f"{metric}_stderr,{kind}")
        if isinstance(error, int | float) and math.isfinite(error):
            reach = NormalDist().inv_cdf(0.975) * error
            found[name] = Measure(value, value - reach, value + reach, count)
        else:
            found[name] = Measure(value, None, None, count, _NO_ERROR)
    return found
