"""The models of an evaluation: the policies, the baseline, and the model before any training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.errors import UsageError
from rlhf_cli.generation.prompts import PromptStyle, prompt_style
from rlhf_cli.stages.common import load_policy, model_source, stage_sampling
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.inputs import source_of

if TYPE_CHECKING:
    from rlhf_cli.generation.policy import Policy


def load_policies(context: EvaluateContext) -> tuple[list[Policy], Policy]:
    """Return the policies and the baseline. All are sampled as the first policy was trained, or as the recipe says.

    Raises:
        UsageError: two of them are prompted in different ways.
    """
    from rlhf_cli.models.loading import load_tokenizer

    paths = [*(one.source for one in context.inputs.evaluated), context.inputs.baseline.source]
    sampling = stage_sampling(context, context.settings.sampling, paths[0])
    roles = ["the policy"] * (len(paths) - 1) + ["the baseline"]
    styles = []
    for role, path in zip(roles, paths, strict=True):
        tokenizer = load_tokenizer(model_source(context.recipe, path))
        styles.append(prompt_style(context.recipe.data, path, tokenizer, name=role, may_differ=True))
    for role, path, style in zip(roles, paths, styles, strict=True):
        if style != styles[0]:
            raise UsageError(
                f"the policy `{paths[0]}` is prompted {styles[0]} and {role} `{path}` {style}",
                hint="prompt both alike: `--set data.prompt_template=null --set data.template_kwargs={}` uses plain "
                "text; if both have a chat template, write `chat` in place of `null`",
            )
    *policies, baseline = (load_policy(context, path, sampling, style=styles[0]) for path in paths)
    return policies, baseline


def base_policy(context: EvaluateContext, of: Policy) -> Policy | None:
    """Return the model before any training, sampled and prompted like another; None if it is the baseline."""
    from rlhf_cli.generation.policy import Policy

    recipe, path, baseline = context.recipe, source_of(context.inputs.base), context.inputs.baseline.source
    style = PromptStyle.of(of.format)
    if path is None or path == baseline:
        return None
    if path == "build":
        source, divides = model_source(recipe, baseline), recipe.model.sharding != "none"
        return Policy.untrained(source, of.sampling, seed=recipe.seed, style=style, is_sharded=divides)
    return load_policy(context, path, of.sampling, style=style)
