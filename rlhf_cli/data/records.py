"""The record kinds every stage speaks in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["demonstration", "prompt", "preference", "ranking", "candidates"]

MARGINS = (0.0, 1 / 3, 2 / 3, 1.0)
"""`margin` of each of four degrees of strength, weakest first (Llama 2, table 27, small margins)."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]
"""Plain text, or a conversation that ends where an answer belongs."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the answer a model should give; plain text to learn from has the empty prompt.

    Attributes:
        place: `file:line` it came from, for messages about it; no part of what it is.
    """

    prompt: Prompt
    completion: str
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to answer.

    Attributes:
        place: `file:line` it came from.
    """

    prompt: Prompt
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Ranking:
    """K answers to one prompt in tiers, best first; a tier is a tie. A preference is a ranking of two.

    Attributes:
        prompt: what was asked.
        completions: K answers.
        tiers: indices into `completions`, each exactly once.
        margin: how much better the first tier is, where the labeler said so.
        annotator: who ranked, where the file says so.
        place: `file:line` it came from.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    tiers: tuple[tuple[int, ...], ...]
    margin: float | None = None
    annotator: str | None = None
    place: str = field(default="", compare=False)

    def levels(self) -> list[int]:
        """Tier of each completion, 0 the best: (K,)."""
        level = {index: tier for tier, members in enumerate(self.tiers) for index in members}
        return [level[index] for index in range(len(self.completions))]


@dataclass(frozen=True)
class Candidates:
    """Answers to one prompt that are to be ranked.

    Attributes:
        prompt: what was asked.
        completions: K answers, two or more.
        known: tiers where their order is known already (gold items, tests of judges).
        subset: part of the data it belongs to, where the file says so.
        place: `file:line` it came from.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    known: tuple[tuple[int, ...], ...] | None = None
    subset: str | None = None
    place: str = field(default="", compare=False)


Record = Demonstration | PromptRecord | Ranking | Candidates


def prompt_to_json(prompt: Prompt) -> str | list[dict[str, str]]:
    """The prompt as it stands in a JSONL file."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": message.role, "content": message.content} for message in prompt]


def prompt_text(prompt: Prompt) -> str:
    """The prompt as a reward function, a hash or a person sees it: plain text as it is, turns as `role: content`."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def prompt_key(prompt: Prompt) -> str:
    """Hash by which the same prompt is recognized everywhere: splits, seeds and caches."""
    # One user turn and plain text are the same question, and must fall on the same side of every split.
    is_question = not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].role == "user"
    plain = prompt_text(prompt) if is_question else prompt_to_json(prompt)
    text = json.dumps(plain, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_held_out(prompt: Prompt, share: float, seed: int) -> bool:
    """Whether a prompt belongs to the held-out share. Depends on prompt and seed alone, so that all stages agree."""
    digest = hashlib.sha256(f"holdout {seed} {prompt_key(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def seed_for(prompt: Prompt, seed: int, sample: int) -> int:
    """Seed of one answer: depends on prompt, run seed and the answer's number, not on its place in a batch."""
    digest = hashlib.sha256(f"sample {seed} {sample} {prompt_key(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes seeds below 2**63
