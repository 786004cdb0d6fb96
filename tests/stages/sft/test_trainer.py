"""Training from the inside: every setting has its effect, a run resumes bit for bit, nothing diverges unseen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from rlhf_cli.data.examples import Example
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import DivergedError, Interrupted, ModelError, UsageError
from rlhf_cli.models.adapter_layers import adapter_layers
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.lora import merge_lora
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.sft import trainer as sft_trainer
from rlhf_cli.stages.sft.settings import SFTSettings
from rlhf_cli.stages.sft.training import SFTResult, train_sft
from tests.stops import NeverStop, StopAtStep

EXAMPLES = [
    Example([3 + n, 11, 12 + n % 3], [20 + n % 5, 26, 22 + n % 7, *range(30, 30 + n % 4), 1]) for n in range(12)
]
DEFAULTS = {
    "data": "demonstrations.jsonl",
    "learning_rate": 1e-2,
    "batch_size": 4,
    "epochs": 2.0,
    "micro_batch_size": 4,
    "checkpoint_steps": 2,
    "warmup_share": 0.0,
}
LORA = LoraSettings()


def train(
    folder: Path,
    work: Path,
    settings: SFTSettings | None = None,
    *,
    stop: StopRequest | None = None,
    held_out=(),
    seed=0,
    **named,
) -> tuple[PreTrainedModel, SFTResult]:
    model = load_policy(ModelSource(str(folder)), dtype=torch.float32)
    work.mkdir(exist_ok=True, parents=True)
    result = train_sft(
        model, EXAMPLES, held_out, settings or with_(), seed=seed, work=work, stop=stop or NeverStop(), name="tiny",
        **named,
    )  # fmt: skip
    if adapter_layers(model):
        merge_lora(model)
    return model, result


def with_(lora: LoraSettings | None = LORA, **changes: object) -> SFTSettings:
    """The settings of most tests with some changed; without `lora`, all weights train."""
    adapter = {"adapter": "none"} if lora is None else {"lora": lora}
    return SFTSettings(**DEFAULTS | adapter | changes)


def weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def log(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
@pytest.mark.parametrize("lora", [LoraSettings(rank=4), None])
def test_training_lowers_the_loss_and_leaves_an_ordinary_model(
    name: str, lora: LoraSettings | None, request, tmp_path: Path
):
    folder = request.getfixturevalue(name)
    model, result = train(folder, tmp_path, with_(lora=lora, epochs=6.0), held_out=EXAMPLES[:3])
    assert result.steps == 18
    assert result.eval_loss_before is not None
    assert result.eval_loss is not None
    assert result.eval_loss < result.eval_loss_before - 0.1
    kind = AutoModelForSeq2SeqLM if name == "tiny_t5" else AutoModelForCausalLM
    fresh = kind.from_pretrained(folder)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert "forward" not in vars(model)
    assert not model.training
    assert model.generation_config.to_dict() == fresh.generation_config.to_dict()
    assert model.config.use_cache == fresh.config.use_cache
    assert model.config.pad_token_id == fresh.config.pad_token_id
    assert result.train_loss == pytest.approx(sum(row["loss"] for row in log(tmp_path)) / 18)


def test_neither_a_token_budget_nor_a_pass_without_memory_changes_anything(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from rlhf_cli.stages.sft import trainer as sft_trainer

    plain = sft_trainer.sft_loss

    def limited(model, batch, *arguments, **named):
        loss = plain(model, batch, *arguments, **named)
        if len(batch["targets"]) > 40:
            loss.backward()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    results = []
    for changes in ({}, {"micro_batch_tokens": 40}, {"micro_batch_size": 8}):
        options = with_(batch_size=8, lora=None, epochs=1.0, learning_rate=1e-3, **changes)
        with monkeypatch.context() as patched:
            if "micro_batch_size" in changes:
                patched.setattr(sft_trainer, "sft_loss", limited)
            model, _ = train(tiny_llama, tmp_path / str(len(results)), options)
        results.append(weights(model))
    for other in results[1:]:
        assert torch.allclose(results[0], other, atol=2e-5)


@pytest.mark.parametrize("lm_coef", [0.0, 0.5])
def test_the_micro_batch_changes_nothing(lm_coef: float, tiny_llama: Path, tmp_path: Path):
    results = {}
    for micro in (8, 4, 3, 1):
        options = with_(
            batch_size=8, micro_batch_size=micro, lm_coef=lm_coef, lora=None, epochs=1.0, learning_rate=1e-3
        )
        model, _ = train(tiny_llama, tmp_path / str(micro), options)
        results[micro] = (log(tmp_path / str(micro)), weights(model))
    for micro in (4, 3, 1):
        for ours, theirs in zip(results[micro][0], results[8][0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        assert torch.allclose(results[micro][1], results[8][1], atol=2e-5)


@pytest.mark.parametrize("lora", [LoraSettings(rank=4, dropout=0.2), None], ids=["lora with dropout", "all weights"])
def test_resumed_equals_uninterrupted(lora: LoraSettings | None, tiny_llama: Path, tmp_path: Path):
    options = with_(lora=lora, schedule="cosine", warmup_share=0.3, weight_decay=0.1)
    straight, _ = train(tiny_llama, tmp_path / "straight", options)
    with pytest.raises(Interrupted):
        train(tiny_llama, tmp_path / "broken", options, stop=StopAtStep(3))
    assert len(log(tmp_path / "broken")) == 3
    resumed, result = train(tiny_llama, tmp_path / "broken", options)
    assert torch.equal(weights(resumed), weights(straight))
    assert log(tmp_path / "broken") == log(tmp_path / "straight")
    assert result.steps == 6


def test_a_run_stopped_at_its_last_step_is_finished_by_the_next(tiny_llama: Path, tmp_path: Path):
    straight, expected = train(tiny_llama, tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(tiny_llama, tmp_path / "broken", stop=StopAtStep(6))
    resumed, result = train(tiny_llama, tmp_path / "broken")
    assert torch.equal(weights(resumed), weights(straight))
    assert result == expected


def test_a_damaged_checkpoint_is_passed_over(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    straight, _ = train(tiny_llama, tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(tiny_llama, tmp_path / "broken", stop=StopAtStep(5))
    newest = tmp_path / "broken" / "step-00000005" / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resumed, _ = train(tiny_llama, tmp_path / "broken")
    message = capfd.readouterr().err
    assert "does not match its checksum" in message
    assert "resuming from step 4 of 6" in message
    assert torch.equal(weights(resumed), weights(straight))


def test_checkpoints_hold_no_pickle_and_only_what_is_trained(tiny_llama: Path, tmp_path: Path):
    train(tiny_llama, tmp_path, with_(lora=LoraSettings(rank=2)))
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    names = ("SHA256SUMS", "state.json", "tensors.safetensors")
    assert files == {"metrics.jsonl", "timing.jsonl"} | {f"step-0000000{n}/{name}" for n in (4, 6) for name in names}
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "step-00000006" / "tensors.safetensors")
    assert all(".lora_" in key for key in stored if not key.startswith("optimizer/"))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_warms_up_and_follows_the_schedule(schedule, expected, tiny_llama: Path, tmp_path: Path):
    train(tiny_llama, tmp_path, with_(schedule=schedule, warmup_share=1 / 3, learning_rate=1e-4))
    assert [row["learning_rate"] / 1e-4 for row in log(tmp_path)] == pytest.approx(expected, abs=1e-5)


def test_each_setting_has_its_effect(tiny_llama: Path, tmp_path: Path):
    base, _ = train(tiny_llama, tmp_path / "base", with_(lora=None))
    untrained = weights(load_policy(ModelSource(str(tiny_llama))))
    moved = (weights(base) - untrained).norm()
    # AdamW divides a gradient by its own size, so a bound far under its epsilon keeps everything in place.
    bounded, _ = train(tiny_llama, tmp_path / "bounded", with_(lora=None, max_grad_norm=1e-14))
    assert (weights(bounded) - untrained).norm() < 1e-3 * moved
    decayed, _ = train(tiny_llama, tmp_path / "decayed", with_(lora=None, weight_decay=5.0))
    assert decayed.lm_head.weight.norm() < 0.9 * base.lm_head.weight.norm()
    assert decayed.model.norm.weight.norm() > 0.95 * base.model.norm.weight.norm(), "norms and biases do not decay"
    for name, change, seed in (("seed", {}, 1), ("lm", {"lm_coef": 2.0}, 0)):
        other, _ = train(tiny_llama, tmp_path / name, with_(lora=None, **change), seed=seed)
        assert not torch.equal(weights(other), weights(base)), name
    small, _ = train(tiny_llama, tmp_path / "lora", with_(lora=LoraSettings(rank=2, target_modules=["q_proj"])))
    before = load_policy(ModelSource(str(tiny_llama))).state_dict()
    changed = {key.split(".")[-2] for key, value in small.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"q_proj"}


@pytest.mark.parametrize("lora", [LoraSettings(rank=4), None])
def test_gradient_checkpointing_recomputes_and_changes_nothing(lora, tiny_llama: Path, tmp_path: Path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = SimpleNamespace(count=0)
    forward = LlamaMLP.forward

    def counted(self, x):
        calls.count += self.training
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    plain, _ = train(tiny_llama, tmp_path / "plain", with_(lora=lora))
    once, calls.count = calls.count, 0
    again, _ = train(tiny_llama, tmp_path / "again", with_(lora=lora, gradient_checkpointing=True))
    assert calls.count == 2 * once == 2 * 6 * 2
    assert torch.allclose(weights(plain), weights(again), atol=1e-6)
    assert not again.is_gradient_checkpointing


def test_precision_is_that_of_the_products(tiny_llama: Path, tmp_path: Path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    seen = set()
    forward = LlamaMLP.forward

    def watched(self, x):
        out = forward(self, x)
        seen.add((out.dtype, self.up_proj.weight.dtype))
        return out

    monkeypatch.setattr(LlamaMLP, "forward", watched)
    model, result = train(tiny_llama, tmp_path / "b", with_(lora=None), precision=torch.bfloat16)
    # The first: the check of decoding.
    assert seen == {(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert result.skipped_steps == 0


def test_the_models_own_special_tokens_are_left(tiny_llama: Path, tmp_path: Path):
    model = load_policy(ModelSource(str(tiny_llama)))
    model.generation_config.eos_token_id = [7, 0]  # a model may end its turns in several ways
    train_sft(model, EXAMPLES, [], with_(), seed=0, work=tmp_path, stop=NeverStop())
    assert model.generation_config.eos_token_id == [7, 0]
    assert (model.config.bos_token_id, model.config.pad_token_id) == (None, None)


def test_packing_trains_on_every_example(tiny_llama: Path, tmp_path: Path):
    _, result = train(tiny_llama, tmp_path, with_(packing=True, max_length=32, epochs=8.0), held_out=EXAMPLES[:3])
    tokens = sum(len(example) for example in EXAMPLES)
    assert tokens / 32 <= result.rows <= tokens / 32 + 1.5
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before - 0.1


def test_one_bad_step_is_skipped_and_counted(tiny_llama: Path, tmp_path: Path, monkeypatch, capfd):
    loss = sft_trainer.sft_loss
    calls = SimpleNamespace(count=0)

    def sometimes_nan(*arguments, **settings):
        calls.count += 1
        return loss(*arguments, **settings) * (float("nan") if calls.count == 2 else 1.0)

    monkeypatch.setattr(sft_trainer, "sft_loss", sometimes_nan)
    model, result = train(tiny_llama, tmp_path)
    assert result.skipped_steps == 1
    assert torch.isfinite(weights(model)).all()
    assert [row["loss"] is None for row in log(tmp_path)] == [False, True, False, False, False, False]
    assert "step 2: an optimizer step is skipped" in capfd.readouterr().err


def test_a_loss_that_stays_nan_rolls_back_once_and_then_ends_the_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch, capfd
):
    loss = sft_trainer.sft_loss
    monkeypatch.setattr(sft_trainer, "sft_loss", lambda *a, **k: loss(*a, **k) * float("nan"))
    with pytest.raises(DivergedError, match="skipped in steps 1 to 3"):
        train(tiny_llama, tmp_path)
    assert capfd.readouterr().err.count("rolling back to step 0 with half the learning rate") == 1


def test_a_divergence_rolls_back_to_the_last_checkpoint_with_half_the_learning_rate(
    tiny_llama: Path, tmp_path: Path, monkeypatch
):
    loss = sft_trainer.sft_loss
    calls = SimpleNamespace(count=0)

    def nan_for_a_while(*arguments, **settings):
        calls.count += 1
        return loss(*arguments, **settings) * (float("nan") if 3 <= calls.count <= 5 else 1.0)

    monkeypatch.setattr(sft_trainer, "sft_loss", nan_for_a_while)
    model, result = train(tiny_llama, tmp_path, with_(schedule="constant"))
    assert calls.count == 2 + 3 + 4
    assert result.skipped_steps == 3
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in log(tmp_path)] == [1e-2] * 2 + [5e-3] * 4
    assert torch.isfinite(weights(model)).all()


def test_what_cannot_be_trained_is_refused_by_name(tiny_t5: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="`tiny` is an encoder-decoder"):
        train(tiny_t5, tmp_path, with_(packing=True))
    with pytest.raises(UsageError, match=r"`sft.lm_coef: 0.5` needs a decoder-only model"):
        train(tiny_t5, tmp_path, with_(lm_coef=0.5))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_t5"])
def test_nothing_of_the_libraries_is_shown(name: str, request, tmp_path: Path, capfd, recwarn):
    folder = request.getfixturevalue(name)
    capfd.readouterr()
    train(folder, tmp_path, held_out=EXAMPLES[:3])
    shown = capfd.readouterr()
    assert shown.out == ""
    ours = ("held-out loss before:", "held-out loss after:", "fine-tuning:")
    assert [
        line for line in shown.err.splitlines() if not line.startswith(ours) and "Loading weights" not in line
    ] == []
    assert [str(warning.message) for warning in recwarn] == []
