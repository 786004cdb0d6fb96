"""Items of a selection in the `label` stage, and the selection that is made before completions are sampled."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.data.records import Prompt, prompt_key
from rlhf_cli.labeling.active_learning import Item, select_prompts
from rlhf_cli.stages.common import split_from
from rlhf_cli.stages.inputs import source_of
from rlhf_cli.stages.label.stage import LabelContext


def select_before_sampling(context: LabelContext, prompts: Sequence[Prompt]) -> list[int]:
    """Return the numbers of the prompts to sample completions for, ascending; see `LabelSettings.selects_first`."""
    settings = context.settings.active_learning
    assert settings is not None
    items = items_of(context, prompts, [()] * len(prompts))
    return select_prompts(items, prompts=settings.prompts, seed=context.recipe.seed)


def items_of(context: LabelContext, prompts: Sequence[Prompt], completions: Sequence[tuple[str, ...]]) -> list[Item]:
    """Return what a selection is made of.

    Args:
        context: of the stage.
        prompts: N prompts.
        completions: N groups of texts; empty where they are not sampled yet.
    """
    split = split_from(context, source_of(context.inputs.policy))
    return [
        Item(prompt_key(prompt), own, split.holds_out(prompt)) for prompt, own in zip(prompts, completions, strict=True)
    ]
