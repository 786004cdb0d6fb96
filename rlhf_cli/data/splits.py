"""Splits by prompt: all records of one prompt are on the same side, in every stage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TypeVar

from rlhf_cli.data.records import Demonstration, Prompt, Record, is_held_out, prompt_key
from rlhf_cli.errors import DataError

AnyRecord = TypeVar("AnyRecord", bound=Record)


def split_by_prompt(records: Iterable[AnyRecord], share: float, seed: int) -> tuple[list[AnyRecord], list[AnyRecord]]:
    """Split records into those to train on and those held out.

    Plain text, which has no prompt, is split by the text itself; otherwise all of it would be on one side.

    Args:
        records: of any kind.
        share: of the prompts that is held out, from 0 to below 1; the share of the records is only close to it.
        seed: of the run.

    Raises:
        DataError: no records would be left to train on.
    """
    train: list[AnyRecord] = []
    held_out: list[AnyRecord] = []
    for record in records:
        key = record.completion if isinstance(record, Demonstration) and record.prompt == "" else record.prompt
        (held_out if is_held_out(key, share, seed) else train).append(record)
    if held_out and not train:
        raise DataError(
            f"all {len(held_out):,} records have prompts in the held-out share ({share:g}): none are left to train on",
            hint="use more prompts, or a smaller `--set data.holdout=...`",
        )
    return train, held_out


def validation_prompts(held_out: Iterable[Prompt], count: int, seed: int) -> list[Prompt]:
    """Held-out prompts for validation during training: at most `count`, and at most half of them.

    A policy that was selected by its rewards on some prompts must be evaluated on others, so the rest stays unseen. The
    choice depends only on the prompts and the seed.
    """

    def key(prompt: Prompt) -> bytes:
        return hashlib.sha256(f"validation {seed} {prompt_key(prompt)}".encode()).digest()

    ordered = sorted(held_out, key=key)
    return ordered[: min(count, len(ordered) // 2)]
