"""Functions as rewards: found by path or name, checked on every call, errors that name function and sample."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest

from rlhf_cli.data.records import Message
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.rewards.python_function import load_scoring_function
from rlhf_cli.rewards.validation import finite_scores


def written(folder: Path, body: str, name: str = "reward.py") -> str:
    (folder / name).write_text(body)
    return f"{folder / name}:score"


def test_a_file_is_loaded_and_hashed(tmp_path: Path):
    spec = written(tmp_path, "def score(prompts, completions):\n    return [len(c) for c in completions]\n")
    function = load_scoring_function(spec)
    assert function.score(["a", "b"], ["xx", ""]) == [2.0, 0.0]
    assert all(type(score) is float for score in function.score(["a"], ["xx"]))
    assert function.path == tmp_path / "reward.py"
    assert function.digest == hashlib.sha256((tmp_path / "reward.py").read_bytes()).hexdigest()


def test_two_files_of_one_name_stay_apart(tmp_path: Path):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder, f"def score(prompts, completions):\n    return [{value}] * len(completions)\n")
    first, second = (load_scoring_function(f"{tmp_path / name}/reward.py:score") for name in "ab")
    assert (first.score(["p"], ["c"]), second.score(["p"], ["c"])) == ([1.0], [2.0])


def test_a_module_is_found_by_its_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_rewards").mkdir()
    written(tmp_path / "my_rewards", "def score(p, c):\n    return [0.5] * len(c)\n", "short.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    function = load_scoring_function("my_rewards.short:score")
    assert function.score(["p"], ["c"]) == [0.5]
    assert function.path == tmp_path / "my_rewards" / "short.py"


@pytest.mark.parametrize("kind", ["numpy", "torch", "bool", "int"])
def test_any_kind_of_number_will_do(kind: str, tmp_path: Path):
    body = {
        "numpy": "import numpy\ndef score(p, c):\n    return numpy.array([1.5] * len(c), dtype='float32')\n",
        "torch": "import torch\ndef score(p, c):\n    return torch.full((len(c),), 1.5)\n",
        "bool": "def score(p, c):\n    return [True] * len(c)\n",
        "int": "def score(p, c):\n    return tuple([3] * len(c))\n",
    }[kind]
    expected = {"numpy": 1.5, "torch": 1.5, "bool": 1.0, "int": 3.0}[kind]
    assert load_scoring_function(written(tmp_path, body)).score(["p", "q"], ["c", "d"]) == [expected, expected]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", r"returned 1 scores for 2 completions"),
        ("[1.0, 2.0, 3.0]", r"returned 3 scores for 2 completions"),
        ("[1.0, '2.0']", r"returned '2\.0', which is not a number, for the prompt 'q'"),
        ("[1.0, None]", r"returned None, which is not a number"),
        ("[1.0, [2.0]]", r"returned \[2\.0\], which is not a number"),
        ("None", r"returned None, not a list of scores"),
        ("'12'", r"returned '12', not a list of scores"),
        ("1.0", r"returned 1\.0, not a list of scores"),
        ("{0: 1.0, 1: 2.0}", r"returned \{0: 1\.0, 1: 2\.0\}, not a list of scores"),
        ("1 / 0", r"raised ZeroDivisionError: division by zero \(.*reward\.py:2\), for the prompt 'p'"),
        ("(_ for _ in ())", r"returned <generator object .*, not a list of scores"),
        ("__import__('numpy').zeros((2, 1))", r"returned array\(\[0\.\]\), which is not a number, for the prompt 'p'"),
    ],
)
def test_a_wrong_answer_names_function_and_sample(returned: str, message: str, tmp_path: Path):
    function = load_scoring_function(written(tmp_path, f"def score(prompts, completions):\n    return {returned}\n"))
    with pytest.raises(DataError, match=message) as caught:
        function.score(["p", "q"], ["alpha" * 50, "beta"])
    assert "reward.py:score" in caught.value.message
    assert len(caught.value.message) < 400  # a long completion is shortened


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0, float('nan')]", r"returned nan, which is not finite, for the prompt 'q' and the completion 'beta'"),
        ("[float('-inf'), 0.0]", r"returned -inf, which is not finite, for the prompt 'p' and the completion 'alpha"),
        ("[1.0, 10 ** 400]", r"returned inf, which is not finite, for the prompt 'q'"),
    ],
)
def test_nan_is_handed_on_and_refused_where_only_numbers_will_do(returned: str, message: str, tmp_path: Path):
    function = load_scoring_function(written(tmp_path, f"def score(prompts, completions):\n    return {returned}\n"))
    samples = ["p", "q"], ["alpha" * 50, "beta"]
    assert [math.isfinite(score) for score in function.score(*samples)].count(False) == 1
    with pytest.raises(DataError, match=message):
        finite_scores(function, *samples)


BRITTLE = """def score(prompts, completions):
    return [
        len(prompt) / len(completion)
        for prompt, completion in zip(prompts, completions)
    ]
