"""PPO against rewards of every kind, through the real command: what each is given, and what becomes of its answer."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from unittest import mock

import pytest
import torch

from rlhf_cli.cli import main
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from tests.loopback import serving

TEXTS = ["What is bread?", "Why is the sky blue?", "The cat sat", "First heat the oven", "A short answer"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return file


@pytest.fixture
def ppo(tiny_llama: Path, prompts: Path, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """`rlhf ppo` on a Llama, in this process: exit code and what it printed."""

    def run(*arguments: object, steps: int = 1, per_step: int = 4, rewards: list[dict] | None = None):
        settings = {
            "ppo.steps": steps, "ppo.prompts_per_step": per_step, "ppo.max_new_tokens": 6, "ppo.epochs": 1,
            "ppo.checkpoint_steps": 1, "data.holdout": 0, "model.precision": "float32", "model.threads": 1,
        }  # fmt: skip
        if rewards is not None:
            settings["ppo.rewards"] = json.dumps(rewards)
        sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        own = ("--run-dir", "runs/default")  # some tests run twice, and replace the first result
        command = ["rlhf", "ppo", "--model", tiny_llama, "--prompts", prompts, *own, *sets, *arguments]
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", list(map(str, command))),
            contextlib.chdir(tmp_path),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = main()
        return code, " ".join(err.getvalue().split())

    return run


@pytest.fixture
def metrics(tmp_path: Path) -> Callable[[], list[dict]]:
    return lambda: [json.loads(row) for row in (tmp_path / "runs/default/ppo/metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def reward_models(tiny_bert: Path, tiny_gpt2: Path, tmp_path: Path) -> dict[str, Path]:
    """Reward models with other tokenizers than the policy's: an encoder and a decoder."""
    folders = {}
    for name, base in (("bert", tiny_bert), ("gpt2", tiny_gpt2)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        reward_model = new_reward_model(ModelSource(str(base)), template=None, lora=None)
        torch.manual_seed(3)
        with torch.no_grad():  # new weights are too small to tell answers apart
            for parameter in reward_model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.5)
        save_reward_model(reward_model, folders[name])
    return folders


@dataclass
class Endpoint:
    """A server whose reward is the length of an answer: busy `refuse` times, and for good after so many `answers`.

    With `ends_us` it is busy for a minute and tells this process to end.
    """

    url: str = ""
    refuse: int = 0
    answers: int | None = None
    ends_us: bool = False
    tokens: list[str | None] = field(default_factory=list)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.tokens.append(self.headers["Authorization"])
            is_busy = state.refuse > 0 or state.answers == 0
            state.refuse -= is_busy
            if state.answers is not None:
                state.answers -= not is_busy
            body = json.dumps({"rewards": [float(len(text)) for text in request["completions"]]}).encode()
            self.send_response(503 if is_busy else 200)
            self.send_header("Content-Length", str(len(body)))
            if is_busy and state.ends_us:
                self.send_header("Retry-After", "60")
                os.kill(os.getpid(), signal.SIGTERM)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as address:
        state.url = f"{address}/score"
        yield state


def written(folder: Path, body: str) -> str:
    (folder / "rate.py").write_text("def score(prompts, completions):\n" + body)
    return f"{folder}/rate.py:score"


def test_ppo_with_a_function_and_an_http_endpoint(ppo, endpoint, tmp_path, monkeypatch, metrics):
    monkeypatch.setenv("REWARD_TOKEN", "sesame-open")
    endpoint.refuse = 1
    function = written(tmp_path, "    return [2.0 * len(c) for c in completions]\n")
    entries = [{"function": function, "weight": 0.25}, {"url": endpoint.url, "token_env": "REWARD_TOKEN"}]
    code, said = ppo(rewards=entries)
    assert code == 0, said
    (row,) = metrics()
    name = endpoint.url.split("/")[2]
    length = row[f"objective/scores/{name}"]
    assert length > 0
    assert row["objective/scores/rate.py:score"] == pytest.approx(2 * length, rel=1e-6)
    assert row["objective/scores"] == pytest.approx(0.25 * 2 * length + length, rel=1e-6)
    assert endpoint.tokens == ["Bearer sesame-open"] * 2
    assert "status 503 service unavailable" in said
    assert "sesame-open" not in said
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not [path for path in files if b"sesame-open" in path.read_bytes()]


def test_reward_models_with_other_tokenizers_score_the_text(ppo, reward_models, tmp_path, metrics):
    seen = tmp_path / "seen.json"
    recorder = written(
        tmp_path,
        f"    import json\n    json.dump([prompts, completions], open({str(seen)!r}, 'w'))\n"
        "    return [0.0] * len(prompts)\n",
    )
    code, said = ppo(
        "--reward-model", reward_models["bert"],
        rewards=[{"model": str(reward_models["gpt2"]), "weight": -2.0}, {"function": recorder}],
    )  # fmt: skip
    assert code == 0, said
    (row,) = metrics()
    asked, answers = json.loads(seen.read_text())
    assert set(asked) < set(TEXTS)
    means = {}
    for name, folder in reward_models.items():
        scores = load_reward_model(ModelSource(str(folder)), template=None).score(asked, answers)
        assert max(scores) - min(scores) > 0.02
        means[name] = sum(scores) / len(scores)
    assert row["objective/scores/reward-model"] == pytest.approx(means["bert"], abs=1e-4)
    assert row["objective/scores/gpt2"] == pytest.approx(means["gpt2"], abs=1e-4)
    assert row["objective/scores"] == pytest.approx(means["bert"] - 2 * means["gpt2"], abs=3e-4)


