"""The work of `evaluate`, for `rlhf plan`: completions of all models, and their log-probabilities."""

from __future__ import annotations

from rlhf_cli.stages.common import load_policy, load_prompts, split_from, stage_sampling
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.workload import Reading, Workload, drawing, scoring


def read(context: EvaluateContext) -> Reading:
    """Read the prompts as the stage does; which of them a model was trained on is not looked at."""
    settings, path = context.settings, context.inputs.policy.source
    policy = load_policy(context, path, stage_sampling(context, settings.sampling, path))
    prompts, _ = load_prompts(context, policy, "evaluate.sampling.max_new_tokens")
    split = split_from(context, path)
    lengths = [
        len(ids)
        for prompt, ids in zip(prompts.prompts, prompts.ids, strict=True)
        if settings.prompts is not None or split.holds_out(prompt)
    ][: settings.max_prompts]
    shape, sampling = context.shape_of(policy.source.folder), policy.sampling
    models, count = 2 + len(settings.policies), settings.samples_per_prompt
    notes = ("judges, functions and tasks are not counted",)

    def at(mean: float | None) -> Workload:
        longest = sampling.max_new_tokens
        drawn = drawing(
            shape, "rollout", lengths, per_prompt=count, mean=mean or longest, longest=longest,
            rows=sampling.batch_size,
        )  # fmt: skip
        drawn = drawn.times(models)
        # Each completion is scored by the policy that wrote it and by the baseline, for their KL.
        passes = scoring(
            shape, "passes", lengths, per_prompt=count, mean=mean or longest, logits=True, times=2 * models - 2,
            rows=sampling.batch_size,
        )  # fmt: skip
        return Workload(
            len(lengths), "prompts", (drawn, passes), loads=models, prompt=max(lengths, default=None), notes=notes
        )

    sample = [(ids, []) for ids in prompts.ids[: sampling.batch_size]]
    return Reading(at, path, shape, sample, rows=sampling.batch_size, longest=sampling.max_new_tokens)
