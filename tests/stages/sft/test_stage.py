"""The `sft` stage: what it keeps out, what it writes, and the real command killed without warning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from rlhf_cli.data.splits import Split
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.sft import run as sft
from tests.chat_templates import BY_NAME, turns
from tests.stages.context import stage_context


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def demonstrations(count: int = 30) -> list[dict]:
    return [{"prompt": f"What is {n}?", "completion": f" It is {n}."} for n in range(count)]


def run(folder: Path, data: Path, model: Path | None, **settings: object) -> StageOutcome:
    """The stage in folders of its own under `folder`."""
    build = settings.pop("build", None)
    shared = settings.pop("shared", {})
    recipe = Recipe.model_validate(
        {
            "model": {"path": None if model is None else str(model), "build": build, "precision": "float32"},
            "data": {"holdout": 0.2} | shared,  # type: ignore[operator]
            "sft": {"data": str(data), "batch_size": 8, "epochs": 2, "learning_rate": 1e-2} | settings,
        }
    )
    output, work = folder / "out", folder / "work"
    output.mkdir(parents=True)
    work.mkdir()
    base = "build" if model is None else model
    return sft.run(stage_context("sft", recipe, output=output, work=work, base=base, demonstrations=data))


def test_the_artifact_is_an_ordinary_model_folder(tiny_llama: Path, tmp_path: Path):
    rows = demonstrations()
    outcome = run(tmp_path, jsonl(tmp_path / "data.jsonl", rows), tiny_llama)
    held_out = sum(Split(0.2, 0).holds_out(row["prompt"]) for row in rows)
    assert 0 < held_out < 30
    assert (outcome.metrics["records"], outcome.metrics["held_out_records"]) == (30 - held_out, held_out)
    assert outcome.metrics["eval_loss"] < outcome.metrics["eval_loss_before"]
    assert outcome.metrics["eval_perplexity"] == pytest.approx(torch.tensor(outcome.metrics["eval_loss"]).exp().item())
    assert not outcome.skipped
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "metrics.jsonl"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
    assert "skips.jsonl" not in files
    assert 0 <= outcome.metrics["written_kl"] < 1e-9
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token is None  # left as it was
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)


def test_held_out_prompts_are_not_trained_on(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rlhf_cli.stages.sft import training as engine

    seen = {}

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def watched(model, examples, held_out, settings, **named):
        seen["train"] = {tokenizer.decode(example.prompt_ids) for example in examples}
        seen["held out"] = {tokenizer.decode(example.prompt_ids) for example in held_out}
        for name in ("metrics.jsonl", "timing.jsonl"):
            (named["work"] / name).touch()
        return engine.SFTResult(1, 1, 0.0, None, None, 0)

    monkeypatch.setattr(engine, "train_sft", watched)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"")
    rows = demonstrations()
    data = jsonl(tmp_path / "data.jsonl", rows)
    run(tmp_path, data, tiny_llama, shared={"prompt_template": "<{prompt}>"}, adapter="none")
    for row in rows:
        side = "held out" if Split(0.2, 0).holds_out(row["prompt"]) else "train"
        assert f"<{row['prompt']}>" in seen[side]
    assert not seen["train"] & seen["held out"]


def test_the_setting_says_which_turns_are_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = BY_NAME["Gemma 2"].model(tmp_path / "base")
    rows = [{"messages": turns(f"What is {n}?", "Hello", "And?", "So.")} for n in range(20)]
    losses, said = [], []
    for choice in ("all", "last"):
        outcome = run(tmp_path / choice, jsonl(tmp_path / "data.jsonl", rows), model, assistant_turns=choice)
        losses.append(outcome.metrics["eval_loss_before"])
        said.append("training on 40 assistant turns in 20 demonstrations" in capsys.readouterr().err)
        ends = json.loads((tmp_path / choice / "out" / "generation_config.json").read_text())["eos_token_id"]
        assert set(ends) == set(AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(["<eos>", "<end_of_turn>"]))
    assert said == [True, False]
    assert losses[0] != losses[1], "the held-out loss counts the same turns"


def test_records_that_do_not_fit_are_skipped_and_counted(tiny_llama: Path, tmp_path: Path):
    rows = demonstrations(38)
    rows.insert(3, {"prompt": "What is long? " * 20, "completion": " this"})
    rows.insert(7, {"prompt": "What?", "completion": " This is long." * 20})
    data = jsonl(tmp_path / "data.jsonl", rows)
    limits = {"max_prompt_tokens": 40, "max_skip": 0.05}
    outcome = run(tmp_path / "ok", data, tiny_llama, shared=limits, max_length=60)
    reasons = {"prompt longer than 40 tokens": 1, "prompt and completion longer than 60 tokens": 1}
    assert outcome.skipped == reasons
    skips = [json.loads(line) for line in (tmp_path / "ok" / "out" / "skips.jsonl").read_text().splitlines()]
    assert [skip["location"] for skip in skips] == [f"{data}:4", f"{data}:8"]
    with pytest.raises(DataError, match=r"2 of 40 records \(5.00%\) would be skipped"):
        run(tmp_path / "strict", data, tiny_llama, shared=limits | {"max_skip": 0.01}, max_length=60)
    with pytest.raises(DataError, match="none of its 40 records can be used"):
        run(tmp_path / "none", data, tiny_llama, max_length=3, shared={"max_skip": 1.0})


def test_the_models_positions_bound_the_length(tiny_llama: Path, tmp_path: Path):
    rows = [*demonstrations(20), {"prompt": "long", "completion": " word" * 300}]
    outcome = run(tmp_path, jsonl(tmp_path / "data.jsonl", rows), tiny_llama, max_length=9999, shared={"max_skip": 0.1})
    assert outcome.skipped == {"prompt and completion longer than 256 tokens": 1}


def test_a_model_is_built_and_trained_in_full(tmp_path: Path):
    sizes = {
        "hidden_size": 16,
        "layers": 1,
        "heads": 2,
        "feed_forward_size": 32,
        "vocab_size": 300,
        "context_length": 64,
    }
    data = jsonl(tmp_path / "data.jsonl", demonstrations())
    for name in ("a", "b"):
        run(tmp_path / name, data, None, build=sizes, adapter="none", packing=True, max_length=64)
    first, second = ((tmp_path / name / "out" / "model.safetensors").read_bytes() for name in "ab")
    assert first == second  # the same recipe makes the same model
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "out").config.hidden_size == 16


def test_an_encoder_decoder_is_fine_tuned(tiny_t5: Path, tmp_path: Path):
    outcome = run(tmp_path, jsonl(tmp_path / "data.jsonl", demonstrations()), tiny_t5)
    assert outcome.metrics["eval_loss"] < outcome.metrics["eval_loss_before"]
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").config.model_type == "t5"


def test_conversations_and_plain_text_are_demonstrations(tiny_llama: Path, tmp_path: Path):
    talk = [
        {"messages": [{"role": "user", "content": f"Is {n} odd?"}, {"role": "assistant", "content": "Ask it."}]}
        for n in range(10)
    ]
    assert run(tmp_path / "talk", jsonl(tmp_path / "t.jsonl", talk), tiny_llama).metrics["tokens"] > 0
    text = [{"text": f"Number {n} is a number."} for n in range(10)]
    assert run(tmp_path / "text", jsonl(tmp_path / "p.jsonl", text), tiny_llama).metrics["held_out_records"] < 10


@pytest.mark.slow
def test_the_command_survives_kill_9(tiny_llama: Path, tmp_path: Path, rlhf):
    """Killed without warning after a checkpoint, the same command ends with the bytes of a run never killed."""
    data, run_dir = jsonl(tmp_path / "data.jsonl", demonstrations()), tmp_path / "killed"
    settings = {"batch_size": 4, "epochs": 24, "checkpoint_steps": 5}
    run(tmp_path / "straight", data, tiny_llama, learning_rate=2e-4, shared={"holdout": 0.1}, **settings)
    arguments = ["sft", "--model", tiny_llama, "--data", data, "--run-dir", run_dir, "--set", "model.precision=float32"]
    for name, value in settings.items():
        arguments += ["--set", f"sft.{name}={value}"]
    command = [str(Path(sys.executable).with_name("rlhf")), *map(str, arguments)]
    environment = os.environ | {"CI": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list((run_dir / ".sft.work").glob("step-0000002*/SHA256SUMS")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run_dir / "sft").exists()
    again = rlhf(*arguments)
    assert "fine-tuning: resuming from step" in again.stderr
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (run_dir / "sft" / name).read_bytes() == (tmp_path / "straight" / "out" / name).read_bytes()
    beginnings = ("sft", "tokenizing", "held-out loss", "fine-tuning", "writing the policy", "the model is prompted")
    beginnings += (
        "attention: ",
        "`throughput/mfu` is",
        "updates ",
        "checkpoints ",
        "evaluation ",
        "other ",
        "whole stage ",
    )
    said, table = again.stderr.split("\nstage  ")
    assert [line for line in said.splitlines() if line and not line.startswith(beginnings)] == []
    assert "one folder per stage" in table
