"""The work of `label`, for `rlhf plan`: the completions that it draws."""

from __future__ import annotations

from rlhf_cli.stages.common import load_policy, load_prompts, stage_sampling
from rlhf_cli.stages.inputs import present
from rlhf_cli.stages.label.sampling import prompts_to_label
from rlhf_cli.stages.label.stage import LabelContext
from rlhf_cli.stages.workload import Reading, Workload, drawing


def read(context: LabelContext) -> Reading | None:
    """Read the prompts as the stage does; None if no completions are drawn."""
    settings = context.settings
    if not settings.samples:
        return None
    path = present(context.inputs.policy)
    policy = load_policy(context, path, stage_sampling(context, settings.sampling, path))
    prompts, _ = load_prompts(context, policy, "label.sampling.max_new_tokens")
    shape = context.shape_of(policy.source.folder)
    ids = [prompts.ids[number] for number in prompts_to_label(context, prompts)]
    lengths = list(map(len, ids))
    sampling, count = policy.sampling, settings.completions_per_prompt
    note = {"human": "the time of annotators is not counted", "function": ""}.get(
        settings.by, "what ranks the completions is not counted"
    )

    def at(mean: float | None) -> Workload:
        longest = sampling.max_new_tokens
        drawn = drawing(
            shape, "rollout", lengths, per_prompt=count, mean=mean or longest, longest=longest,
            rows=sampling.batch_size, calls=max(1, len(lengths) // max(1, sampling.batch_size // count)),
        )  # fmt: skip
        return Workload(
            len(lengths), "prompts", (drawn,), prompt=max(lengths, default=None), notes=(note,) if note else ()
        )

    sample = [(own, []) for own in ids[: sampling.batch_size]]
    return Reading(at, path, shape, sample, rows=sampling.batch_size, longest=sampling.max_new_tokens)
