"""`rlhf export`: what other programs load, and what they are told."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.export import gguf
from rlhf_cli.export.engine_run import read_run
from rlhf_cli.export.models import find_model, write_plain
from rlhf_cli.export.openrlhf import options as openrlhf_options
from rlhf_cli.export.verl import options as verl_options
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.loading import load_reward_model
from rlhf_cli.transformer import TransformerConfig
from rlhf_cli.transformer.classifier import TransformerForSequenceClassification
from rlhf_cli.transformer.conversion import as_transformers

OPTIONS = Path(__file__).parent / "options"


def test_a_reward_model_that_is_an_adapter_becomes_a_classifier_with_the_same_rewards(made_run, tmp_path, rlhf_here):
    code, messages = rlhf_here("export", made_run / "train-rm", "plain", "--to", "llama")
    assert code == 0, messages
    ours = load_reward_model(ModelSource(str(made_run / "train-rm")), template=None)
    prompts, completions = ["Why?", "What is it?"], ["It is so.", "No."]
    rewards = torch.tensor(ours.score(prompts, completions))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    rows = [ours.encode(prompt, text).ids for prompt, text in zip(prompts, completions, strict=True)]
    scores = torch.tensor([model(torch.tensor([row])).logits.item() for row in rows])
    shift = float(re.search(r"score plus (-?[\d.]+)", messages)[1])
    torch.testing.assert_close(scores + shift, rewards, atol=2e-4, rtol=0)
    assert shift == pytest.approx((0.25 - 0.5) / 2.0)
    assert not torch.allclose(rewards[0], rewards[1])


@pytest.mark.slow
def test_what_is_exported_loads_without_this_package(made_run, tmp_path, rlhf_here):
    for stage, auto in (("sft", "CausalLM"), ("train-rm", "SequenceClassification")):
        code, messages = rlhf_here("export", made_run / stage, stage, "--to", "llama")
        assert code == 0, messages
        text = (
            f"import sys, transformers\nm = transformers.AutoModelFor{auto}.from_pretrained({str(tmp_path / stage)!r})"
        )
        text += f"\nassert type(m).__name__ == 'LlamaFor{auto}'"
        text += "\nassert not [name for name in sys.modules if name.startswith('rlhf_cli')]"
        subprocess.run([sys.executable, "-c", text], check=True, cwd=tmp_path)
    assert "# mine/sft" in (tmp_path / "sft" / "README.md").read_text()


def test_an_explicit_reward_model_becomes_a_llama_with_the_same_scores():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = TransformerForSequenceClassification(TransformerConfig(vocab_size=30, num_labels=1, **sizes)).eval()
    plain = as_transformers(model).eval()
    ids = torch.arange(12)[None]
    assert type(plain).__name__ == "LlamaForSequenceClassification"
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_nothing_is_left_where_the_written_model_differs(made_run, tmp_path, rlhf_here, monkeypatch):
    read = AutoModelForCausalLM.from_pretrained

    def spoiled(*arguments, **options):
        model = read(*arguments, **options)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.1)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spoiled)
    code, messages = rlhf_here("export", made_run / "sft", "plain", "--to", "llama")
    assert (code, "computes different outputs" in messages) == (65, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{run}", "out", "--to", "llama"), "is a run directory, not a model"),
        (("{run}/..", "out", "--to", "llama"), "has no model"),
        (("{run}/sft", "{run}/sft", "--to", "llama"), "already exists"),
        (("{run}/sft", "out", "--to", "llama", "--outtype", "f16"), "are options of `--to gguf`"),
        (("{run}/sft", "out", "--to", "verl"), "is not a run directory"),
        (("{run}/sft", "out", "--to", "gguf"), "git clone --depth 1 https://github.com/ggml-org/llama.cpp"),
        (("{run}/sft", "out", "--to", "gguf", "--llama-cpp", "{run}"), "there is no convert_hf_to_gguf.py in"),
    ],
)
def test_what_cannot_be_exported_is_refused(made_run, rlhf_here, monkeypatch, arguments, said):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    code, messages = rlhf_here("export", *(one.format(run=made_run) for one in arguments))
    assert (code, said in messages) == (2, True), messages


CONVERTER = """\
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path, required=True)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto"], required=True)
given = parser.parse_args()
assert (given.model / "config.json").is_file() and (given.model / "model.safetensors").is_file()
given.outfile.write_text(given.outtype)
"""


@pytest.fixture
def llama_cpp(tmp_path) -> Path:
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / gguf.CONVERTER).write_text(CONVERTER)
    return tmp_path / "llama.cpp"


@pytest.mark.slow
def test_gguf_is_written_by_the_converter_with_a_modelfile_beside_it(made_run, tmp_path, rlhf, llama_cpp):
    rlhf("export", made_run / "sft", "out", "--to", "gguf", "--outtype", "q8_0", env={"LLAMA_CPP": str(llama_cpp)})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    assert (tmp_path / "out" / "model.gguf").read_text() == "q8_0"
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[:4] == ["FROM ./model.gguf", "", 'TEMPLATE """Q: {{ .Prompt }}', 'A:"""']
    assert {"PARAMETER temperature 0.7", "PARAMETER num_predict 16", 'PARAMETER stop "<|end|>"'} <= set(lines)
    (llama_cpp / gguf.CONVERTER).write_text("import not_installed_here")
    failed = rlhf("export", made_run / "sft", "next", "--to", "gguf", "--llama-cpp", llama_cpp, code=65)
    assert "No module named 'not_installed_here'" in failed.stderr
    assert "pip install gguf sentencepiece protobuf" in failed.stderr
    refused = rlhf("export", made_run / "train-rm", "next", "--to", "gguf", "--llama-cpp", llama_cpp, code=2)
    assert "is a reward model" in refused.stderr
    assert not (tmp_path / "next").exists()


def test_a_modelfile_names_no_template_that_it_cannot_hold(made_run, tmp_path, tiny_llama):
    write_plain(find_model(str(tiny_llama)), tmp_path / "plain")
    text = gguf.modelfile(find_model(str(tiny_llama)), tmp_path / "plain")
    assert "\nTEMPLATE" not in text
    assert "chat template in model.gguf" in text
    assert gguf.template_lines("{{ {prompt}")[0].startswith("# No TEMPLATE")


def test_names_of_options_are_those_of_the_engines(made_run):
    run = read_run(made_run)
    everything = {"kl_target": 6.0, "entropy_coef": 0.1, "reward_clip": 5.0, "missing_eos_reward": -1.0, "epochs": 3}
    everything |= {"gradient_checkpointing": True, "critic_warmup_steps": 2, "schedule": "cosine"}
    changes = [{}, everything, {"kl_in": "loss", "kl_estimator": "k3"}, {"adapter": "none"}]
    for name, options in (("openrlhf-0.11.2", openrlhf_options), ("verl-0.9.1", verl_options)):
        known = set((OPTIONS / f"{name}.txt").read_text().split())
        for change in changes:
            ppo = run.recipe.ppo.model_copy(update=change)
            changed = run.__class__(**vars(run) | {"recipe": run.recipe.model_copy(update={"ppo": ppo})})
            found = options(changed, "policy").keys()
            assert found
            assert found <= known


@pytest.mark.parametrize(("ours", "theirs"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_verl_estimates_the_kl_divergence_in_the_loss_as_we_do(made_run, ours, theirs):
    run = read_run(made_run)
    ppo = run.recipe.ppo.model_copy(update={"kl_in": "loss", "kl_estimator": ours, "kl_coef": 0.3})
    options = verl_options(
        run.__class__(**vars(run) | {"recipe": run.recipe.model_copy(update={"ppo": ppo})}), "policy"
    )
    actor = "actor_rollout_ref.actor"
    assert (options[f"{actor}.kl_loss_type"], options[f"{actor}.kl_loss_coef"]) == (theirs, 0.3)


@pytest.mark.slow
def test_openrlhf_gets_models_prompts_and_the_settings_of_ppo(made_run, tmp_path, rlhf_here):
    code, messages = rlhf_here("export", made_run, "out", "--to", "openrlhf")
    assert code == 0, messages
    out = tmp_path / "out"
    names = {"policy", "reward-model", "prompts.jsonl", "held_out.jsonl", "train.sh"}
    assert {path.name for path in out.iterdir()} == names
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    held_out = (out / "held_out.jsonl").read_text().splitlines()
    assert len(rows) + len(held_out) == 40
    assert held_out
    assert re.fullmatch(r"Q: What is \d+\?\nA:", rows[0]["input"])
    script = (out / "train.sh").read_text()
    subprocess.run(["bash", "-n", str(out / "train.sh")], check=True)
    words = shlex.split(script.partition("python3 ")[2])
    given = dict(itertools.pairwise(words))
    wanted = {"actor.adam.lr": "3e-05", "algo.kl.init_coef": "0.07", "algo.advantage.gamma": "0.9"}
    wanted |= {"algo.advantage.lambd": "0.8", "actor.eps_clip": "0.15", "rollout.batch_size": "8"}
    wanted |= {"train.batch_size": "$MINIBATCH", "rollout.n_samples_per_prompt": "2", "rollout.temperature": "0.7"}
    wanted |= {
        "rollout.max_new_tokens": "16",
        "data.max_len": str(min(528, read_run(made_run).context)),
        "train.seed": "7",
    }
    wanted |= {"train.num_episodes": str(-(-80 // len(rows))), "actor.lr_scheduler": "linear"}
    assert {name: given[f"--{name}"] for name in wanted} == wanted
    assert "#   ppo.length_penalty: 0.01" in script
    assert "--critic.model_name_or_path reward-model" in script


@pytest.mark.slow
def test_verl_gets_models_prompts_and_the_settings_of_ppo(made_run, tmp_path, rlhf_here):
    code, messages = rlhf_here("export", made_run, "out", "--to", "verl")
    assert code == 0, messages
    out = tmp_path / "out"
    rows = pyarrow.parquet.read_table(out / "prompts.parquet").to_pylist()
    assert rows[0].keys() == {"data_source", "prompt", "reward_model", "extra_info"}
    (message,) = rows[0]["prompt"]
    assert message["role"] == "user"
    policy, judge = (AutoTokenizer.from_pretrained(out / name) for name in ("policy", "reward-model"))
    assert policy.apply_chat_template([message], tokenize=False, add_generation_prompt=True) == message["content"]
    turns = [message, {"role": "assistant", "content": " It is."}]
    text = judge.apply_chat_template(turns, tokenize=False)
    ours = load_reward_model(ModelSource(str(made_run / "train-rm")), template=None)
    question = message["content"].removeprefix("Q: ").removesuffix("\nA:")
    assert judge(text).input_ids == ours.encode(question, " It is.").ids
    script = (out / "train.sh").read_text()
    subprocess.run(["bash", "-n", str(out / "train.sh")], check=True)
    given = dict(word.split("=", 1) for word in shlex.split(script.partition("main_ppo")[2]) if "=" in word)
    wanted = {"algorithm.kl_ctrl.kl_coef": "0.07", "algorithm.gamma": "0.9", "algorithm.lam": "0.8"}
    wanted |= {"actor_rollout_ref.actor.ppo_mini_batch_size": "$MINIBATCH", "actor_rollout_ref.actor.optim.lr": "3e-05"}
    wanted |= {"actor_rollout_ref.actor.clip_ratio": "0.15", "data.train_batch_size": "8", "data.seed": "7"}
    wanted |= {"actor_rollout_ref.rollout.temperature": "0.7", "data.max_response_length": "16"}
    wanted |= {"trainer.total_training_steps": "10", "critic.model.path": "$PWD/reward-model"}
    assert {name: given[name] for name in wanted} == wanted
    assert '#   ppo.schedule: "linear"' in script
    assert "#   ppo.length_penalty: 0.01" in script
