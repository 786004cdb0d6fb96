"""K completions per prompt, kept on disk while they are drawn: what `label` ranks and `best-of-n` chooses from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_cli.console import working
from rlhf_cli.data.records import Prompt, seed_for
from rlhf_cli.generation.generator import Completion, Generator, Request
from rlhf_cli.generation.progress import Drawing
from rlhf_cli.labeling.completions import CompletionFile
from rlhf_cli.progress import Task, say, task
from rlhf_cli.rewards.base import Columns, columns_of
from rlhf_cli.stages.base import StageContext
from rlhf_cli.training.timing import StepWatch

if TYPE_CHECKING:
    from rlhf_cli.distributed.process_group import ProcessGroup
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.prompts import TokenizedPrompts


Receive = Callable[[Mapping[int, list[Completion]]], object]
"""Takes number of prompt -> K completions that are on disk."""
_GROWTH = 4
"""Each of the first chunks of `early_chunks` has this many times the prompts of the one before."""


def draw_completions(
    context: StageContext[Any, Any],
    policy: Policy,
    prompts: TokenizedPrompts,
    per_prompt: int,
    *,
    generator: Generator,
    processes: ProcessGroup,
    watch: StepWatch,
    drawings: list[Drawing],
    numbers: Sequence[int] | None = None,
    is_early: bool = False,
    receive: Receive | None = None,
) -> list[list[Completion]]:
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
        drawings: what counts the tokens drawn is added before they are, so that it is known where sampling ends early.
        numbers: of the prompts to complete, ascending; None completes all N.
        is_early: draw a few completions first, see `early_chunks`; the same for all attempts of a stage.
        receive: called when some completions are on disk, and again for those of each further chunk; it is not called
            if all were sampled before. With one process only.

    Returns:
        K completions of each of these prompts.
    """
    from rlhf_cli.generation.weights_to_draw import weights_to_draw

    size = max(1, policy.sampling.batch_size // per_prompt)
    chosen = range(len(prompts)) if numbers is None else numbers
    in_chunks = (early_chunks if is_early else chunks_by_length)([len(prompts.ids[number]) for number in chosen], size)
    chunks = [[chosen[position] for position in chunk] for chunk in in_chunks]
    file = CompletionFile(context.work / "samples.jsonl", chunks, per_prompt, processes, range(len(prompts)))
    if file.done:
        say(f"{file.done:,} completions were sampled before")
        if receive is not None and file.left:
            receive(file.sampled())
    # A sharded policy is loaded and drawn from by all processes, also by those without prompts.
    draws = file.total > file.done if policy.is_sharded else file.left > 0
    if draws:
        _ = policy.source.folder_with_weights  # a download has bars of its own
        with working(f"loading {policy.source.path} ..."), policy.model():
            pass  # loads the weights, which is not sampling

    def draw(chunk: Sequence[int], progress: Drawing) -> list[Completion]:
        requests = _requests(prompts, chunk, per_prompt, context.recipe.seed)
        return generator.generate(policy, requests, progress=progress, stop=context.stop.check)

    def counted(count: int, bar: Task) -> Drawing:
        drawings.append(Drawing(count, policy.sampling.max_new_tokens, bar))
        return drawings[-1]

    with weights_to_draw(policy, generator) if draws else nullcontext(), watch.phase("rollout", "sampling"):
        if receive is not None and file.left and not file.done:
            first = file.next_chunk
            with task("sampling the first completions", len(first) * per_prompt, "completions") as bar:
                drawn = file.add(first, draw(first, counted(len(first) * per_prompt, bar)))
            receive(drawn)  # after the end of the bar: an interface may open now
        done, left = file.done, file.left
        with task("sampling completions", file.total, "completions", done=done, share=left) as bar:
            file.fill(partial(draw, progress=counted(left, bar)), receive or (lambda _: None))
    policy.release()
    return file.read()


def _requests(prompts: TokenizedPrompts, chunk: Sequence[int], per_prompt: int, seed: int) -> list[Request]:
    """Return K requests for each prompt of a chunk, each with a seed of its own."""
    return [
        Request(prompts.ids[number], seed_for(prompts.prompts[number], seed, k))
        for number in chunk
        for k in range(per_prompt)
    ]


def chunks_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return chunks of prompts that are sampled together: those of similar length, the shortest first.

    Args:
        lengths: tokens of N prompts.
        size: prompts per chunk.
    """
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    return [order[start : start + size] for start in range(0, len(order), size)]


def early_chunks(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return chunks for stages whose completions are used while others are sampled; see `chunks_by_length`.

    The first chunks have 1, 4, 16, ... prompts, in the order of the prompts. The others are full and of similar length;
    those with the earliest prompts come first, so that short prompts are not used before long ones.
    """
    chunks: list[list[int]] = []
    start, count = 0, 1
    while count < size and start < len(lengths):
        chunks.append(list(range(start, min(start + count, len(lengths)))))
        start, count = start + count, count * _GROWTH
    rest = chunks_by_length(lengths[start:], size)
    return chunks + sorted(([start + number for number in chunk] for chunk in rest), key=min)


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