"""


def test_an_exception_names_the_first_sample_that_raises_and_the_line(tmp_path: Path):
    function = load_scoring_function(written(tmp_path, BRITTLE))
    with pytest.raises(DataError) as caught:
        function.score(["one", "two", "three", "four"], ["a", "b", "", ""])
    assert "raised ZeroDivisionError: division by zero" in caught.value.message
    assert f"({tmp_path / 'reward.py'}:3)" in caught.value.message
    assert "for the prompt 'three' and the completion ''" in caught.value.message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_that_no_sample_raises_alone_says_so(tmp_path: Path):
    body = "def score(p, c):\n    if len(c) > 2:\n        raise MemoryError('too many')\n    return [0.0] * len(c)\n"
    function = load_scoring_function(written(tmp_path, body))
    with pytest.raises(
        DataError, match=r"MemoryError: too many \(.*:3\); it does not raise if called with each of the 3 samples alone"
    ):
        function.score(["a", "b", "c"], ["x", "y", "z"])


def test_a_wrong_number_of_scores_names_the_first_sample_that_gets_other_than_one(tmp_path: Path):
    body = "def score(prompts, completions):\n    return [float(len(c)) for c in completions if c]\n"
    function = load_scoring_function(written(tmp_path, body))
    said = r"returned 2 scores for 4 completions; 0 for the prompt 'two' and the completion '' alone"
    with pytest.raises(DataError, match=said):
        function.score(["one", "two", "three", "four"], ["a", "", "c", ""])


def test_a_function_that_exits_is_an_error_and_no_success(tmp_path: Path):
    function = load_scoring_function(written(tmp_path, "import sys\ndef score(p, c):\n    sys.exit(0)\n"))
    with pytest.raises(DataError, match=r"raised SystemExit: 0 \(.*:3\), for the prompt 'p'"):
        function.score(["p"], ["c"])


def test_a_conversation_reaches_a_function_as_text(tmp_path: Path):
    body = "def score(p, c):\n    return [float(p == ['system: be kind\\n\\nuser: hi', 'plain', 'one'])] * len(c)\n"
    talk = (Message("system", "be kind"), Message("user", "hi"))
    function = load_scoring_function(written(tmp_path, body))
    assert function.score([talk, "plain", (Message("user", "one"),)], ["a", "b", "c"]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reward.py", "does not name a function"),
        ("reward.py:", "does not name a function"),
        (":score", "does not name a function"),
        ("nowhere.py:score", r"there is no file nowhere\.py"),
        ("no_such_package.module:score", "no module `no_such_package`"),
        ("{file}:missing", "has no function `missing`"),
        ("{file}:CONSTANT", "must be a function, got int"),
        ("{broken}:score", r"cannot be loaded: SyntaxError: .*broken\.py:2"),
        ("{raising}:score", r"cannot be loaded: RuntimeError: no \(.*raising\.py:1\)"),
    ],
)
def test_what_cannot_be_loaded_is_named(spec: str, message: str, tmp_path: Path):
    written(tmp_path, "CONSTANT = 3\ndef score(p, c):\n    return [0.0]\n", "fine.py")
    written(tmp_path, "def score(p, c):\n    return [\n", "broken.py")
    written(tmp_path, "raise RuntimeError('no')\n", "raising.py")
    places = {"file": "fine.py", "broken": "broken.py", "raising": "raising.py"}
    with pytest.raises(UsageError, match=message):
        load_scoring_function(spec.format(**{key: tmp_path / name for key, name in places.items()}))


def test_the_function_cannot_change_what_is_scored(tmp_path: Path):
    body = "def score(p, c):\n    scores = [float(len(x)) for x in c]\n    c.clear()\n    return scores\n"
    completions = ["one", "three"]
    assert load_scoring_function(written(tmp_path, body)).score(["p", "q"], completions) == [3.0, 5.0]
    assert completions == ["one", "three"]
