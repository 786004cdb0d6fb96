"""K answers to every prompt, drawn from the policy: what the `label` stage ranks unless it is given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cli.data.records import Candidates, seed_for
from rlhf_cli.data.skips import SkipLog
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.labeling.completions import Answer, AnswerFile
from rlhf_cli.labeling.session.types import COMPLETION_LETTERS
from rlhf_cli.progress import say, task, warn
from rlhf_cli.stages.common import load_prompts, model_source, prompt_format
from rlhf_cli.stages.inputs import present
from rlhf_cli.stages.label.stage import LabelContext

if TYPE_CHECKING:
    from rlhf_cli.stages.label.settings import LabelSettings


MAX_COMPLETIONS = len(COMPLETION_LETTERS)
ALL_EQUAL = "all answers are equal"
"""Why a prompt is left out."""


@dataclass(frozen=True)
class Sampled:
    """Answers to rank.

    Attributes:
        candidates: one a prompt.
        completions: how each was drawn, in the same order; empty where they were given and not drawn.
        skips: records left out.
        processes: those of the run.
    """

    candidates: list[Candidates]
    completions: list[list[Answer]]
    skips: SkipLog
    processes: ProcessGroup


def given_answers(context: LabelContext, settings: LabelSettings) -> Sampled:
    """The answers of `label.items`; imports no torch unless a model is to judge them."""
    from rlhf_cli.data.sources import read_records

    device = None
    if settings.loads_model:
        from rlhf_cli.models.loading import resolve_device

        device = resolve_device(context.recipe.model.device)
    data = context.recipe.data
    loaded = read_records(
        present(context.inputs.items), "candidates", columns=data.columns, max_skip=data.max_skip, keep_blank=True
    )
    for warning in loaded.warnings:
        warn(warning)
    return Sampled(loaded.records, [], loaded.skips, ProcessGroup(device))


def sample_answers(context: LabelContext, settings: LabelSettings) -> Sampled:
    """K answers to every prompt, held-out ones too: train-rm measures its accuracy on their rankings."""
    from rlhf_cli.generation.torch_generator import decode, sample, stop_ids
    from rlhf_cli.models.loading import load_policy, load_tokenizer
    from rlhf_cli.precision import autocast

    recipe, sampling, per_prompt = context.recipe, settings.sampling, settings.completions_per_prompt
    source = model_source(recipe, present(context.inputs.policy))
    tokenizer = load_tokenizer(source)
    model = load_policy(source)
    form = prompt_format(recipe, source, tokenizer)
    prompts = load_prompts(context, form, model.config, max_new_tokens=sampling.max_new_tokens)
    eos_ids = stop_ids(model, tokenizer)
    processes = ProcessGroup(source.device)
    # Prompts of like length are sampled together; which ones is settled before anything is sampled.
    order = sorted(range(len(prompts.ids)), key=lambda number: len(prompts.ids[number]))
    size = max(1, sampling.batch_size // per_prompt)
    file = AnswerFile(
        context.work / "samples.jsonl",
        [order[start : start + size] for start in range(0, len(order), size)],
        per_prompt,
        processes,
    )
    if file.done:
        say(f"{file.done:,} answers were sampled before")
    with task("sampling answers", file.done + file.left, "answers", done=file.done) as bar:

        def draw(chunk: Sequence[int]) -> list[Answer]:
            rows = [(number, k) for number in chunk for k in range(per_prompt)]
            with autocast(source.device, source.precision):
                drawn = sample(
                    model,
                    [prompts.ids[number] for number, _ in rows],
                    [seed_for(prompts.prompts[number], recipe.seed, k) for number, k in rows],
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    eos_ids=eos_ids,
                    batch_size=sampling.batch_size,
                    progress=bar.advance,
                )
            return [
                Answer(number, decode(tokenizer, one.ids), len(one.ids), one.ended)
                for (number, _), one in zip(rows, drawn, strict=True)
            ]

        file.fill(draw, context.stop.check)
    answers = file.read()
    candidates = [
        Candidates(prompt, tuple(answer.text for answer in group))
        for prompt, group in zip(prompts.prompts, answers, strict=True)
    ]
    return Sampled(candidates, answers, prompts.skips, processes)


def distinct(candidates: Candidates) -> Candidates:
    """The same with each text once; an order that is known is kept, by each text's best place."""
    texts = list(dict.fromkeys(candidates.completions))
    if len(texts) == len(candidates.completions):
        return candidates
    tiers: list[tuple[int, ...]] = []
    placed: set[int] = set()
    for tier in candidates.known or ():
        numbers = {texts.index(candidates.completions[index]) for index in tier} - placed
        placed |= numbers
        tiers += [tuple(sorted(numbers))] if numbers else []
    known = None if candidates.known is None else tuple(tiers)
    return Candidates(candidates.prompt, tuple(texts), known, candidates.subset, candidates.location)


def check_count(candidates: Candidates) -> None:
    """Raise `DataError` for more answers than there are letters to name them by."""
    if (count := len(candidates.completions)) > MAX_COMPLETIONS:
        raise DataError(
            f"{candidates.location or 'an item'} has {count} completions; at most {MAX_COMPLETIONS} can be ranked",
            hint="reduce them, or set `label.active_learning.completions`",
        )
