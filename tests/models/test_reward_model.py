"""Reward models: where the reward is read, what padding may not do, and artifacts that come back the same."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaConfig,
    DebertaForSequenceClassification,
)

from rlhf_cli.data.records import Message
from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.batch import Encoded
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.settings.shared import LoraSettings
from tests.chat_templates import BY_NAME, turns

LORA = LoraSettings(rank=4, alpha=8.0)
PROMPTS = ["Why is the sky blue?", "A short question about bread and water.", "hi"]
COMPLETIONS = ["Because.", "Mix flour, water, salt and yeast, then wait for it to rise.", ""]


def reward_model_of(folder: Path, lora=None, attention="auto", **settings) -> RewardModel:
    reward_model = new_reward_model(
        ModelSource(str(folder), attention=attention), template=None, lora=lora, **settings
    ).eval()
    if lora is not None:
        torch.manual_seed(7)
        for name, weight in reward_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    return reward_model


def saved(reward_model: RewardModel, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_reward_model(reward_model, folder)
    return folder


def save_model(config, tokenizer_of: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


def tiny_config(kind: str, vocabulary: int):
    import transformers

    common = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    llama_like = common | {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "head_dim": 16,
    }
    opt = common | {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
        "pad_token_id": 1,
    }
    return getattr(transformers, kind + "Config")(**(opt if kind == "OPT" else llama_like))


def test_a_decoders_reward_is_the_head_on_the_last_hidden_state(tiny_llama):
    reward_model = reward_model_of(tiny_llama)
    reward_model.bias.fill_(0.25)
    ids = reward_model.encode(PROMPTS[0], COMPLETIONS[0]).ids
    hidden = AutoModelForCausalLM.from_pretrained(tiny_llama).model(torch.tensor([ids])).last_hidden_state[0, -1]
    expected = (hidden @ reward_model.head.weight[0]).item() + 0.25
    assert ids[-1] == reward_model.format.tokenizer.eos_token_id
    assert reward_model.score(PROMPTS[:1], COMPLETIONS[:1]) == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_rewards_do_not_depend_on_the_batch(model, request):
    reward_model = reward_model_of(request.getfixturevalue(model))
    one_by_one = [
        reward_model.score([prompt], [answer])[0] for prompt, answer in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert reward_model.score(PROMPTS, COMPLETIONS) == pytest.approx(one_by_one, abs=1e-6)
    assert reward_model.score(PROMPTS, COMPLETIONS, batch_size=2) == pytest.approx(one_by_one, abs=1e-6)
    assert len(set(one_by_one)) == 3


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_what_stands_in_the_padding_changes_nothing(model, request):
    reward_model = reward_model_of(request.getfixturevalue(model), attention="sdpa")
    encoded = [reward_model.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    batch = reward_model.batch(encoded)
    expected = reward_model(batch)
    is_padding = torch.arange(batch.input_ids.shape[1]) >= torch.tensor([[len(one.ids)] for one in encoded])
    assert is_padding.any()
    # Every embedding that no sequence holds is NaN, so padding made of any other token would show.
    used = torch.tensor(sorted({token for one in encoded for token in one.ids}))
    with torch.no_grad():
        embedding = reward_model.model.get_input_embeddings().weight
        poisoned = torch.full_like(embedding, float("nan"))
        poisoned[used] = embedding[used]
        embedding.copy_(poisoned)
    rewards = reward_model(batch)
    assert torch.equal(rewards, expected)
    # Nor does it matter which of the row's own tokens stands there.
    first = batch.input_ids.masked_fill(is_padding, 0) + is_padding * batch.input_ids[:, 1:2]
    assert torch.equal(reward_model(dataclasses.replace(batch, input_ids=first)), expected)
    rewards.sum().backward()
    head = reward_model.head.weight.grad
    assert head is not None
    assert torch.isfinite(head).all()


def test_the_end_token_is_read_where_it_is_the_padding_too(tiny_llama):
    reward_model = reward_model_of(tiny_llama)
    reward_model.format.tokenizer.pad_token = reward_model.format.tokenizer.eos_token
    with_end, without = reward_model.score(PROMPTS[:1] * 2, COMPLETIONS[:1] * 2, ended=[True, False])
    assert with_end != pytest.approx(without, abs=1e-4)
    assert reward_model.score(PROMPTS[:1], COMPLETIONS[:1]) == pytest.approx([with_end], abs=1e-6)


def test_a_new_head_is_drawn_from_the_seed_with_the_documented_spread(tiny_llama):
    import math

    weights = torch.cat([reward_model_of(tiny_llama, seed=seed).head.weight.detach().flatten() for seed in range(40)])
    assert float(weights.std()) == pytest.approx(1 / math.sqrt(32 + 1), rel=0.1)
    assert torch.equal(reward_model_of(tiny_llama, seed=3).head.weight, reward_model_of(tiny_llama, seed=3).head.weight)
    assert not torch.equal(
        reward_model_of(tiny_llama, seed=3).head.weight, reward_model_of(tiny_llama, seed=4).head.weight
    )
    assert float(reward_model_of(tiny_llama).bias) == 0.0


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "adapter"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_an_artifact_comes_back_the_same(model, lora, request, tmp_path):
    reward_model = reward_model_of(request.getfixturevalue(model), lora)
    reward_model.mean, reward_model.std = 0.7, 2.5
    if not reward_model.is_encoder:
        reward_model.bias.fill_(0.25)
    expected = reward_model.score(PROMPTS, COMPLETIONS)
    again = load_reward_model(ModelSource(str(saved(reward_model, tmp_path / "train-rm"))), template="unused {prompt}")
    assert again.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    assert again.format.template is None, "the artifact says how prompts are read"
    assert not any(weight.requires_grad for weight in again.parameters())


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "GPTNeoX", "OPT"])
def test_transformers_reads_a_fully_trained_decoder(kind, tiny_llama, tmp_path):
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_llama))
    reward_model = reward_model_of(save_model(tiny_config(kind, vocabulary), tiny_llama, tmp_path / "base"))
    reward_model.mean, reward_model.std = 0.7, 2.5
    reward_model.bias.fill_(0.25)
    folder = saved(reward_model, tmp_path / "train-rm")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    config = json.loads((folder / "reward.json").read_text())
    for prompt, answer in zip(PROMPTS, COMPLETIONS, strict=True):
        raw = plain(torch.tensor([reward_model.encode(prompt, answer).ids])).logits.item()
        assert (raw - config["mean"]) / config["std"] == pytest.approx(
            reward_model.score([prompt], [answer])[0], abs=1e-5
        )


def test_gpt2_is_read_by_transformers_too(tiny_gpt2, tmp_path):
    reward_model = reward_model_of(tiny_gpt2)
    folder = saved(reward_model, tmp_path / "train-rm")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    raw = plain(torch.tensor([reward_model.encode(PROMPTS[1], COMPLETIONS[1]).ids])).logits.item()
    assert reward_model.score(PROMPTS[1:2], COMPLETIONS[1:2]) == pytest.approx([raw], abs=1e-5)


def test_transformers_is_told_of_no_padding_where_padding_is_the_end(tiny_llama, tmp_path):
    reward_model = reward_model_of(tiny_llama)
    reward_model.format.tokenizer.pad_token = reward_model.format.tokenizer.eos_token
    folder = saved(reward_model, tmp_path / "train-rm")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    raw = plain(torch.tensor([reward_model.encode(PROMPTS[0], COMPLETIONS[0]).ids])).logits.item()
    assert reward_model.score(PROMPTS[:1], COMPLETIONS[:1]) == pytest.approx([raw], abs=1e-5)


def test_an_architecture_without_a_classifier_of_its_own_scores_too(tiny_llama, tmp_path):
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_llama))
    reward_model = reward_model_of(save_model(tiny_config("Granite", vocabulary), tiny_llama, tmp_path / "base"))
    again = load_reward_model(ModelSource(str(saved(reward_model, tmp_path / "train-rm"))), template=None)
    assert again.score(PROMPTS, COMPLETIONS) == pytest.approx(reward_model.score(PROMPTS, COMPLETIONS), abs=1e-6)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_peft_puts_the_adapter_on_the_language_model(model, request, tmp_path):
    from peft import PeftModel

    base = request.getfixturevalue(model)
    reward_model = reward_model_of(base, LORA)
    folder = saved(reward_model, tmp_path / "train-rm")
    keys = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert keys
    assert all("lora_A" in key or "lora_B" in key for key in keys), "the head is ours to keep"
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter").eval()
    head = load_file(folder / "head.safetensors")
    ids = torch.tensor([reward_model.encode(PROMPTS[0], COMPLETIONS[0]).ids])
    last = policy.get_base_model().base_model(ids).last_hidden_state[0, -1]
    expected = (last @ head["weight"][0] + head["bias"][0]).item()
    assert reward_model.score(PROMPTS[:1], COMPLETIONS[:1]) == pytest.approx([expected], abs=1e-5)


def test_only_adapter_and_head_train_and_the_head_is_float32(tiny_llama):
    source = ModelSource(str(tiny_llama), dtype=torch.bfloat16, precision=torch.bfloat16)
    reward_model = new_reward_model(source, template=None, lora=LORA)
    trained = {name: weight.dtype for name, weight in reward_model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or name.endswith("score.weight") for name in trained)
    assert sum(name.endswith("score.weight") for name in trained) == 1
    assert set(trained.values()) == {torch.float32}
    assert reward_model(reward_model.batch([reward_model.encode("a", "b")])).dtype == torch.float32


def test_everything_trains_in_float32_without_an_adapter(tiny_llama):
    source = ModelSource(str(tiny_llama), dtype=torch.bfloat16, precision=torch.bfloat16)
    reward_model = new_reward_model(source, template=None, lora=None)
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in reward_model.parameters())


def test_an_encoders_pooler_and_head_train_beside_its_adapter(tiny_bert):
    reward_model = reward_model_of(tiny_bert, LORA)
    trained = {name for name, weight in reward_model.named_parameters() if weight.requires_grad and "lora_" not in name}
    assert trained == {
        "model.bert.pooler.dense.weight",
        "model.bert.pooler.dense.bias",
        "model.classifier.weight",
        "model.classifier.bias",
    }


def test_an_encoder_reads_prompt_and_answer_as_a_pair(tiny_bert):
    reward_model = reward_model_of(tiny_bert)
    encoded = reward_model.encode("the cat", "the river")
    tokenizer = reward_model.format.tokenizer
    assert tokenizer.convert_ids_to_tokens(encoded.ids)[0] == "[CLS]"
    assert tokenizer.convert_ids_to_tokens(encoded.ids)[-1] == "[SEP]"
    assert encoded.types is not None
    assert sorted(set(encoded.types)) == [0, 1]
    batch = reward_model.batch([encoded])
    assert batch.types is not None
    of_one = dataclasses.replace(batch, types=batch.types * 0)
    assert float(reward_model(batch)) != pytest.approx(float(reward_model(of_one)), abs=1e-6)


def test_gradient_checkpointing_is_on_and_changes_no_gradient(tiny_llama):
    gradients = []
    for recompute in (False, True):
        reward_model = reward_model_of(tiny_llama, LORA, gradient_checkpointing=recompute).train()
        calls = []
        layer = reward_model.model.base_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        reward_model(reward_model.batch([reward_model.encode(PROMPTS[1], COMPLETIONS[1])])).sum().backward()
        assert len(calls) == (2 if recompute else 1), "a layer that is recomputed runs twice"
        gradients.append(reward_model.head.weight.grad)
    assert torch.allclose(*gradients)


def test_a_base_in_the_same_run_is_named_relatively_and_the_run_can_move(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "run" / "sft")
    reward_model = reward_model_of(tmp_path / "run" / "sft", LORA)
    folder = saved(reward_model, tmp_path / "run" / ".train-rm.output")
    expected = reward_model.score(PROMPTS, COMPLETIONS)
    assert json.loads((folder / "reward.json").read_text())["base"] == "../sft"
    folder.rename(tmp_path / "run" / "train-rm")
    (tmp_path / "run").rename(tmp_path / "moved")
    again = load_reward_model(ModelSource(str(tmp_path / "moved" / "train-rm")), template=None)
    assert again.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)


def test_a_base_elsewhere_is_named_absolutely(tiny_llama, tmp_path):
    folder = saved(reward_model_of(tiny_llama, LORA), tmp_path / "run" / "train-rm")
    assert json.loads((folder / "reward.json").read_text())["base"] == str(tiny_llama)


def test_anyones_reward_model_keeps_its_head(tiny_llama, tmp_path):
    torch.manual_seed(5)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    classifier.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    for reward_model in (load_reward_model(ModelSource(str(tmp_path)), template=None), reward_model_of(tmp_path)):
        assert torch.equal(reward_model.head.weight, classifier.score.weight)


def test_two_labels_are_refused_by_name(tiny_llama, tmp_path):
    labels = {0: "BAD", 1: "GOOD"}
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2, id2label=labels).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"must have one label, got 2 \(BAD, GOOD\)") as caught:
        load_reward_model(ModelSource(str(tmp_path)), template=None)
    assert caught.value.exit_code == 65


def test_an_encoder_decoder_is_refused_by_name(tiny_t5):
    with pytest.raises(ModelError, match="t5 model; an encoder-decoder cannot be a reward model") as caught:
        new_reward_model(ModelSource(str(tiny_t5)), template=None, lora=None)
    assert caught.value.hint


def test_a_language_model_is_no_trained_reward_model(tiny_llama):
    with pytest.raises(ModelError, match="no reward head"):
        load_reward_model(ModelSource(str(tiny_llama)), template=None)


def test_training_does_not_start_from_an_adapter(tiny_llama, tmp_path):
    folder = saved(reward_model_of(tiny_llama, LORA), tmp_path / "train-rm")
    with pytest.raises(ModelError, match="saved as an adapter"):
        new_reward_model(ModelSource(str(folder)), template=None, lora=LORA)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda config: config.pop("mean"), "damaged", id="a field is missing"),
        pytest.param(lambda config: config.update(format=9), "format must be 1, got 9", id="a later version"),
    ],
)
def test_a_damaged_config_is_named(damage, message, tiny_llama, tmp_path):
    folder = saved(reward_model_of(tiny_llama, LORA), tmp_path / "train-rm")
    config = json.loads((folder / "reward.json").read_text())
    damage(config)
    (folder / "reward.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_reward_model(ModelSource(str(folder)), template=None)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "adapter"])
def test_weights_that_are_not_finite_are_not_saved(lora, tiny_llama, tmp_path):
    reward_model = reward_model_of(tiny_llama, lora)
    with torch.no_grad():
        reward_model.head.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError):
        save_reward_model(reward_model, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_text_that_is_too_long_loses_the_beginning_of_its_prompt(tiny_llama, tiny_bert, capsys):
    for folder, kept_in_front in ((tiny_llama, 0), (tiny_bert, 1)):
        reward_model = reward_model_of(folder)
        long_prompt = "water and bread " * 300
        ids = reward_model.encode(long_prompt, "Yes.").ids
        assert len(ids) > reward_model.max_length
        cut = Encoded(ids[:kept_in_front] + ids[len(ids) - reward_model.max_length + kept_in_front :], None)
        types = None if not reward_model.is_encoder else [0] * (reward_model.max_length - 3) + [1] * 3
        cut = Encoded(
            cut.ids,
            types if types is None else reward_model.encode(long_prompt, "Yes.").types[-reward_model.max_length :],
        )
        expected = reward_model.normalize(reward_model(reward_model.batch([cut]))).item()
        assert reward_model.score([long_prompt], ["Yes."]) == pytest.approx([expected], abs=1e-6)
        assert "longer prompts are cut at their beginning" in capsys.readouterr().err


def test_conversations_go_through_the_chat_template(tiny_llama):
    reward_model = reward_model_of(tiny_llama)
    prompt = (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "Bread?"))
    text = reward_model.format.tokenizer.decode(reward_model.encode(prompt, "Yes.").ids)
    assert text == "<|user|> Hello\n<|assistant|> Hi\n<|user|> Bread?\n<|assistant|> Yes.<|end|>"


def test_a_chat_reward_model_of_others_reads_what_its_template_writes(tmp_path):
    """The score is the one that a script with `apply_chat_template` gives, as on a model's page."""
    for name in ("Gemma 2", "Qwen 3", "Phi-3", "Qwen 2.5"):
        folder = BY_NAME[name].model(tmp_path / name)
        save_model_as_classifier(folder)
        reward_model = load_reward_model(ModelSource(str(folder), attention="sdpa"), template="chat")
        plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for prompt, completion in (("Hi", "Hello"), ("2+2", "4"), ("Why<|im_end|>?", " Because.\n")):
            if "<|" in prompt and name != "Gemma 2":
                continue  # a script takes the spelled token for a control token
            ids = tokenizer.apply_chat_template(turns(prompt, completion), return_tensors="pt")["input_ids"]
            with torch.no_grad():
                card = plain(ids).logits.item()
            assert reward_model.score([prompt], [completion]) == pytest.approx([card], abs=1e-5), name
            cut = reward_model.encode(prompt, completion, ended=False).ids
            assert cut == ids[0].tolist()[: len(cut)]
            assert len(cut) < ids.shape[1]