@pytest.mark.parametrize("combination", ["min", "mean-std"])
def test_an_ensemble_of_reward_models_is_combined_answer_by_answer(combination, ppo, reward_models, metrics):
    coefficient = ["--set", "ppo.reward_std_coef=0.5"] if combination == "mean-std" else []
    entries = [{"model": str(folder)} for folder in reward_models.values()]
    # One answer a step, so that the metrics are of single answers.
    code, said = ppo("--set", f"ppo.reward_combination={combination}", *coefficient, rewards=entries, per_step=1)
    assert code == 0, said
    (row,) = metrics()
    bert, gpt2 = row["objective/scores/bert"], row["objective/scores/gpt2"]
    assert abs(bert - gpt2) > 0.02
    expected = min(bert, gpt2) if combination == "min" else (bert + gpt2) / 2 - 0.5 * abs(bert - gpt2) / 2
    assert row["objective/scores"] == pytest.approx(expected, abs=1e-6)


def test_a_gold_reward_with_weight_0_is_logged_and_not_trained_on(ppo, tmp_path, metrics):
    function = written(tmp_path, "    return [2.0 * len(c) for c in completions]\n")
    (tmp_path / "gold.py").write_text("def score(prompts, completions):\n    return [-1.0] * len(prompts)\n")
    gold = {"function": f"{tmp_path}/gold.py:score", "weight": 0}
    code, said = ppo(rewards=[{"function": function}, gold])
    assert code == 0, said
    (row,) = metrics()
    assert row["objective/scores/gold.py:score"] == -1.0
    assert row["objective/scores"] == row["objective/scores/rate.py:score"]
    code, said = ppo(rewards=[gold])
    assert code == 2
    assert "every reward of `ppo.rewards` has weight 0" in said


def test_a_nan_leaves_its_step_out_and_names_the_sample(ppo, tmp_path, metrics):
    function = written(
        tmp_path,
        "    global calls\n    calls = globals().get('calls', 0) + 1\n"
        "    return [float('nan') if calls == 1 and n == 2 else float(len(c)) for n, c in enumerate(completions)]\n",
    )
    code, said = ppo(rewards=[{"function": function}], steps=2)
    assert code == 0, said
    assert (
        said.count("warning: the reward `rate.py:score` is not finite for 1 of 4 completions: nan for the prompt '")
        == 1
    )
    first, second = metrics()
    assert (first["skipped_steps"], second["skipped_steps"]) == (1.0, 0.0)
    assert math.isfinite(second["objective/scores"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    return [1 / (prompt != 'The cat sat') for prompt in prompts]\n", "ZeroDivisionError: division by zero"),
        ("    return [1.0 for p in prompts if p != 'The cat sat']\n", "returned 4 scores for 5 completions; 0 "),
        ("    return [None if p == 'The cat sat' else 1.0 for p in prompts]\n", "None, which is not a number"),
    ],
)
def test_a_broken_function_ends_with_65_and_names_the_sample(body, said, ppo, tmp_path):
    code, stderr = ppo(rewards=[{"function": written(tmp_path, body)}], per_step=5)
    assert code == 65
    assert "Traceback" not in stderr
    assert said in stderr
    assert f"{tmp_path}/rate.py:score" in stderr
    assert "for the prompt 'The cat sat' and the completion '" in stderr


def test_a_run_whose_endpoint_went_away_goes_on_from_its_checkpoint(ppo, endpoint, metrics):
    endpoint.answers = 1
    entry = {"url": endpoint.url, "retries": 0}
    code, said = ppo(rewards=[entry], steps=2)
    assert code == 65
    assert f"{endpoint.url}: status 503 service unavailable" in said
    endpoint.answers = None
    code, said = ppo(rewards=[entry], steps=2)
    assert code == 0, said
    assert len(endpoint.tokens) == 3  # step 1, the refusal, step 2
    assert len(metrics()) == 2


def test_a_signal_while_the_endpoint_is_away_ends_the_run_which_goes_on_from_its_checkpoint(ppo, endpoint, metrics):
    endpoint.answers, endpoint.ends_us = 1, True
    entry = {"url": endpoint.url, "retries": 1}
    code, said = ppo(rewards=[entry], steps=2)
    assert code == 143, said
    assert "resumes from the last checkpoint" in said
    endpoint.answers, endpoint.ends_us = None, False
    code, said = ppo(rewards=[entry], steps=2)
    assert code == 0, said
    assert len(endpoint.tokens) == 3  # step 1, the refusal, step 2
    assert len(metrics()) == 2
