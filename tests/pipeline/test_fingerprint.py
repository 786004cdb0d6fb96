"""What an artifact's fingerprint depends on."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_cli.pipeline.fingerprint import fingerprint

IDENTITY: dict[str, Any] = {"stage": "sft", "settings": {"sft.epochs": 1.0}, "inputs": {"base": "abc"}, "upstream": {}}


def changed(**settings: object) -> str:
    return fingerprint(IDENTITY | {"settings": IDENTITY["settings"] | settings})


def test_an_optional_setting_that_a_later_version_adds_leaves_artifacts_as_they_are():
    assert changed(new=None) == fingerprint(IDENTITY)


@pytest.mark.parametrize("value", [0, False, "", [], {}])
def test_every_other_value_counts(value):
    assert changed(new=value) != fingerprint(IDENTITY)
    assert changed(**{"sft.epochs": None}) != fingerprint(IDENTITY)
