"""The check of which names a Python file defines, without running it."""

from __future__ import annotations

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.pipeline.python_source import check_defined


@pytest.mark.parametrize(
    "source",
    [
        "def score(prompts, completions): ...",
        "async def score(): ...",
        "score = lambda prompts, completions: []",
        "from elsewhere import score",
        "from elsewhere import other as score",
        "from elsewhere import *",
        "if True:\n    def score(): ...",
        "globals()['score'] = len",
        "def __getattr__(name): ...",
        "raise SystemExit('never run')\ndef score(): ...",
    ],
)
def test_a_name_that_may_be_defined_passes(source, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(source)
    check_defined(file, "score", "ppo.rewards.0.function")


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("def scores(): ...", "has no function `score` (`ppo.rewards.0.function`)", "did you mean `scores`?"),
        ("def zebra(): ...", "has no function `score`", "it defines: zebra"),
        ("", "has no function `score`", None),
        ("def score(:", "mine.py:1: ", None),
    ],
)
def test_a_name_that_cannot_be_defined_is_refused(source, message, hint, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(UsageError) as caught:
        check_defined(file, "score", "ppo.rewards.0.function")
    assert message in caught.value.message
    assert caught.value.hint == hint