def save_model_as_classifier(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.config.pad_token_id = None
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", ["Gemma 3", "Llama 3", "Mistral", "Qwen 2.5"])
def test_a_chat_that_is_too_long_keeps_bos_and_the_header_of_the_turn(name, tmp_path):
    reward_model = reward_model_of(BY_NAME[name].model(tmp_path, positions=120))
    tokenizer, prompt = reward_model.format.tokenizer, (Message("user", "Hi there. " + "so " * 200 + "Why?"),)
    whole = reward_model.encode(prompt, "Because.").ids
    kept = reward_model._truncate(reward_model.encode(prompt, "Because."), prompt).ids
    assert len(kept) == 120 < len(whole)
    header = tokenizer.apply_chat_template(turns("Hi"), tokenize=False).partition("Hi")[0]
    assert tokenizer.decode(kept).startswith((header + "so so", header + "o so", header + " so"))
    assert kept[-50:] == whole[-50:]


def test_a_system_message_that_fills_the_context_is_cut_too(tmp_path):
    reward_model = reward_model_of(BY_NAME["Granite"].model(tmp_path, positions=60))
    prompt = (Message("system", "Be short. " * 40), Message("user", "Why?"))
    whole = reward_model.encode(prompt, "Because.").ids
    kept = reward_model._truncate(reward_model.encode(prompt, "Because."), prompt).ids
    assert kept == whole[:1] + whole[-59:]


@pytest.mark.parametrize(("precision", "computes"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_an_encoder_that_fails_in_bfloat16_computes_in_float32(precision, computes, tiny_bert, tmp_path, capsys):
    """The first DeBERTa fills masked scores with the smallest float32, which bfloat16 does not have."""
    config = DebertaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=1
    )
    DebertaForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    loaded = load_reward_model(ModelSource(str(tmp_path), precision=precision), template=None)
    assert loaded.source.precision == computes
    assert all(math.isfinite(reward) for reward in loaded.score(["Why?", "Why?"], ["So.", "It is so, I think."]))
    is_said = "computes in float32: under bfloat16 its forward pass fails" in capsys.readouterr().err
    assert is_said == (precision != computes)


def test_an_encoder_that_can_computes_in_bfloat16(tiny_bert, tmp_path):
    reward_model = new_reward_model(
        ModelSource(str(tiny_bert), precision=torch.bfloat16), template=None, lora=LoraSettings()
    )
    assert reward_model.source.precision == torch.bfloat16
