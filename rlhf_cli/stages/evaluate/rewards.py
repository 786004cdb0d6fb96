"""Rewards of completions, on the scale that PPO saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.generation.generator import Completion
from rlhf_cli.models.reward_model.members import further_members
from rlhf_cli.progress import say_once, task
from rlhf_cli.stages.common import load_reward_model, model_source
from rlhf_cli.stages.evaluate.scores import ScoreFile, share_of_chunks
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.inputs import source_of

if TYPE_CHECKING:
    from rlhf_cli.data.records import Prompt

_CHUNK = 256
"""Completions whose rewards are written to disk at once."""


def rewarded(
    context: EvaluateContext,
    prompts: Sequence[Prompt],
    *sides: Sequence[Completion],
    processes: ProcessGroup,
    file: ScoreFile | None = None,
) -> list[list[float]] | None:
    """Return the normalized rewards of each side's completions; None if there is no reward model.

    All processes call this, and score a share each.

    Of an ensemble it takes the first member, and says so.

    Args:
        context: of the stage.
        prompts: N prompts.
        sides: N completions each.
        processes: of the run.
        file: keeps the rewards of finished chunks; None keeps none.
    """
    from rlhf_cli.memory import free_memory

    if (path := source_of(context.inputs.reward_model)) is None:
        return None
    if further_members(model_source(context.recipe, path).folder):
        say_once("evaluate: rewards are those of the first member of the reward model, not of all that PPO combined")
    texts = [(prompt, side[row].text) for side in sides for row, prompt in enumerate(prompts)]
    scores = _rewards(context, path, texts, file, processes)
    free_memory()
    return [scores[start : start + len(prompts)] for start in range(0, len(texts), len(prompts))]


def _rewards(
    context: EvaluateContext,
    path: str,
    texts: Sequence[tuple[Prompt, str]],
    file: ScoreFile | None,
    processes: ProcessGroup,
) -> list[float]:
    """Return the normalized rewards of (prompt, completion); the reward model is in memory meanwhile."""
    reward_model = load_reward_model(context, path, policy=context.inputs.baseline.source)
    left = len(texts) if file is None else file.lacks(len(texts))
    chunk = max(len(texts), 1) if file is None else _CHUNK
    own = share_of_chunks(processes, left, chunk)
    with task("rewards", len(texts), "completions", done=len(texts) - left, share=own) as bar:

        def share(rows: list[int]) -> list[float]:
            prompts, completions = [texts[row][0] for row in rows], [texts[row][1] for row in rows]
            return reward_model.score(prompts, completions, progress=bar.advance)

        def score(rows: list[int]) -> list[float]:
            return processes.map(rows, share)

        if file is None:
            return score(list(range(len(texts))))
        return file.fill(len(texts), score, chunk=_CHUNK, before_chunk=context.stop.check)
