"""Splits by prompt: all that belongs to one prompt is on the same side, in every stage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TypeVar

from rlhf_cli.data.records import Demonstration, Prompt, Record, is_held_out, prompt_key
from rlhf_cli.errors import DataError

AnyRecord = TypeVar("AnyRecord", bound=Record)


def split_by_prompt(records: Iterable[AnyRecord], share: float, seed: int) -> tuple[list[AnyRecord], list[AnyRecord]]:
    """Records to train on, and those held out.

    Plain text, which has no prompt, goes by the text itself: else all of it would fall on one side.

    Args:
        records: of any kind.
        share: of prompts, 0 to below 1; the share of records is near it, not equal to it.
        seed: of the run.

    Raises:
        DataError: nothing would be left to train on.
    """
    train: list[AnyRecord] = []
    held_out: list[AnyRecord] = []
    for record in records:
        by = record.completion if isinstance(record, Demonstration) and record.prompt == "" else record.prompt
        (held_out if is_held_out(by, share, seed) else train).append(record)
    if held_out and not train:
        raise DataError(
            f"all {len(held_out):,} records have prompts in the held-out share ({share:g}): none is left to train on",
            hint="give more prompts, or a smaller `--set data.holdout=...`",
        )
    return train, held_out


def validation_prompts(held_out: Iterable[Prompt], count: int, seed: int) -> list[Prompt]:
    """Held-out prompts that are looked at while training: at most `count`, and at most half of them.

    A policy that was chosen for its rewards on some prompts must be judged on others, so the rest stays unseen. Which
    ones depends on the prompts and the seed alone.
    """

    def key(prompt: Prompt) -> bytes:
        return hashlib.sha256(f"validation {seed} {prompt_key(prompt)}".encode()).digest()

    ordered = sorted(held_out, key=key)
    return ordered[: min(count, len(ordered) // 2)]
