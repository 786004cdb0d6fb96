"""What every stage does first: turn the recipe's settings into the engine's plain arguments. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import Prompt, prompt_key, prompt_text
from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.errors import UsageError
from rlhf_cli.progress import warn
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import StageContext

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from rlhf_cli.data.chat_format import PromptFormat
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.training.monitoring.metrics_log import MetricsLog
    from rlhf_cli.training.monitoring.trackers import Trackers

EXCERPT = 80
"""Characters of a prompt by which a record that is left out is recognized."""


def model_source(recipe: RunSettings, path: str, *, quantized: bool = False) -> ModelSource:
    """How the model at `path` is held, with device and precisions resolved for this machine.

    `model.revision` and `model.trust_remote_code` are about `model.path` and reach no other model. `model.quantize` is
    about frozen weights under an adapter that trains: a stage that trains one says `quantized`.
    """
    from rlhf_cli.models.loading import ModelSource, resolve_device, resolve_precision

    settings = recipe.model
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    own = path == settings.path
    return ModelSource(
        path=path,
        revision=settings.revision if own else None,
        trust_remote_code=settings.trust_remote_code if own else False,
        dtype=precision if settings.dtype == "auto" else resolve_precision(settings.dtype, device),
        precision=precision,
        attention=settings.attention,
        device=device,
        quantize=settings.quantize if quantized else "none",
    )


def prompt_format(
    recipe: RunSettings, source: ModelSource, tokenizer: PreTrainedTokenizerBase | None = None
) -> PromptFormat:
    """How prompts reach the model at `source`; its tokenizer is loaded if none is given."""
    from rlhf_cli.data.chat_format import PromptFormat
    from rlhf_cli.models.loading import load_config, load_tokenizer

    return PromptFormat(
        tokenizer=tokenizer if tokenizer is not None else load_tokenizer(source),
        template=prompt_template(recipe, source.path),
        name=f"`{source.path}`",
        is_encoder_decoder=load_config(source).is_encoder_decoder,
    )


def prompt_template(recipe: RunSettings, model: str) -> str | None:
    """How plain prompts reach a model: as the recipe says, else as the model was asked when we trained it.

    A stage alone, without the recipe of the run its model is from, would otherwise ask in a way the model never saw.
    """
    trained = artifact_settings(Path(model)).get("data", {}).get("prompt_template")
    if recipe.data.prompt_template is None:
        return trained
    if trained not in (None, recipe.data.prompt_template):
        warn(f"{model} was trained with `data.prompt_template: {trained!r}`, not {recipe.data.prompt_template!r}")
    return recipe.data.prompt_template


def artifact_settings(folder: Path) -> dict[str, Any]:
    """The settings in the manifest of one of our own artifacts; empty for any other folder."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return dict(manifest["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@dataclass(frozen=True)
class Prompts:
    """Prompts that fit the model.

    Attributes:
        prompts: each once.
        ids: their tokens.
        skips: those left out.
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    skips: SkipLog


def load_prompts(
    context: StageContext[Any, Any], form: PromptFormat, config: PretrainedConfig, *, max_new_tokens: int
) -> Prompts:
    """All prompts of the stage's "prompts" input, held-out ones too, each once, that leave room for an answer.

    Args:
        context: of the stage.
        form: of the model that will answer.
        config: of that model.
        max_new_tokens: room an answer may take.

    Raises:
        DataError: the source cannot be read, or too many prompts are too long.
        UsageError: the model could read no prompt at all beside such an answer.
    """
    from rlhf_cli.data.chat_format import check_conversations
    from rlhf_cli.data.sources import read_records

    data, source = context.recipe.data, context.inputs.prompts.source
    section = context.stage.section
    setting = f"{section}.max_new_tokens" if section == "ppo" else f"{section}.sampling.max_new_tokens"
    room = min(data.max_prompt_tokens, prompt_room(config, max_new_tokens, form.name, setting))
    loaded = read_records(source, "prompt", columns=data.columns, max_skip=data.max_skip)
    check_conversations(form, loaded.records)
    prompts: list[Prompt] = []
    ids: list[list[int]] = []
    seen: set[str] = set()
    for record in loaded.records:
        if (key := prompt_key(record.prompt)) in seen:
            continue
        seen.add(key)
        tokens = form.prompt_ids(record.prompt)
        if len(tokens) > room:
            excerpt = prompt_text(record.prompt)[:EXCERPT]
            loaded.skips.add(Skip(record.location or source, f"prompt longer than {room:,} tokens", excerpt))
            continue
        prompts.append(record.prompt)
        ids.append(tokens)
    loaded.skips.check(loaded.total, data.max_skip, source)
    return Prompts(prompts, ids, loaded.skips)


def prompt_room(config: PretrainedConfig, max_new_tokens: int, name: str, setting: str) -> int:
    """Longest prompt, in tokens, beside an answer of `max_new_tokens`; an encoder-decoder reads prompts on their own.

    Raises:
        UsageError: there is no room for a single token.
    """
    from rlhf_cli.models.loading import context_length

    longest = context_length(config)
    learned = getattr(config, "max_position_embeddings", None) if config.is_encoder_decoder else None
    if isinstance(learned, int) and max_new_tokens > learned:
        raise UsageError(
            f"answers of {max_new_tokens:,} tokens are too long: the decoder of {name} writes {learned:,} at most",
            hint=f"lower it, such as `--set {setting}=64`",
        )
    room = longest if config.is_encoder_decoder else longest - max_new_tokens
    if room < 1:
        raise UsageError(
            f"answers of {max_new_tokens:,} tokens leave no room for a prompt: {name} reads {longest:,} tokens in all",
            hint=f"lower it, such as `--set {setting}=64`",
        )
    return room


def trackers(context: StageContext[Any, Any]) -> Trackers | None:
    """The recipe's trackers, for a trainer's metrics log in the process that writes it; None without any.

    They are told the settings that the stage's result depends on, and no paths or addresses.
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
    """Makes the stage's metrics log, trackers included, from the other arguments of `MetricsLog`."""
    from rlhf_cli.training.monitoring.metrics_log import MetricsLog

    return partial(MetricsLog, trackers=trackers(context))


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and "://" in value
