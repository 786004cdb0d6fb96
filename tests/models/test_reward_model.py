"""Reward models: where the reward is read, what padding may not do, and artifacts that come back the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.data.records import Message
from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.batch import Encoded
from rlhf_cli.models.reward_model.model import RewardModel, load_reward_model, new_reward_model, save_reward_model

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
PROMPTS = ["Why is the sky blue?", "A short question about bread and water.", "hi"]
COMPLETIONS = ["Because.", "Mix flour, water, salt and yeast, then wait for it to rise.", ""]


def scorer_of(folder: Path, lora=None, attention="auto", **settings) -> RewardModel:
    scorer = new_reward_model(
        ModelSource(str(folder), attention=attention), template=None, lora=lora, **settings
    ).eval()
    if lora is not None:
        torch.manual_seed(7)
        for name, weight in scorer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    return scorer


def saved(scorer: RewardModel, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_reward_model(scorer, folder)
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
    scorer = scorer_of(tiny_llama)
    scorer.bias.fill_(0.25)
    ids = scorer.encode(PROMPTS[0], COMPLETIONS[0]).ids
    hidden = AutoModelForCausalLM.from_pretrained(tiny_llama).model(torch.tensor([ids])).last_hidden_state[0, -1]
    expected = (hidden @ scorer.head.weight[0]).item() + 0.25
    assert ids[-1] == scorer.format.tokenizer.eos_token_id
    assert scorer.score(PROMPTS[:1], COMPLETIONS[:1]) == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_rewards_do_not_depend_on_the_batch(model, request):
    scorer = scorer_of(request.getfixturevalue(model))
    one_by_one = [scorer.score([prompt], [answer])[0] for prompt, answer in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert scorer.score(PROMPTS, COMPLETIONS) == pytest.approx(one_by_one, abs=1e-6)
    assert scorer.score(PROMPTS, COMPLETIONS, batch_size=2) == pytest.approx(one_by_one, abs=1e-6)
    assert len(set(one_by_one)) == 3


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_what_stands_in_the_padding_changes_nothing(model, request):
    scorer = scorer_of(request.getfixturevalue(model), attention="sdpa")
    encoded = [scorer.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    batch = scorer.batch(encoded)
    expected = scorer(batch)
    is_padding = torch.arange(batch.input_ids.shape[1]) >= torch.tensor([[len(one.ids)] for one in encoded])
    assert is_padding.any()
    # Every embedding that no sequence holds is NaN, so padding made of any other token would show.
    used = torch.tensor(sorted({token for one in encoded for token in one.ids}))
    with torch.no_grad():
        embedding = scorer.model.get_input_embeddings().weight
        poisoned = torch.full_like(embedding, float("nan"))
        poisoned[used] = embedding[used]
        embedding.copy_(poisoned)
    rewards = scorer(batch)
    assert torch.equal(rewards, expected)
    # Nor does it matter which of the row's own tokens stands there.
    first = batch.input_ids.masked_fill(is_padding, 0) + is_padding * batch.input_ids[:, 1:2]
    assert torch.equal(scorer(dataclasses.replace(batch, input_ids=first)), expected)
    rewards.sum().backward()
    head = scorer.head.weight.grad
    assert head is not None
    assert torch.isfinite(head).all()


def test_the_end_token_is_read_where_it_is_the_padding_too(tiny_llama):
    scorer = scorer_of(tiny_llama)
    scorer.format.tokenizer.pad_token = scorer.format.tokenizer.eos_token
    with_end, without = scorer.score(PROMPTS[:1] * 2, COMPLETIONS[:1] * 2, ended=[True, False])
    assert with_end != pytest.approx(without, abs=1e-4)
    assert scorer.score(PROMPTS[:1], COMPLETIONS[:1]) == pytest.approx([with_end], abs=1e-6)


def test_a_new_head_is_drawn_from_the_seed_with_the_documented_spread(tiny_llama):
    import math

    weights = torch.cat([scorer_of(tiny_llama, seed=seed).head.weight.detach().flatten() for seed in range(40)])
    assert float(weights.std()) == pytest.approx(1 / math.sqrt(32 + 1), rel=0.1)
    assert torch.equal(scorer_of(tiny_llama, seed=3).head.weight, scorer_of(tiny_llama, seed=3).head.weight)
    assert not torch.equal(scorer_of(tiny_llama, seed=3).head.weight, scorer_of(tiny_llama, seed=4).head.weight)
    assert float(scorer_of(tiny_llama).bias) == 0.0


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "adapter"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_an_artifact_comes_back_the_same(model, lora, request, tmp_path):
    scorer = scorer_of(request.getfixturevalue(model), lora)
    scorer.mean, scorer.std = 0.7, 2.5
    if not scorer.is_encoder:
        scorer.bias.fill_(0.25)
    expected = scorer.score(PROMPTS, COMPLETIONS)
    again = load_reward_model(ModelSource(str(saved(scorer, tmp_path / "train-rm"))), template="unused {prompt}")
    assert again.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    assert again.format.template is None, "the artifact says how prompts are read"
    assert not any(weight.requires_grad for weight in again.parameters())


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "GPTNeoX", "OPT"])
def test_transformers_reads_a_fully_trained_decoder(kind, tiny_llama, tmp_path):
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_llama))
    scorer = scorer_of(save_model(tiny_config(kind, vocabulary), tiny_llama, tmp_path / "base"))
    scorer.mean, scorer.std = 0.7, 2.5
    scorer.bias.fill_(0.25)
    folder = saved(scorer, tmp_path / "train-rm")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    card = json.loads((folder / "reward.json").read_text())
    for prompt, answer in zip(PROMPTS, COMPLETIONS, strict=True):
        raw = plain(torch.tensor([scorer.encode(prompt, answer).ids])).logits.item()
        assert (raw - card["mean"]) / card["std"] == pytest.approx(scorer.score([prompt], [answer])[0], abs=1e-5)


def test_gpt2_is_read_by_transformers_too(tiny_gpt2, tmp_path):
    scorer = scorer_of(tiny_gpt2)
    folder = saved(scorer, tmp_path / "train-rm")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    raw = plain(torch.tensor([scorer.encode(PROMPTS[1], COMPLETIONS[1]).ids])).logits.item()
    assert scorer.score(PROMPTS[1:2], COMPLETIONS[1:2]) == pytest.approx([raw], abs=1e-5)


def test_transformers_is_told_of_no_padding_where_padding_is_the_end(tiny_llama, tmp_path):
    scorer = scorer_of(tiny_llama)
    scorer.format.tokenizer.pad_token = scorer.format.tokenizer.eos_token
    folder = saved(scorer, tmp_path / "train-rm")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    raw = plain(torch.tensor([scorer.encode(PROMPTS[0], COMPLETIONS[0]).ids])).logits.item()
    assert scorer.score(PROMPTS[:1], COMPLETIONS[:1]) == pytest.approx([raw], abs=1e-5)


def test_an_architecture_without_a_classifier_of_its_own_scores_too(tiny_llama, tmp_path):
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_llama))
    scorer = scorer_of(save_model(tiny_config("Granite", vocabulary), tiny_llama, tmp_path / "base"))
    again = load_reward_model(ModelSource(str(saved(scorer, tmp_path / "train-rm"))), template=None)
    assert again.score(PROMPTS, COMPLETIONS) == pytest.approx(scorer.score(PROMPTS, COMPLETIONS), abs=1e-6)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_peft_puts_the_adapter_on_the_language_model(model, request, tmp_path):
    from peft import PeftModel

    base = request.getfixturevalue(model)
    scorer = scorer_of(base, LORA)
    folder = saved(scorer, tmp_path / "train-rm")
    keys = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert keys
    assert all("lora_A" in key or "lora_B" in key for key in keys), "the head is ours to keep"
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter").eval()
    head = load_file(folder / "head.safetensors")
    ids = torch.tensor([scorer.encode(PROMPTS[0], COMPLETIONS[0]).ids])
    last = policy.get_base_model().base_model(ids).last_hidden_state[0, -1]
    expected = (last @ head["weight"][0] + head["bias"][0]).item()
    assert scorer.score(PROMPTS[:1], COMPLETIONS[:1]) == pytest.approx([expected], abs=1e-5)


def test_only_adapter_and_head_train_and_the_head_is_float32(tiny_llama):
    source = ModelSource(str(tiny_llama), dtype=torch.bfloat16, precision=torch.bfloat16)
    scorer = new_reward_model(source, template=None, lora=LORA)
    trained = {name: weight.dtype for name, weight in scorer.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or name.endswith("score.weight") for name in trained)
    assert sum(name.endswith("score.weight") for name in trained) == 1
    assert set(trained.values()) == {torch.float32}
    assert scorer(scorer.batch([scorer.encode("a", "b")])).dtype == torch.float32


def test_everything_trains_in_float32_without_an_adapter(tiny_llama):
    source = ModelSource(str(tiny_llama), dtype=torch.bfloat16, precision=torch.bfloat16)
    scorer = new_reward_model(source, template=None, lora=None)
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in scorer.parameters())


def test_an_encoders_pooler_and_head_train_beside_its_adapter(tiny_bert):
    scorer = scorer_of(tiny_bert, LORA)
    trained = {name for name, weight in scorer.named_parameters() if weight.requires_grad and "lora_" not in name}
    assert trained == {
        "model.bert.pooler.dense.weight",
        "model.bert.pooler.dense.bias",
        "model.classifier.weight",
        "model.classifier.bias",
    }


def test_an_encoder_reads_prompt_and_answer_as_a_pair(tiny_bert):
    scorer = scorer_of(tiny_bert)
    encoded = scorer.encode("the cat", "the river")
    tokenizer = scorer.format.tokenizer
    assert tokenizer.convert_ids_to_tokens(encoded.ids)[0] == "[CLS]"
    assert tokenizer.convert_ids_to_tokens(encoded.ids)[-1] == "[SEP]"
    assert encoded.types is not None
    assert sorted(set(encoded.types)) == [0, 1]
    batch = scorer.batch([encoded])
    assert batch.types is not None
    of_one = dataclasses.replace(batch, types=batch.types * 0)
    assert float(scorer(batch)) != pytest.approx(float(scorer(of_one)), abs=1e-6)


def test_gradient_checkpointing_is_on_and_changes_no_gradient(tiny_llama):
    gradients = []
    for recompute in (False, True):
        scorer = scorer_of(tiny_llama, LORA, gradient_checkpointing=recompute).train()
        calls = []
        layer = scorer.model.base_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        scorer(scorer.batch([scorer.encode(PROMPTS[1], COMPLETIONS[1])])).sum().backward()
        assert len(calls) == (2 if recompute else 1), "a layer that is recomputed runs twice"
        gradients.append(scorer.head.weight.grad)
    assert torch.allclose(*gradients)


def test_a_base_in_the_same_run_is_named_relatively_and_the_run_can_move(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "run" / "sft")
    scorer = scorer_of(tmp_path / "run" / "sft", LORA)
    folder = saved(scorer, tmp_path / "run" / ".train-rm.output")
    expected = scorer.score(PROMPTS, COMPLETIONS)
    assert json.loads((folder / "reward.json").read_text())["base"] == "../sft"
    folder.rename(tmp_path / "run" / "train-rm")
    (tmp_path / "run").rename(tmp_path / "moved")
    again = load_reward_model(ModelSource(str(tmp_path / "moved" / "train-rm")), template=None)
    assert again.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)


def test_a_base_elsewhere_is_named_absolutely(tiny_llama, tmp_path):
    folder = saved(scorer_of(tiny_llama, LORA), tmp_path / "run" / "train-rm")
    assert json.loads((folder / "reward.json").read_text())["base"] == str(tiny_llama)


def test_anyones_reward_model_keeps_its_head(tiny_llama, tmp_path):
    torch.manual_seed(5)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    classifier.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    for scorer in (load_reward_model(ModelSource(str(tmp_path)), template=None), scorer_of(tmp_path)):
        assert torch.equal(scorer.head.weight, classifier.score.weight)


def test_two_labels_are_refused_by_name(tiny_llama, tmp_path):
    labels = {0: "BAD", 1: "GOOD"}
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2, id2label=labels).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"2 labels \(BAD, GOOD\)") as caught:
        load_reward_model(ModelSource(str(tmp_path)), template=None)
    assert caught.value.exit_code == 65


def test_an_encoder_decoder_is_refused_by_name(tiny_t5):
    with pytest.raises(ModelError, match="t5 model, an encoder-decoder") as caught:
        new_reward_model(ModelSource(str(tiny_t5)), template=None, lora=None)
    assert caught.value.hint


def test_a_language_model_is_no_trained_reward_model(tiny_llama):
    with pytest.raises(ModelError, match="no reward head"):
        load_reward_model(ModelSource(str(tiny_llama)), template=None)


def test_training_does_not_start_from_an_adapter(tiny_llama, tmp_path):
    folder = saved(scorer_of(tiny_llama, LORA), tmp_path / "train-rm")
    with pytest.raises(ModelError, match="kept as an adapter"):
        new_reward_model(ModelSource(str(folder)), template=None, lora=LORA)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda card: card.pop("mean"), "damaged", id="a field is missing"),
        pytest.param(lambda card: card.update(format=9), "format 9", id="a later version"),
    ],
)
def test_a_damaged_card_is_named(damage, message, tiny_llama, tmp_path):
    folder = saved(scorer_of(tiny_llama, LORA), tmp_path / "train-rm")
    card = json.loads((folder / "reward.json").read_text())
    damage(card)
    (folder / "reward.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match=message):
        load_reward_model(ModelSource(str(folder)), template=None)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "adapter"])
def test_weights_that_are_not_finite_are_not_saved(lora, tiny_llama, tmp_path):
    scorer = scorer_of(tiny_llama, lora)
    with torch.no_grad():
        scorer.head.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError):
        save_reward_model(scorer, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_text_that_is_too_long_loses_the_beginning_of_its_prompt(tiny_llama, tiny_bert, capsys):
    for folder, kept_in_front in ((tiny_llama, 0), (tiny_bert, 1)):
        scorer = scorer_of(folder)
        long_prompt = "water and bread " * 300
        ids = scorer.encode(long_prompt, "Yes.").ids
        assert len(ids) > scorer.room
        cut = Encoded(ids[:kept_in_front] + ids[len(ids) - scorer.room + kept_in_front :], None)
        types = None if not scorer.is_encoder else [0] * (scorer.room - 3) + [1] * 3
        cut = Encoded(cut.ids, types if types is None else scorer.encode(long_prompt, "Yes.").types[-scorer.room :])
        expected = scorer.normalize(scorer(scorer.batch([cut]))).item()
        assert scorer.score([long_prompt], ["Yes."]) == pytest.approx([expected], abs=1e-6)
        assert "lose the beginning of their prompt" in capsys.readouterr().err


def test_conversations_go_through_the_chat_template(tiny_llama):
    scorer = scorer_of(tiny_llama)
    prompt = (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "Bread?"))
    text = scorer.format.tokenizer.decode(scorer.encode(prompt, "Yes.").ids)
    assert text == "<|user|> Hello\n<|assistant|> Hi\n<|user|> Bread?\n<|assistant|> Yes.<|end|>"
