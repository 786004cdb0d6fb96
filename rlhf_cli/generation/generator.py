"""The `Generator` protocol: what draws completions from a policy. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rlhf_cli.generation.policy import Policy


@dataclass(frozen=True)
class Request:
    """One completion to draw.

    Attributes:
        prompt_ids: token ids of the prompt, at least one.
        seed: of the random numbers of this completion.
    """

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """What a policy wrote after a prompt.

    Attributes:
        ids: token ids, including the stop token if there is one.
        text: the same as text, without special tokens.
        finished: True if the policy ended it with a stop token, False if it reached `max_new_tokens`.
        logprobs: log-probability of each token in nats, under the distribution that the generator drew it from; None if
            that is by construction the distribution that scoring computes.
    """

    ids: list[int]
    text: str
    finished: bool
    logprobs: list[float] | None = None


class Progress(Protocol):
    """Is told how far generation is."""

    def __call__(self, completions: int, tokens: int = 0, lengths: Sequence[int] | None = None, /) -> object:
        """Take what was drawn since the last call.

        Args:
            completions: completions that ended, which may be 0.
            tokens: tokens of all completions; 0 where a generator knows only the completions.
            lengths: tokens of each completion that ended, of a generator that draws one token of each row per call;
                None for others.
        """


def ignore(completions: int, tokens: int = 0, lengths: Sequence[int] | None = None, /) -> None:
    """Tell nobody; the default `Progress`."""


class Generator(Protocol):
    """Draws completions. Stages take any object with this method; `TorchGenerator` is the default."""

    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        progress: Progress = ignore,
        stop: Callable[[], object] = lambda: None,
    ) -> list[Completion]:
        """Draw one completion per request.

        A completion depends on the policy, its prompt and its seed alone: not on the other requests, on the batch size
        or on how requests are divided among processes.

        Args:
            policy: the model that writes, with its stop tokens and sampling settings.
            requests: N requests, in any order; possibly none, where others share the work.
            progress: called after every token of the batch, with what was drawn since the last call.
            stop: every generator has to call it often, best after every token, since nothing else stops sampling
                between two chunks; may raise, and then the batch is lost.

        Returns:
            N completions, in the order of `requests`.
        """
        ...
