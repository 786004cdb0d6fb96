"""What several stages do first: resolve the recipe's settings into models, prompts and logs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import Prompt, prompt_key, prompt_text
from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import StageContext

if TYPE_CHECKING:
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.prompts import TokenizedPrompts
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.settings.shared import SamplingSettings
    from rlhf_cli.training.monitoring.metrics_log import MetricsLog
    from rlhf_cli.training.monitoring.trackers import Trackers

EXCERPT = 80
"""Characters of a prompt that identify a skipped record."""

CHOSEN_ON = "chosen_on.json"
"""File beside a PPO policy with the keys of the held-out prompts that chose it, which `evaluate` skips."""


def model_source(recipe: RunSettings, path: str, *, quantized: bool = False) -> ModelSource:
    """Return how the model at `path` is loaded, on this machine and in the precision that `decide_precision` left.

    `model.revision` and `model.trust_remote_code` apply to `model.path` only. `model.quantize` applies to the frozen
    weights under an adapter: a stage that trains one passes `quantized`.
    """
    from rlhf_cli.models.loading import DTYPES, ModelSource, resolve_device

    settings = recipe.model
    device = resolve_device(settings.device)
    precision = DTYPES[settings.precision]
    own = path == settings.path
    return ModelSource(
        path=path,
        revision=settings.revision if own else None,
        trust_remote_code=settings.trust_remote_code if own else False,
        dtype=precision if settings.dtype == "auto" else DTYPES[settings.dtype],
        precision=precision,
        attention=settings.attention,
        device=device,
        quantize=settings.quantize if quantized else "none",
    )


def load_policy(
    context: StageContext[Any, Any], path: str, sampling: SamplingSettings, *, quantized: bool = False
) -> Policy:
    """Return the policy at `path`, prompted as the recipe says; its weights are loaded when they are first used.

    Args:
        context: of the stage.
        path: folder or hub id.
        sampling: how it draws tokens.
        quantized: hold its weights as `model.quantize` says.
    """
    from rlhf_cli.generation.policy import Policy

    recipe = context.recipe
    source = model_source(recipe, path, quantized=quantized)
    return Policy.load(source, sampling, template=recipe.data.prompt_template)


def load_prompts(context: StageContext[Any, Any], policy: Policy, setting: str) -> tuple[TokenizedPrompts, SkipLog]:
    """Read the prompts of the stage's "prompts" input, held-out ones too, each once, and skip those that are too long.

    Args:
        context: of the stage.
        policy: that will complete them.
        setting: the setting that `policy.sampling.max_new_tokens` comes from, for messages.

    Raises:
        DataError: the source cannot be read, or too many prompts are too long.
        UsageError: completions are so long that no prompt fits.
    """
    from rlhf_cli.data.chat_format import check_conversations
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.generation.prompts import TokenizedPrompts

    data, source = context.recipe.data, context.inputs.prompts.source
    longest = min(data.max_prompt_tokens, policy.longest_prompt(setting))
    loaded = read_records(source, "prompt", columns=data.columns, max_skip=data.max_skip)
    check_conversations(policy.format, loaded.records)
    prompts: list[Prompt] = []
    ids: list[list[int]] = []
    seen: set[str] = set()
    for record in loaded.records:
        if (key := prompt_key(record.prompt)) in seen:
            continue
        seen.add(key)
        tokens = policy.prompt_ids(record.prompt)
        if len(tokens) > longest:
            excerpt = prompt_text(record.prompt)[:EXCERPT]
            loaded.skips.add(Skip(record.location or source, f"prompt longer than {longest:,} tokens", excerpt))
            continue
        prompts.append(record.prompt)
        ids.append(tokens)
    loaded.skips.check(loaded.total, data.max_skip, source)
    return TokenizedPrompts(prompts, ids), loaded.skips


def trackers(context: StageContext[Any, Any]) -> Trackers | None:
    """Return the recipe's trackers, in the process that writes metrics; None if there are none.

    They receive the settings that the stage's result depends on, without paths and addresses.
    """
    tracking = context.recipe.tracking
    if not tracking.trackers or not is_main():
        return None
    from rlhf_cli.training.monitoring.trackers import TrackedRun, Trackers

    run = TrackedRun(
        project=tracking.project,
        group=context.recipe.name,
        stage=context.stage.name,
        folder=context.output.parent / "tracking" / context.stage.name,
        state=context.work / "tracking.json",
        settings={name: value for name, value in context.tracked.items() if not _is_address(value)},
    )
    return Trackers(tracking.trackers, run)


def metrics_log(context: StageContext[Any, Any]) -> Callable[..., MetricsLog]:
    """Return what makes the stage's metrics log, with its trackers, from the other arguments of `MetricsLog`."""
    from rlhf_cli.training.monitoring.metrics_log import MetricsLog

    return partial(MetricsLog, trackers=trackers(context))


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and "://" in value
