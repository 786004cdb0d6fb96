"""The kinds of records that all stages exchange."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["demonstration", "prompt", "preference", "ranking", "candidates"]

MARGINS = (0.0, 1 / 3, 2 / 3, 1.0)
"""`margin` of each of four degrees of strength, weakest first (Llama 2, table 27, small margins)."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        is_trained: False for a turn that the file excludes from training (`weight: 0`).
    """

    role: str
    content: str
    is_trained: bool = field(default=True, compare=False)


Prompt = str | tuple[Message, ...]
"""Plain text, or a conversation that ends where the completion begins."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the completion that a model should learn; plain text has the empty prompt.

    Attributes:
        location: `file:line` that it was read from, for messages; ignored when records are compared.
    """

    prompt: Prompt
    completion: str
    location: str = field(default="", compare=False)


@dataclass(frozen=True)
class PromptRecord:
    """A prompt without a completion.

    Attributes:
        location: `file:line` that it was read from.
        reference: the `reference` of the row, such as the known result, for reward functions; None if it has none.
    """

    prompt: Prompt
    location: str = field(default="", compare=False)
    reference: Any = field(default=None, hash=False)


@dataclass(frozen=True)
class Ranking:
    """K completions of one prompt in tiers, best first; a tier is a tie. A preference is a ranking of two.

    Attributes:
        prompt: the prompt of all completions.
        completions: K texts.
        tiers: indices into `completions`, each exactly once.
        margin: how much better the first tier is, if the annotator said so.
        annotator: who ranked, if the file says so.
        location: `file:line` that it was read from.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    tiers: tuple[tuple[int, ...], ...]
    margin: float | None = None
    annotator: str | None = None
    location: str = field(default="", compare=False)

    def levels(self) -> list[int]:
        """Tier of each completion, 0 the best: (K,)."""
        level = {index: tier for tier, members in enumerate(self.tiers) for index in members}
        return [level[index] for index in range(len(self.completions))]


@dataclass(frozen=True)
class Candidates:
    """Completions of one prompt that are to be ranked.

    Attributes:
        prompt: the prompt of all completions.
        completions: K texts, two or more.
        known: tiers, if their order is known already (gold items, tests of judges).
        subset: part of the data that it belongs to, if the file says so.
        location: `file:line` that it was read from.
        reference: see `PromptRecord`.
        cut_off: for each completion, the number of tokens after which it was cut off, or None if the policy ended it;
            empty if that is not known.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    known: tuple[tuple[int, ...], ...] | None = None
    subset: str | None = None
    location: str = field(default="", compare=False)
    reference: Any = field(default=None, hash=False)
    cut_off: tuple[int | None, ...] = ()


Record = Demonstration | PromptRecord | Ranking | Candidates


def prompt_to_json(prompt: Prompt) -> str | list[dict[str, str]]:
    """The prompt as JSON files hold it."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": message.role, "content": message.content} for message in prompt]


def messages_of(prompt: Prompt) -> tuple[Message, ...]:
    """The turns of a prompt: plain text is one of the user."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def prompt_text(prompt: Prompt) -> str:
    """The prompt as text for reward functions and people: plain text unchanged, turns as `role: content`."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def prompt_key(prompt: Prompt) -> str:
    """Hash that identifies a prompt in seeds and caches; splits go by `split_key`."""
    # One user turn and plain text are the same question.
    is_question = not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].role == "user"
    plain = prompt_text(prompt) if is_question else prompt_to_json(prompt)
    text = json.dumps(plain, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def references_of(records: Iterable[PromptRecord | Candidates]) -> dict[str, Any]:
    """Return prompt key -> `reference` of the records that have one; of equal prompts the first counts."""
    found: dict[str, Any] = {}
    for record in records:
        if record.reference is not None:
            found.setdefault(prompt_key(record.prompt), record.reference)
    return found


def split_key(prompt: Prompt) -> str:
    """Return 16 hexadecimal digits that identify the question of a prompt, for splits and their checks.

    The question is the first user turn, without differences of case, width and white space. So one question is on one
    side of every split, whatever system message, later turns or stray blanks come with it. A conversation without a
    user turn is its own question.
    """
    question = prompt_text(prompt)
    if not isinstance(prompt, str):
        question = next((message.content for message in prompt if message.role == "user"), question)
    plain = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return hashlib.sha256(f"question {plain}".encode()).hexdigest()[:16]


def seed_for(prompt: Prompt, seed: int, sample: int) -> int:
    """Seed of one completion: the first 63 bits of SHA-256 of "sample <seed> <sample> <prompt_key>".

    It does not depend on the completion's position in a batch, nor on the process that draws it.

    Args:
        prompt: the prompt.
        seed: of the run.
        sample: number that tells the completions of one prompt apart.
    """
    digest = hashlib.sha256(f"sample {seed} {sample} {prompt_key(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes seeds below 2**63
