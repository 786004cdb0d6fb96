"""Every family of policies goes through PPO's passes, adapted and in full, and comes out as its own tools read it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from rlhf_cli.data.examples import Example
from rlhf_cli.generation import torch_generator
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.logprobs import check_projection, completion_hidden
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.stages.ppo.forward_passes import Completions, ForwardPasses
from rlhf_cli.stages.ppo.model_loading import load_ppo_models
from rlhf_cli.stages.ppo.model_saving import save_ppo_models
from rlhf_cli.stages.ppo.models import PPOModels, SharedBackbone
from rlhf_cli.stages.ppo.settings import PPOSettings

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "neox", "t5", "bart")
TEXTS = ["x", "The cat sat", "Please tell me how bread is baked", "Why is the sky blue?", "so"]
SETTINGS = {"lora": {"adapter": "lora", "lora": {"rank": 4, "alpha": 8.0}}, "none": {"adapter": "none"}}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(params=["lora", "none"])
def models(request: pytest.FixtureRequest, folder: Path) -> PPOModels:
    settings = PPOSettings.model_validate(SETTINGS[request.param])
    made = load_ppo_models(ModelSource(str(folder)), settings, reward_path=None, template=None).models
    torch.manual_seed(2)
    torch.nn.init.normal_(made.value_head.weight)
    return made


def engine(models: PPOModels, size: int = 8) -> ForwardPasses:
    return ForwardPasses(models, autocast=nullcontext, micro_batch_size=size, temperature=1.0)


def completions(models: PPOModels, folder: Path, *, length: int = 5) -> tuple[Completions, torch.Tensor]:
    """Completions to prompts of uneven length, sampled in one batch, with the log-probability of each drawn token."""
    tokenizer = load_tokenizer(ModelSource(str(folder)))
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    drawn: list[torch.Tensor] = []
    plain = torch_generator.draw
    policy = Policy.load(ModelSource(str(folder)), Sampling(max_new_tokens=length), weights=models.policy)
    policy.stop_ids = set()  # all completions have the same length

    def watched(logits: torch.Tensor, uniforms: torch.Tensor, **arguments: float) -> torch.Tensor:
        tokens = plain(logits, uniforms, **arguments)
        drawn.append(logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1))[:, 0])
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_generator, "draw", watched)
        requests = [Request(ids, seed) for seed, ids in enumerate(prompts)]
        samples = torch_generator.TorchGenerator().generate(policy, requests)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found = torch.zeros(len(prompts), length)
    found[order] = torch.stack(drawn, dim=1)
    ids = [sample.ids for sample in samples]
    return Completions(TEXTS, prompts, ids, TEXTS, [False] * len(TEXTS), torch.zeros(len(TEXTS))), found


def test_the_first_step_is_at_kl_0_and_ratio_1(models: PPOModels, folder: Path):
    """Dropout (4) and positions (6): policy, reference and sampler agree, however completions share a batch."""
    given, drawn_at = completions(models, folder)
    before = engine(models).rollout_tensors(given)
    torch.testing.assert_close(before.reference_logprobs, before.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn_at, before.logprobs, atol=1e-5, rtol=0)
    for rows in ([4, 0], [1, 2, 3]):
        part = engine(models, 3)
        with models.policy() as model, torch.no_grad():
            model.train()
            now = part.logprobs(model, part.batch(given, rows)).logprobs
            model.eval()
        torch.testing.assert_close(now, before.logprobs[rows], atol=1e-5, rtol=0)
        with models.critic() as model, torch.no_grad():
            values = part.values(model, part.batch(given, rows))
        torch.testing.assert_close(values, before.values[rows], atol=1e-4, rtol=1e-4)
    assert before.values.std() > 1e-2


def test_gradients_reach_what_trains_and_nothing_else(models: PPOModels, folder: Path):
    given, _ = completions(models, folder)
    passes = engine(models)
    batch = passes.batch(given, range(len(TEXTS)))
    perturb(models)  # while B = 0, A has no gradient
    with models.policy() as model:
        passes.logprobs(model, batch).logprobs.sum().backward()
    # The bias of keys cancels in the softmax.
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in models.policy_parameters())
    assert sum(bool(p.grad.any()) for p in models.policy_parameters()) >= 0.8 * len(models.policy_parameters())
    assert not any(p.grad is not None for p in models.critic_parameters())
    with models.critic() as model:
        passes.values(model, batch).sum().backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in models.critic_parameters()) >= 0.8 * len(
        models.critic_parameters()
    )
    with models.reference() as reference:
        trained = {id(parameter) for parameter in [*models.policy_parameters(), *models.critic_parameters()]}
        assert not any(p.grad is not None for p in reference.parameters() if id(p) not in trained)


def perturb(models: PPOModels) -> None:
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in [*models.policy_parameters(), *models.critic_parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(5, 17).reshape(2, 6)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def test_policy_and_critic_are_read_by_the_auto_classes_and_peft(models: PPOModels, folder: Path, tmp_path: Path):
    """Keys that from_pretrained reads, with the value head beside them (22)."""
    perturb(models)
    is_lora = isinstance(models, SharedBackbone)
    settings = PPOSettings.model_validate(SETTINGS["lora" if is_lora else "none"])
    kind = AutoModelForSeq2SeqLM if folder.name in ("tiny-t5", "tiny-bart") else AutoModelForCausalLM
    with models.policy() as model:
        trained = logits(model)
        start = getattr(model.config, "decoder_start_token_id", None)
        is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with models.reference() as model:
        assert (logits(model) - trained).abs().max() > 1e-3
    batch = SequenceBatch.of([[5, 6], [7]], [[8, 9, 10], [11]], torch.device("cpu"), decoder_start=start)
    with models.critic() as model, torch.no_grad():
        hidden = completion_hidden(model, batch)
    probe = [Example([5, 6], [7, 8])]
    assert (
        save_ppo_models(
            models, ModelSource(str(folder)), settings, tmp_path, probe=probe, sampling=Sampling(), stop_ids=[2]
        )
        < 1e-9
    )
    read = kind.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(read.eval()), trained, atol=1e-5, rtol=1e-4)
    assert (read.get_input_embeddings().weight is read.get_output_embeddings().weight) == is_tied
    if is_lora:
        policy = PeftModel.from_pretrained(kind.from_pretrained(folder), tmp_path / "adapter")
        torch.testing.assert_close(logits(policy.get_base_model().eval()), trained, atol=1e-5, rtol=1e-4)
        critic = PeftModel.from_pretrained(kind.from_pretrained(folder), tmp_path / "critic").get_base_model()
    else:
        critic = AutoModel.from_pretrained(tmp_path / "critic")
    with torch.no_grad():
        torch.testing.assert_close(completion_hidden(critic.eval(), batch), hidden, atol=1e-5, rtol=1e-4)


def test_its_logits_are_the_ones_we_compute(folder: Path):
    check_projection(load_policy(ModelSource(str(folder))), folder.name)
