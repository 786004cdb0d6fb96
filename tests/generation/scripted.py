"""A generator without a model: what it says depends on the seed of each request alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf_cli.generation.generator import Completion, Progress, Request, ignore
from rlhf_cli.generation.policy import Policy

LINES = ("Bread is baked.", "The sky is blue.", "a", "The cat sat on the warm stone.")


class ScriptedGenerator:
    """Draws one of `LINES` per request; implements `Generator`."""

    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        progress: Progress = ignore,
        stop: Callable[[], object] = lambda: None,
    ) -> list[Completion]:
        """See `Generator.generate`."""
        lines = [LINES[request.seed % len(LINES)] for request in requests]
        progress(len(lines))
        stop()
        return [Completion(policy.format.completion_ids(line), line, finished=True) for line in lines]
