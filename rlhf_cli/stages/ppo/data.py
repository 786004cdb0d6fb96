"""What the `ppo` stage reads: prompts to train on, held-out ones to look at, demonstrations for PPO-ptx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.stages.common import Prompts, load_prompts
from rlhf_cli.stages.inputs import present
from rlhf_cli.stages.ppo.stage import PPOContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_cli.data.chat_format import PromptFormat
    from rlhf_cli.data.records import Prompt
    from rlhf_cli.data.skips import SkipLog
    from rlhf_cli.stages.ppo.ptx import Demonstrations
    from rlhf_cli.stages.ppo.trainer import PPOData


def load_data(context: PPOContext, form: PromptFormat, model: PreTrainedModel) -> tuple[PPOData, SkipLog]:
    """Everything PPO reads, in ids of the policy.

    Args:
        context: of the stage.
        form: of the policy.
        model: the policy.

    Raises:
        DataError: nothing is left to train on, or nothing is held out to evaluate on.
        UsageError: a stop token that is none.
    """
    from rlhf_cli.generation.torch_generator import stop_ids
    from rlhf_cli.stages.ppo.rollout import PromptSet
    from rlhf_cli.stages.ppo.trainer import PPOData

    settings = context.settings
    loaded = load_prompts(context, form, model.config, max_new_tokens=settings.max_new_tokens)
    ends = stop_ids(model, form.tokenizer) | {_stop_token(form, text) for text in settings.stop_tokens}
    training, looked_at = _split(context, loaded)

    def prompt_set(prompts: list[Prompt]) -> PromptSet:
        ids = dict(zip(loaded.prompts, loaded.ids, strict=True))
        return PromptSet(prompts, [ids[prompt] for prompt in prompts], form.tokenizer, ends)

    data = PPOData(
        prompt_set(training),
        prompt_set(looked_at) if looked_at else None,
        None if settings.ptx is None else _demonstrations(context, form, model, loaded.skips),
    )
    return data, loaded.skips


def _split(context: PPOContext, loaded: Prompts) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and those to look at while training."""
    from rlhf_cli.data.records import is_held_out
    from rlhf_cli.data.splits import validation_prompts

    recipe, settings, source = context.recipe, context.settings, context.inputs.prompts.source
    held_out = [prompt for prompt in loaded.prompts if is_held_out(prompt, recipe.data.holdout, recipe.seed)]
    training = [prompt for prompt in loaded.prompts if not is_held_out(prompt, recipe.data.holdout, recipe.seed)]
    if not training:
        raise DataError(
            f"{source}: no prompt is left to train on: all {len(loaded.prompts):,} are held out",
            hint="give more prompts, or lower `data.holdout`",
        )
    if settings.eval_steps is not None and len(held_out) < 2:
        raise DataError(
            f"{source}: `ppo.eval_steps` needs two held-out prompts, one of which is left for `evaluate`; "
            f"{len(held_out)} of {len(loaded.prompts):,} are held out",
            hint="hold some out with `--set data.holdout=0.1`, or set `ppo.eval_steps=null`",
        )
    if settings.eval_steps is None and settings.show_steps is None:
        return training, []
    # Where nothing is held out, the first training prompts are as good to read.
    count = max(settings.eval_prompts, settings.shown_prompts)
    return training, validation_prompts(held_out, count, recipe.seed) or training[: settings.shown_prompts]


def _stop_token(form: PromptFormat, text: str) -> int:
    """Id of a stop token; raises `UsageError` unless the text is exactly one token."""
    found = form.tokenizer.convert_tokens_to_ids(text)
    if isinstance(found, int) and found != form.tokenizer.unk_token_id and text in form.tokenizer.get_vocab():
        return found
    ids = form.completion_ids(text, ended=False)
    if len(ids) == 1:
        return ids[0]
    raise UsageError(
        f"`ppo.stop_tokens`: {text!r} is {len(ids)} tokens of {form.name}, not one",
        hint="name a token of the policy's vocabulary, such as <|im_end|>",
    )


def _demonstrations(context: PPOContext, form: PromptFormat, model: PreTrainedModel, skips: SkipLog) -> Demonstrations:
    """Demonstrations whose prompts are not held out and that fit the model; the others are counted."""
    from rlhf_cli.data.examples import tokenize
    from rlhf_cli.data.skips import Skip
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.data.splits import split_by_prompt
    from rlhf_cli.models.loading import context_length
    from rlhf_cli.stages.ppo.ptx import Demonstrations

    recipe, settings, source = context.recipe, context.settings, present(context.inputs.demonstrations)
    assert settings.ptx is not None
    loaded = read_records(source, "demonstration", columns=recipe.data.columns, max_skip=recipe.data.max_skip)
    records, _ = split_by_prompt(loaded.records, recipe.data.holdout, recipe.seed)
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    room = min(settings.ptx.max_length, context_length(model.config))
    pairs: list[tuple[list[int], list[int]]] = []
    for record in records:
        example = tokenize(record, form, is_encoder_decoder=is_encoder_decoder)
        if example.longest_side(is_encoder_decoder) > room:
            skip = Skip(record.location or source, f"demonstration longer than {room:,} tokens", record.completion[:80])
            loaded.skips.add(skip)
        else:
            pairs.append((example.prompt_ids, example.completion_ids))
    loaded.skips.check(loaded.total, recipe.data.max_skip, source)
    for skip in loaded.skips:
        skips.add(skip)
    found = Demonstrations.of(pairs)
    if not len(found):
        raise DataError(f"{source}: no demonstration is left for `ppo.ptx`", hint="give records that fit the policy")
    return found
