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
        "from math import fsum as score",
        "from json import loads as score",
        "from math import *",
        "from . import score",
        "def score(prompts, *more): ...",
        "@decorated\ndef score(): ...",
        "import sys\nsys.path.append('here')\nimport elsewhere\nscore = elsewhere.score",
        "try:\n    from elsewhere import score\nexcept ImportError:\n    def score(): ...",
        "if True:\n    def score(): ...",
        "globals()['score'] = len",
        "def __getattr__(name): ...",
        "raise SystemExit('never run')\ndef score(prompts, completions): ...",
    ],
)
def test_a_name_that_may_be_defined_passes(source, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(source)
    check_defined(file, "score", "ppo.rewards.0.function", arguments=2)


def test_a_module_that_is_not_installed_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('"""Mine."""\nimport json\nfrom elsewhere.deep import that\ndef score(prompts, completions): ...\n')
    with pytest.raises(UsageError, match=r"mine\.py:3: no Python module `elsewhere`") as caught:
        check_defined(file, "score", "ppo.rewards.0.function")
    assert "install it" in str(caught.value.hint)


def test_a_function_with_too_few_arguments_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(prompts): ...\n")
    with pytest.raises(UsageError, match=r"mine\.py:1: `score` takes 1 of the 2 arguments") as caught:
        check_defined(file, "score", "ppo.rewards.0.function", arguments=2)
    assert caught.value.hint == "define it as `def score(prompts, completions):`"
    check_defined(file, "score", "model.attention")


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
