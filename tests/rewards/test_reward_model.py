"""Reward models as rewards: anyone's classifier gives what transformers gives for the text, read in its own way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.data.records import Message
from rlhf_cli.errors import ModelError
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.rewards.reward_model import load_model_reward
from rlhf_cli.stages.ppo.rewards import build_rewards
from rlhf_cli.stages.ppo.settings import PPOSettings

PROMPTS = ["Why is the sky blue?", "The cat"]
ANSWERS = ["Because air scatters blue light.", ""]


@pytest.fixture(params=["tiny_gpt2", "tiny_llama", "tiny_bert"])
def classifier(request, tmp_path: Path) -> Path:
    """A model with one label as transformers saves it, which no file of ours describes."""
    base = request.getfixturevalue(request.param)
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with torch.no_grad():  # transformers draws weights too small to tell answers apart
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5)
    folder = tmp_path / "acme-reward"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def by_hand(folder: Path, prompt: str, answer: str) -> float:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if model.config.model_type == "bert":
        tokens = tokenizer(prompt, answer, return_tensors="pt")
    elif tokenizer.chat_template:  # the model's own format, though nobody asked for it
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        tokens = tokenizer(text + answer + tokenizer.eos_token, return_tensors="pt")
    else:  # as trained: prompt, answer, end token
        tokens = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**tokens).logits[0, 0].item()


def test_a_classifier_of_transformers_scores_text_as_transformers_does(classifier):
    reward = load_model_reward(ModelSource(str(classifier)), template=None)
    expected = [by_hand(classifier, *pair) for pair in zip(PROMPTS, ANSWERS, strict=True)]
    assert reward.score(PROMPTS, ANSWERS) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 0.02
    assert reward.name == "acme-reward"


def test_each_reward_reads_a_conversation_through_its_own_chat_template(tiny_llama, tmp_path):
    talk = (Message("user", "hi"),)
    folder = tmp_path / "other"
    save_to(folder, tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<<{{ m.content }}>>{% endfor %}"
    tokenizer.save_pretrained(folder)
    reward = load_model_reward(ModelSource(str(folder)), template="Never asked like this: {prompt}")
    plain = load_model_reward(ModelSource(str(folder)), template=None)
    # The template writes no turn-end token: the tokenizer's end token follows the content.
    assert reward.score([talk], ["yes"]) == pytest.approx(plain.score(["<<hi>>"], ["<<yes"]), abs=1e-6)
    assert reward.score([talk], ["yes"]) != pytest.approx(
        plain.score(["<|user|> hi\n<|assistant|> "], ["yes"]), abs=1e-6
    )


def test_a_model_with_two_labels_is_refused_by_name(tiny_bert, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2).save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match=r"two.* must have one label, got 2"):
        load_model_reward(ModelSource(str(tmp_path / "two")), template=None)


def test_no_file_of_a_reward_model_can_name_a_function(tiny_bert, tmp_path):
    folder = tmp_path / "rm"
    save_to(folder, tiny_bert)
    (folder / "evil.py").write_text("raise SystemExit('this ran')\n")
    card = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps(card | {"function": f"{folder}/evil.py:score"}))
    with pytest.raises(ModelError, match=r"reward\.json is damaged: .*'function'"):
        load_model_reward(ModelSource(str(folder)), template=None)


def save_to(folder: Path, base: Path) -> None:
    """One of our own reward models, untrained."""
    folder.mkdir()
    save_reward_model(new_reward_model(ModelSource(str(base)), template=None, lora=None), folder)


def test_the_rewards_of_a_recipe_are_built_in_its_order(tiny_bert, tiny_llama, tmp_path):
    save_to(tmp_path / "rm", tiny_bert)
    (tmp_path / "rate.py").write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    entries = [
        {"function": f"{tmp_path}/rate.py:length", "weight": -0.5},
        {"model": str(tmp_path / "rm")},
        {"url": "http://127.0.0.1:9/score"},
    ]
    model = load_model_reward(ModelSource(str(tmp_path / "rm")), template=None)
    settings = PPOSettings.model_validate({"rewards": entries})
    reward = build_rewards(settings, model, ModelSource(str(tiny_llama)), None)  # pyright: ignore[reportArgumentType]
    assert reward.names == ["reward-model", "rate.py:length", "rm", "127.0.0.1:9"]
    settings = PPOSettings.model_validate({"rewards": entries[:2], "reward_combination": "min"})
    scores = build_rewards(settings, None, ModelSource(str(tiny_llama)), None).score(PROMPTS, ANSWERS)
    assert scores.parts["rate.py:length"] == [32.0, 0.0]
    assert scores.parts["rm"] == pytest.approx(model.score(PROMPTS, ANSWERS), abs=1e-6)
    expected = [min(-0.5 * length, rm) for length, rm in zip([32.0, 0.0], scores.parts["rm"], strict=True)]
    assert scores.total == pytest.approx(expected, abs=1e-6)
