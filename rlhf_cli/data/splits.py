"""Splits by prompt: all records of one question are on the same side, in every stage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from rlhf_cli.data.records import Demonstration, Prompt, Record, prompt_key, split_key
from rlhf_cli.errors import DataError

AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class Split:
    """Which prompts are held out from training: a function of share, seed and the prompt's `split_key` alone.

    Attributes:
        holdout: share of the prompts, from 0 to below 1. The prompts of a smaller share are among those of a larger.
        seed: of the choice.
    """

    holdout: float
    seed: int

    def holds_out(self, prompt: Prompt) -> bool:
        """Whether a prompt is held out."""
        return self.holds_out_key(split_key(prompt))

    def holds_out_key(self, key: str) -> bool:
        """Whether the prompts with this `split_key` are held out.

        They are if the first 64 bits of SHA-256 of "holdout <seed> <key>", as a share of 2^64, are below `holdout`.
        """
        digest = hashlib.sha256(f"holdout {self.seed} {key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.holdout * 2**64

    def divide(self, records: Iterable[AnyRecord]) -> tuple[list[AnyRecord], list[AnyRecord]]:
        """Divide records into those to train on and those held out.

        Raises:
            DataError: no records would be left to train on.
        """
        train: list[AnyRecord] = []
        held_out: list[AnyRecord] = []
        for record in records:
            (held_out if self.holds_out(question(record)) else train).append(record)
        if held_out and not train:
            raise DataError(
                f"all {len(held_out):,} records have prompts in the held-out share ({self.holdout:g}): none are left "
                "to train on",
                hint="use more prompts, or a smaller `--set data.holdout=...`",
            )
        return train, held_out


def question(record: Record) -> Prompt:
    """Return what a record is split by: its prompt; of plain text, which has no prompt, the text itself."""
    return record.completion if isinstance(record, Demonstration) and record.prompt == "" else record.prompt


def validation_prompts(held_out: Iterable[Prompt], count: int, seed: int) -> list[Prompt]:
    """Held-out prompts for validation during training: at most `count`, and at most half of them.

    A policy that was selected by its rewards on some prompts must be evaluated on others, so the rest stays unseen. The
    choice depends only on the prompts and the seed.
    """

    def key(prompt: Prompt) -> bytes:
        return hashlib.sha256(f"validation {seed} {prompt_key(prompt)}".encode()).digest()

    ordered = sorted(held_out, key=key)
    return ordered[: min(count, len(ordered) // 2)]
