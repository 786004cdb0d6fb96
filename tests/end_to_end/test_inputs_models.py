"""Every case of unsuitable models, tokenizers and recipes, given to the real command."""

# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

DEMO = '{"prompt": "Why is the sky blue?", "completion": "Because air scatters blue light."}\n'
CONVERSATION = '{"messages": [%s{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}\n'
BRIEF = ("--set", "sft.batch_size=4", "--set", "sft.lora.rank=2")
# As Mistral's and Gemma's: refuses anything but user and assistant in turn.
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.fixture
def sft(rlhf, tmp_path):
    """Fine-tunes a model folder on some text: `sft(folder, DEMO * 8, code=0)` returns the finished process."""

    def run(folder, content, *arguments, code):
        (tmp_path / "data.jsonl").write_text(content)
        done = rlhf("sft", "--model", folder, "--data", "data.jsonl", "--run-dir", "run", *BRIEF, *arguments, code=code)
        assert "Traceback" not in done.stderr
        if code:
            assert done.stderr.count("error: ") == 1
            assert "hint: " in done.stderr
            assert not (tmp_path / "run" / "sft").exists()
        return done

    return run


def changed(folder, tmp_path, **settings):
    """A copy of a model folder whose tokenizer has other settings; None takes one away."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    for name, value in settings.items():
        config.pop(name, None) if value is None else config.update({name: value})
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return copy


def test_messages_without_a_chat_template_offer_one(sft, tiny_gpt2):
    stderr = sft(tiny_gpt2, CONVERSATION % "" * 8, code=65).stderr
    assert "error: data.jsonl:1: " in stderr
    assert "has no chat template" in stderr
    assert "chat_template.jinja" in stderr


def test_turns_are_the_templates_to_allow(sft, tiny_llama, tmp_path):
    content = CONVERSATION % "" * 3 + CONVERSATION % '{"role": "user", "content": "Hello?"}, '
    sft(tiny_llama, content * 2, code=0)  # its template takes any order
    shutil.rmtree(tmp_path / "run")
    strict = changed(tiny_llama, tmp_path)
    (strict / "chat_template.jinja").write_text(STRICT)
    stderr = sft(strict, content, code=65).stderr
    assert "error: data.jsonl:4: the turns user, user: " in stderr
    assert "roles must alternate" in stderr


def test_prompts_longer_than_the_models_room(sft, tiny_llama, tmp_path):
    """The model has 256 positions: one such prompt among many is skipped, and nothing but such prompts is an error."""
    long = json.dumps({"prompt": "Why is the sky blue? " * 100, "completion": "Because."}) + "\n"
    stderr = sft(tiny_llama, long * 3, code=65).stderr
    assert "none of its 3 records can be used (3 prompt" in stderr
    assert "data.jsonl:1" in stderr
    sft(tiny_llama, DEMO * 7 + long, "--max-skip", "0.2", code=0)
    [skip] = map(json.loads, (tmp_path / "run/sft/skips.jsonl").read_text().splitlines())
    assert skip["location"] == "data.jsonl:8"
    assert "longer than" in skip["reason"]


def test_no_end_token(sft, tiny_gpt2, tmp_path):
    stderr = sft(changed(tiny_gpt2, tmp_path, eos_token=None), DEMO * 8, code=65).stderr
    assert "no end-of-text token" in stderr
    assert "eos_token" in stderr


def test_pad_equal_to_eos_trains_the_same_model(sft, rlhf, tiny_gpt2, tmp_path):
    """What is padding is known by lengths: the end token is learned although it is the pad token too."""
    content = (
        DEMO
        + DEMO.replace("Because air", "Because the air of the sky") * 3
        + '{"prompt": "a", "completion": "b"}\n' * 4
    )
    weights = []
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    assert tokenizer.pad_token_id is None
    for pad in (None, tokenizer.eos_token):
        sft(changed(tiny_gpt2, tmp_path, pad_token=pad), content, code=0)
        weights.append((tmp_path / "run/sft/model.safetensors").read_bytes())
        shutil.rmtree(tmp_path / "run")
        shutil.rmtree(tmp_path / "changed")
    assert weights[0] == weights[1]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Why {n}?"}) + "\n" for n in range(6)))
    return "prompts.jsonl"


def two_labels(tiny_bert, folder, labels):
    config = BertConfig.from_pretrained(tiny_bert, num_labels=labels)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


def test_a_reward_model_with_two_labels(rlhf, tiny_llama, tiny_bert, prompts, tmp_path):
    folder = two_labels(tiny_bert, tmp_path / "classifier", 2)
    stderr = rlhf("ppo", "--model", tiny_llama, "--reward-model", folder, "--prompts", prompts, code=65).stderr
    assert "a reward model must have one label, got 2" in stderr
    assert "hint: " in stderr
    assert "Traceback" not in stderr


def test_a_reward_model_with_another_tokenizer_scores_text(rlhf, tiny_llama, tiny_bert, prompts, tmp_path):
    """A BERT of 300 word pieces ranks a byte-level Llama's answers: its scores are of the text, decoded and encoded anew."""
    folder = two_labels(tiny_bert, tmp_path / "scorer", 1)
    small = (
        "--set",
        "model.precision=float32",
        "--set",
        "label.completions_per_prompt=2",
        "--set",
        "label.sampling.max_new_tokens=8",
    )
    rlhf("label", "--model", tiny_llama, "--reward-model", folder, "--prompts", prompts, "--run-dir", "run", *small)
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.models.reward_model.loading import load_reward_model

    scorer = load_reward_model(ModelSource(str(folder)), template=None)
    lines = [json.loads(line) for line in (tmp_path / "run/label/rankings.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        expected = scorer.score([line["prompt"]] * 2, line["completions"])
        assert line["scores"] == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def recipe(rlhf, tmp_path):
    """Validates a recipe given as text, with models and data that do not exist."""

    def run(text, *command, code):
        (tmp_path / "mine.yaml").write_text(text)
        done = rlhf(*(command or ("run", "mine.yaml")), code=code)
        assert "Traceback" not in done.stderr
        return done

    return run


def test_an_exponent_without_a_point_is_a_float(recipe):
    text = "model: {path: m}\nsft: {data: d.jsonl, learning_rate: 1e-5}\n"
    shown = recipe(text, "recipe", "show", "mine.yaml", "--json", code=0).stdout
    assert json.loads(shown)["settings"]["sft"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        pytest.param("name: a\nseed: 1\nseed: 2\n", ["mine.yaml:3", "`seed`"], id="a key twice"),
        pytest.param("name: a\nsft:\n  data: d\n  learning_rat: 1e-5\n", ["mine.yaml:4", "did you mean `learning_rate`"], id="unknown key"),
        pytest.param("sft:\n  data: d\n  learning_rate: .nan\n", ["mine.yaml:3", "learning_rate", "nan"], id="nan"),
        pytest.param("sft:\n  data: d\n  batch_size: -8\n", ["mine.yaml:3", "batch_size", "-8"], id="negative batch"),
        pytest.param("sft:\n  data: d\n  warmup_share: 1.5\n", ["mine.yaml:3", "warmup_share", "1.5"], id="share over 1"),
        pytest.param("data:\n  holdout: 2\nsft:\n  data: d\n", ["mine.yaml:2", "holdout", "2"], id="holdout over 1"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(recipe, text, pieces):
    stderr = recipe(text, code=2).stderr
    for piece in pieces:
        assert piece in stderr
