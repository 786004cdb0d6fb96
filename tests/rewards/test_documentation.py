"""docs/rewards.md: its recipe is one, its function scores, its server answers our requests."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ruamel.yaml import YAML

from rlhf_cli.rewards.http_endpoint import HTTPReward
from rlhf_cli.rewards.python_function import load_scoring_function
from rlhf_cli.settings.rewards import PPORewardSettings
from rlhf_cli.stages.ppo.settings import PPOSettings
from tests.loopback import serving

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_recipe_is_one():
    (block,) = blocks("yaml")
    settings = PPOSettings.model_validate(YAML(typ="safe").load(block)["ppo"])
    assert [bool(entry.function or entry.model or entry.url) for entry in settings.rewards] == [True] * 3


def test_the_function_scores(tmp_path):
    (tmp_path / "brevity.py").write_text(blocks("python")[0])
    assert load_scoring_function(f"{tmp_path}/brevity.py:score").score(["p", "q"], ["one two", ""]) == [-0.02, 0.0]


def test_the_function_with_references_scores(tmp_path):
    (tmp_path / "exact.py").write_text(blocks("python")[1])
    scorer = load_scoring_function(f"{tmp_path}/exact.py:score")
    assert scorer.score(["p", "q"], [" 4", "5"], {"references": ["4", "6"]}) == [1.0, 0.0]


def test_the_server_is_sent_and_answers_what_the_page_says(tmp_path):
    namespace: dict = {"__name__": "server"}
    exec(compile(blocks("python")[2], "server.py", "exec"), namespace)
    seen = []
    inner = namespace["rewards"]
    namespace["rewards"] = lambda prompts, completions: (
        seen.append((prompts, completions)) or inner(prompts, completions)
    )
    namespace["Handler"].log_message = lambda *arguments: None
    with serving(namespace["Handler"]) as address:
        reward = HTTPReward(PPORewardSettings(url=f"{address}/score", retries=0))
        assert reward.score(["p", "q"], ["x" * 80, ""]) == [0.0, -1.0]
    assert seen == [(["p", "q"], ["x" * 80, ""])]
    request, answer = map(json.loads, blocks("json"))
    assert request.keys() == {"version", "prompts", "completions"}
    assert len(request["prompts"]) == len(request["completions"]) == len(answer["rewards"])
