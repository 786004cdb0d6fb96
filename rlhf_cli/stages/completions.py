"""K completions per prompt, kept on disk while they are drawn: what `label` ranks and `best-of-n` chooses from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import Prompt, seed_for
from rlhf_cli.generation.generator import Completion, Generator, Request
from rlhf_cli.generation.progress import Drawing
from rlhf_cli.labeling.completions import CompletionFile
from rlhf_cli.progress import say, task
from rlhf_cli.rewards.base import Columns, columns_of
from rlhf_cli.stages.base import StageContext
from rlhf_cli.training.timing import StepWatch

if TYPE_CHECKING:
    from rlhf_cli.distributed.process_group import ProcessGroup
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.prompts import TokenizedPrompts


def draw_completions(
    context: StageContext[Any, Any],
    policy: Policy,
    prompts: TokenizedPrompts,
    per_prompt: int,
    *,
    generator: Generator,
    processes: ProcessGroup,
    watch: StepWatch,
) -> tuple[list[list[Completion]], int]:
    """Draw K completions per prompt; all processes call this, share the prompts, and get all completions.

    Each batch is on disk before the next begins, so that an interrupted stage resumes after it.

    Args:
        context: of the stage.
        policy: that completes the prompts; its weights are released at the end.
        prompts: N prompts.
        per_prompt: K.
        generator: draws completions.
        processes: of the run.
        watch: times the sampling.

    Returns:
        N lists of K completions, and the number of tokens drawn in this attempt, if the generator tells.
    """
    # Prompts of similar length are sampled together; which ones is settled before anything is sampled.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts.ids[number]))
    size = max(1, policy.sampling.batch_size // per_prompt)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    file = CompletionFile(context.work / "samples.jsonl", chunks, per_prompt, processes)
    if file.done:
        say(f"{file.done:,} completions were sampled before")
    if file.left:
        with policy.model():
            pass  # loads the weights, which is not sampling
    with (
        task("sampling completions", file.done + file.left, "completions", done=file.done) as bar,
        watch.phase("rollout", "sampling"),
    ):
        progress = Drawing(file.left, policy.sampling.max_new_tokens, bar)

        def draw(chunk: Sequence[int]) -> list[Completion]:
            requests = [
                Request(prompts.ids[number], seed_for(prompts.prompts[number], context.recipe.seed, k))
                for number in chunk
                for k in range(per_prompt)
            ]
            return generator.generate(policy, requests, progress=progress, stop=context.stop.check)

        file.fill(draw, context.stop.check)
    policy.release()
    return file.read(), progress.tokens


def columns_of_drawn(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    drawn: Iterable[tuple[Prompt, Sequence[Completion]]],
    *,
    policy: Policy | None,
    references: Mapping[str, Any],
) -> Columns:
    """Return what is known about completions besides their text; of equal texts of a prompt, about the first.

    Args:
        prompts: N prompts.
        texts: N completions of them.
        drawn: the completions of each prompt, as they were drawn.
        policy: that drew them; None if someone gave them, and then only references are known.
        references: see `references_of`.
    """
    if policy is None:
        return columns_of(prompts, references, None, None)
    known = {(prompt, completion.text): completion for prompt, group in drawn for completion in reversed(group)}
    chosen = [known[prompt, text] for prompt, text in zip(prompts, texts, strict=True)]
    return columns_of(prompts, references, chosen, partial(policy.decode, raw=True))
