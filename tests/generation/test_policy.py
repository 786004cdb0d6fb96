"""`Policy`: what ends a completion, how long a prompt may be, when weights are in memory."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli.data.splits import Split
from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.generation.contract import Contract
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.logprobs import Projection
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import PromptStyle
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.settings.shared import SamplingSettings
from tests.chat_templates import BY_NAME


def load(folder: Path, **options) -> Policy:
    return Policy.load(ModelSource(str(folder)), options.pop("sampling", Sampling()), **options)


def test_stop_tokens_are_the_tokenizer_s_the_model_s_and_those_that_are_given(tiny_llama):
    model = load_policy(ModelSource(str(tiny_llama)))
    model.generation_config.eos_token_id = [7, 8]
    policy = load(tiny_llama, weights=lambda: nullcontext(model), sampling=Sampling(stop_tokens=("?",)))
    tokenizer = policy.format.tokenizer
    assert policy.stop_ids == {tokenizer.eos_token_id, 7, 8, tokenizer("?").input_ids[0]}


def test_a_chat_s_turn_end_token_stops_sampling(tmp_path, monkeypatch):
    """Gemma's generation ends turns with another token than the tokenizer's end token."""
    policy = load(BY_NAME["Gemma 2"].model(tmp_path), style=PromptStyle("chat"), sampling=Sampling(max_new_tokens=5))
    tokenizer = policy.format.tokenizer
    turn_end, end = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    assert policy.stop_ids == {turn_end, end}
    logits = Projection.logits  # of a head that writes nothing else
    only = torch.tensor([turn_end])
    monkeypatch.setattr(Projection, "logits", lambda *hidden: logits(*hidden).zero_().index_fill(-1, only, 99.0))
    (completion,) = TorchGenerator().generate(policy, [Request(policy.prompt_ids("Hi"), 0)])
    assert completion.ids == [turn_end]
    assert completion.finished
    assert policy.decode(completion.ids) == ""


def test_a_stop_token_of_the_contract_can_be_dropped_though_the_generation_config_lists_it(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "written")
    own = load(tiny_llama).stop_ids
    path = tmp_path / "written" / "generation_config.json"
    (stop,) = load(tiny_llama).format.tokenizer("?").input_ids
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [*own, stop]}))
    assert load(tmp_path / "written").stop_ids == own | {stop}, "of a third-party model"
    Contract(None, {}, SamplingSettings(stop_tokens=["?"]), Split(0.1, 0)).write(tmp_path / "written")
    assert load(tmp_path / "written").stop_ids == own
    assert load(tmp_path / "written", sampling=Sampling(stop_tokens=("?",))).stop_ids == own | {stop}


def test_a_stop_token_that_is_none_is_refused_before_weights_are_read(tiny_llama):
    with pytest.raises(UsageError, match=r"'no such token' is \d+ tokens of") as caught:
        load(tiny_llama, sampling=Sampling(stop_tokens=("no such token",)))
    assert caught.value.hint


def test_text_keeps_what_the_policy_wrote_but_for_its_end(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    own = ["[THINK]", "[/THINK]", "[STOP]"]
    tokenizer.add_special_tokens({"bos_token": "[BOS]", "pad_token": "[PAD]", "additional_special_tokens": own})
    tokenizer.clean_up_tokenization_spaces = True
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("[STOP]")]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load(tmp_path)
    for text in ("[THINK]hm[/THINK]It is 3 , do n't .", " leading and trailing ", "", "[THINK]"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ends = [tokenizer.convert_tokens_to_ids("[STOP]"), tokenizer.pad_token_id, tokenizer.pad_token_id]
        assert policy.decode(ids) == text
        assert policy.decode([tokenizer.bos_token_id, *ids, *ends]) == text
        assert policy.decode([*ids, tokenizer.eos_token_id]) == text
        assert policy.decode([*ids, *ends], raw=True) == text + "[STOP]" + 2 * tokenizer.pad_token
    assert policy.decode([*ends, *tokenizer("x", add_special_tokens=False).input_ids]).endswith("x")


def test_longest_prompt_leaves_room_for_the_completion(tiny_llama, tiny_t5, tiny_bart):
    def longest(folder: Path, tokens: int) -> int:
        return load(folder, sampling=Sampling(max_new_tokens=tokens)).longest_prompt("ppo.max_new_tokens")

    assert longest(tiny_llama, 56) == 200
    assert longest(tiny_bart, 56) == 256, "an encoder reads prompts apart"
    assert longest(tiny_t5, 10_000) == 10**9, "relative positions have no limit"
    with pytest.raises(
        UsageError, match=r"completions of 256 tokens leave no room .* reads 256 tokens in all"
    ) as caught:
        longest(tiny_llama, 256)
    assert "ppo.max_new_tokens=64" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"completions of 300 tokens are too long: .* writes at most 256"):
        longest(tiny_bart, 300)


def test_weights_are_loaded_once_when_they_are_used_and_again_after_release(tiny_llama, monkeypatch):
    loads = []

    def watched(source, **options):
        loads.append(source.path)
        return load_policy(source, **options)

    monkeypatch.setattr("rlhf_cli.generation.policy.load_policy", watched)
    policy = load(tiny_llama, sampling=Sampling(max_new_tokens=2))
    assert policy.prompt_ids("hi")
    assert policy.reading
    assert loads == []
    first = TorchGenerator().generate(policy, [Request([5], 1)])
    assert TorchGenerator().generate(policy, [Request([5], 1)]) == first
    assert len(loads) == 1
    policy.release()
    assert TorchGenerator().generate(policy, [Request([5], 1)]) == first
    assert len(loads) == 2


def test_a_template_of_the_recipe_reaches_the_prompt(tiny_llama):
    policy = load(tiny_llama, style=PromptStyle("Q: {prompt}"))
    assert policy.prompt_ids("hi") == policy.format.tokenizer("Q: hi").input_ids


def test_what_is_not_a_model_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="has no config"):
        load(tmp_path)
