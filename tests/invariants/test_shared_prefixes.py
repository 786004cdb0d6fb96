"""Shared prefixes change no number: groups give what each sequence alone gives, gradients included.

The judge is transformers' own attention, one sequence at a time unless a test says otherwise.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import accelerate.utils
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_cli.attention.groups import plan_groups
from rlhf_cli.attention.hugging_face import implementation
from rlhf_cli.data.examples import Example
from rlhf_cli.generation.logprobs import Projection, check_projection, completion_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.backbone import last_hidden, reads_groups
from rlhf_cli.models.loading import ModelSource, load_policy, recompute_activations
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.models.weight_loading import disable_dropout
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.ppo.forward_passes import Completions, ForwardPasses
from rlhf_cli.stages.ppo.model_loading import load_ppo_models
from rlhf_cli.stages.ppo.models import SharedBackbone
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.reward_model.data import RankedGroup
from rlhf_cli.stages.reward_model.settings import RewardModelSettings
from rlhf_cli.stages.reward_model.trainer import RewardTrainer
from rlhf_cli.stages.sft.loss import TokenCounts, check_packing, collator_for, mean_completion_nll, sft_loss
from rlhf_cli.stages.sft.settings import SFTSettings
from rlhf_cli.stages.sft.training import train_sft
from tests.stops import NeverStop

FAMILIES = ("Llama", "GPT2", "Qwen2", "GPTNeoX")
LORA = LoraSettings(rank=4, alpha=8.0)
# One prompt three times, not in a row; one that begins like it; one alone; answers that begin alike.
PROMPTS = [[5, 6, 7, 8, 9], [3], [5, 6, 7, 8, 9], [5, 6, 40], [5, 6, 7, 8, 9]]
RESPONSES = [[11, 12, 13], [14], [11, 15, 16, 17, 18, 19, 1], [20, 1], [21]]
SEQUENCES = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose attention matters."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
    if family in ("Llama", "Qwen2"):
        sizes["num_key_value_heads"] = 2
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(vocab_size=64, **sizes)
    disable_dropout(config)
    return strong(AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval())


def strong(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights: freshly made ones hardly attend to anything."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.dim() > 1 else 1.0)
    return model


def grouped(model: PreTrainedModel, backend: str = "reference") -> PreTrainedModel:
    model.set_attn_implementation(implementation(backend))
    return model


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Gradients differ by at most `tolerance` of the largest in their tensor, or of 1."""
    assert one.keys() == other.keys()
    assert one
    for name, gradient in one.items():
        bound = tolerance * max(1.0, float(other[name].abs().max()))
        assert float((gradient - other[name]).abs().max()) <= bound, name


def alone(model: PreTrainedModel) -> list[Tensor]:
    """Log-probability of each answer token, one sequence at a time, from the whole logits."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1))
    return found


def together(model: PreTrainedModel) -> list[Tensor]:
    batch = SequenceBatch.for_model(model, PROMPTS, RESPONSES)
    assert batch.layout is not None
    assert batch.layout.is_tree
    assert batch.input_ids.numel() < sum(map(len, SEQUENCES))
    hidden = completion_hidden(model, batch)
    if model.dtype == torch.float64:  # the projection's kernel computes in float32
        logits = hidden @ model.get_output_embeddings().weight.T
        found = logits.log_softmax(-1).gather(2, batch.completion_ids.unsqueeze(2)).squeeze(2)
    else:
        found = Projection.of(model).token_logprobs(hidden, batch, temperature=1.0).logprobs
    return [row[: len(response)] for row, response in zip(found, RESPONSES, strict=True)]


def weighted(logprobs: list[Tensor]) -> Tensor:
    """A loss in which every token counts differently, so that no two gradients can be exchanged unseen."""
    flat = torch.cat(logprobs)
    return (flat * torch.arange(1, len(flat) + 1) / len(flat)).sum()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients(family: str, backend: str):
    model = tiny(family)
    expected = alone(model)
    weighted(expected).backward()
    wanted = gradients(model)
    model.zero_grad()
    found = together(grouped(model, backend))
    weighted(found).backward()
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-5, rtol=1e-6)
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize(("family", "bound"), [("GPT2", 1e-11), ("GPTNeoX", 1e-11), ("Llama", 2e-6), ("Qwen2", 2e-6)])
def test_in_double_precision_nothing_is_left(family: str, bound: float):
    """Against each sequence alone under our reference: transformers' eager softmax is float32, as is its RMSNorm."""
    model = grouped(tiny(family, torch.float64))
    expected = alone(model)
    weighted(expected).backward()
    wanted = gradients(model)
    model.zero_grad()
    found = together(model)
    weighted(found).backward()
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=bound, rtol=0)
    assert_same(gradients(model), wanted, bound)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_with_adapters_and_recomputed_activations(family: str):
    model = tiny(family).requires_grad_(False)
    add_lora(model, LORA)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    weighted(expected := alone(model)).backward()
    wanted = gradients(model)
    assert all("lora_" in name for name in wanted)
    model.zero_grad()
    recompute_activations(grouped(model, "torch"))
    weighted(found := together(model)).backward()
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-5, rtol=1e-6)
    assert_same(gradients(model), wanted)


def completions_of(prompts: list[list[int]], responses: list[list[int]]) -> Completions:
    count = len(prompts)
    return Completions(["q"] * count, prompts, responses, ["a"] * count, [True] * count, torch.zeros(count))


def test_passes_of_policy_reference_and_critic_and_both_updates(tiny_llama: Path):
    """With the engine cutting micro-batches its own way under either attention."""
    seen = []
    for attention in ("sdpa", "torch"):
        torch.manual_seed(0)
        model = load_policy(ModelSource(str(tiny_llama), attention=attention))
        models = SharedBackbone(model, LoraSettings(rank=4, alpha=8.0))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                # With 0.3, gradients cancel so far that float32 rounding alone reaches 1.4e-5 on AVX2.
                torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(len(name)))
        torch.nn.init.normal_(models.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(9))
        engine = ForwardPasses(models, autocast=nullcontext, micro_batch_size=3, temperature=0.7)
        answers = completions_of(PROMPTS, RESPONSES)
        passes = engine.rollout_tensors(answers)
        for rows in engine.micro_batches(answers, range(5)):
            batch = engine.batch(answers, rows)
            assert (batch.layout is None) == (attention == "sdpa")
            with models.policy() as policy:
                engine.logprobs(policy, batch).logprobs.sum().backward()
            with models.critic() as critic:
                engine.values(critic, batch).square().sum().backward()
        gradient = {
            str(number): weight.grad
            for number, weight in enumerate([*models.policy_parameters(), *models.critic_parameters()])
        }
        seen.append((passes, gradient))
    (padded, wanted), (ours, got) = seen
    for field in dataclasses.fields(padded):
        torch.testing.assert_close(getattr(ours, field.name), getattr(padded, field.name), atol=1e-5, rtol=1e-5)
    assert padded.values.abs().max() > 0.1
    assert not torch.allclose(padded.logprobs, padded.reference_logprobs, atol=1e-3)
    assert_same(got, wanted)


def test_micro_batches_keep_answers_of_a_prompt_together(tiny_llama: Path):
    model = load_policy(ModelSource(str(tiny_llama), attention="torch"))
    models = SharedBackbone(model, LoraSettings(rank=4, alpha=8.0))
    engine = ForwardPasses(models, autocast=nullcontext, micro_batch_size=2, temperature=1.0)
    answers = completions_of([[7, 8], [3, 4], [7, 8], [3, 4]], [[1], [2, 2, 2], [3, 3, 3], [4]])
    assert [set(rows) for rows in engine.micro_batches(answers, range(4))] == [{1, 3}, {0, 2}]


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapter"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_rewards_and_their_gradients(name: str, lora, request: pytest.FixtureRequest):
    folder = str(request.getfixturevalue(name))
    prompts = ["Why is the sky blue?", "hi", "Why is the sky blue?", "Why is it so?", "Why is the sky blue?"]
    completions = ["Because.", "hello", "Because air scatters light.", "", "It is not."]
    reward_model = new_reward_model(ModelSource(folder, attention="torch"), template=None, lora=lora)
    judge = new_reward_model(ModelSource(folder, attention="eager"), template=None, lora=lora)
    judge.load_state_dict(reward_model.state_dict())
    encoded = [reward_model.encode(*pair) for pair in zip(prompts, completions, strict=True)]
    batch = reward_model.batch(encoded)
    assert batch.layout is not None
    assert batch.layout.is_tree
    rewards = reward_model(batch)
    expected = torch.cat([judge(judge.batch([one])) for one in encoded])
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-6)
    assert len(set(rewards.tolist())) == 5
    scale = torch.arange(1.0, 6.0)
    (rewards * scale).sum().backward()
    (expected * scale).sum().backward()
    assert_same(gradients(reward_model), gradients(judge))
    for size in (1, 2, 32):
        assert reward_model.score(prompts, completions, batch_size=size) == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_reward_model_on_the_policys_backbone_takes_groups_too(tiny_llama: Path, tmp_path: Path):
    save_reward_model(new_reward_model(ModelSource(str(tiny_llama)), template=None, lora=LORA), tmp_path)
    source = ModelSource(str(tiny_llama), attention="torch")
    reward = load_ppo_models(source, PPOSettings(lora=LORA), reward_path=str(tmp_path), template=None).reward_model
    assert reward is not None
    assert reward.is_shared
    assert reward.model.reads_groups
    plain = load_reward_model(ModelSource(str(tmp_path), attention="sdpa"), template=None)
    questions, answers = ["Why?"] * 3, ["Because.", "So.", "Because of it."]
    assert reward.score(questions, answers) == pytest.approx(plain.score(questions, answers), abs=1e-5)


EXAMPLES = [
    Example([11, 12, 13], [21, 22, 0]),
    Example([14], [25, 0]),
    Example([11, 12, 13], [21, 23, 24, 25, 0]),
    Example([], [11, 12, 33, 0]),
    Example([11, 12, 13], [26, 0]),
    Example([11, 12], [13, 21, 0]),
]


@pytest.mark.parametrize("lm_coef", [0.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_counts_a_shared_prompt_once_for_each_example(family: str, lm_coef: float):
    model = tiny(family)
    completion, text = [], []
    for example in EXAMPLES:
        ids = torch.tensor(example.prompt_ids + example.completion_ids)
        losses = F.cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")
        text.append(losses)
        completion.append(losses[max(len(example.prompt_ids) - 1, 0) :])
    expected = torch.cat(completion).mean() + lm_coef * torch.cat(text).mean()
    expected.backward()
    wanted = gradients(model)
    grouped(model, "torch")
    for rows, cut in [
        ([[n] for n in range(6)], [6]),
        ([[0, 3, 2, 5], [1, 4]], [1, 1]),
        ([[0, 2, 4], [1], [3, 5]], [3]),
    ]:
        model.zero_grad()
        collate, laid_out = collator_for(model, packed=True), iter([[EXAMPLES[n] for n in row] for row in rows])
        batches = [collate([next(laid_out) for _ in range(size)]) for size in cut]
        counts = TokenCounts.of(batches)
        assert counts == TokenCounts(sum(map(len, completion)), sum(map(len, text)))
        loss = torch.zeros(())
        for batch in batches:
            part = sft_loss(model, batch, counts, lm_coef=lm_coef)
            part.backward()
            loss += part.detach()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6 * max(1.0, expected.item()))
        assert_same(gradients(model), wanted)
    nll = mean_completion_nll(model, EXAMPLES, batch_size=4, precision=torch.float32)
    assert nll == pytest.approx(torch.cat(completion).mean().item(), abs=1e-5)
    check_packing(model, family)
    check_projection(model, family)


def test_a_layout_comes_through_what_moves_batches(tiny_llama: Path):
    model = load_policy(ModelSource(str(tiny_llama), attention="torch"))
    batch = collator_for(model, packed=True)([[EXAMPLES[0], EXAMPLES[2]], [EXAMPLES[4]]])
    assert accelerate.utils.send_to_device(batch, torch.device("cpu"))["layout"] is batch["layout"]
    assert batch["layout"].is_tree


def metrics_match(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert len(one) == len(other) > 0
    for ours, theirs in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_fine_tuning_under_either_attention_has_the_same_metrics(packing: bool, tiny_llama: Path, tmp_path: Path):
    """Packed rows hold other examples where prompts repeat, so those of this run do not repeat inside a row."""
    examples = EXAMPLES if not packing else [Example([40 + n, 50 + n], [*range(60, 62 + n), 0]) for n in range(6)]
    results = []
    for attention in ("sdpa", "torch"):
        model = load_policy(ModelSource(str(tiny_llama), attention=attention), dtype=torch.float32)
        settings = SFTSettings(
            data="demonstrations.jsonl", learning_rate=1e-3, batch_size=3, epochs=2.0, micro_batch_size=2,
            packing=packing, max_length=16,
            lm_coef=0.3, checkpoint_steps=100,
        )  # fmt: skip
        work = tmp_path / attention
        work.mkdir()
        results.append(train_sft(model, examples, examples[:2], settings, seed=0, work=work, stop=NeverStop()))
    assert results[0].rows == results[1].rows
    first, second = (
        {name: value for name, value in dataclasses.asdict(result).items() if value is not None} for result in results
    )
    assert second == pytest.approx(first, rel=1e-4)
    assert {"train_loss", "eval_loss"} <= first.keys()


def test_packing_needs_fewer_rows_where_prompts_repeat(tiny_llama: Path, tmp_path: Path):
    rows = []
    for attention in ("sdpa", "torch"):
        model = load_policy(ModelSource(str(tiny_llama), attention=attention), dtype=torch.float32)
        settings = SFTSettings(
            data="demonstrations.jsonl", learning_rate=1e-3, batch_size=2, epochs=1.0, packing=True, max_length=32
        )
        examples = [Example([40] * 20, [60 + n, 61, 0]) for n in range(4)]
        work = tmp_path / attention
        work.mkdir()
        rows.append(train_sft(model, examples, [], settings, seed=0, work=work, stop=NeverStop()).rows)
    assert rows == [4, 1]


def test_reward_training_under_either_attention_has_the_same_metrics(tiny_llama: Path, tmp_path: Path):
    histories = []
    for attention in ("sdpa", "torch"):
        source = ModelSource(str(tiny_llama), attention=attention)
        reward_model = new_reward_model(source, template=None, lora=LORA)
        groups = []
        for number in range(6):
            completions = ["Because.", "Air scatters blue light.", "x" * (number + 1), "So it is."][: 2 + number % 3]
            sequences = tuple(reward_model.encode(f"Question {number}?", completion) for completion in completions)
            groups.append(RankedGroup(sequences, tuple(range(len(completions))), 0.0))
        settings = RewardModelSettings(
            learning_rate=1e-3, batch_size=3, micro_batch_size=2, epochs=2.0, warmup_share=0.0, schedule="constant",
            checkpoint_steps=100,
        )  # fmt: skip
        work = tmp_path / attention
        work.mkdir()
        trainer = RewardTrainer(reward_model, groups, settings, seed=0, work=work, stop=NeverStop())
        reward_model.train()
        histories.append([trainer.step(step).metrics for step in range(trainer.batches.steps)])
    metrics_match(histories[1], histories[0])


@pytest.mark.parametrize("samples", [1, 4])
def test_ppo_under_either_attention_has_the_same_metrics(samples: int, tiny_llama: Path, tmp_path: Path):
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.prompts import TokenizedPrompts
    from rlhf_cli.generation.sampling import Sampling
    from rlhf_cli.rewards.base import Scores
    from rlhf_cli.stages.ppo.data import PPOData
    from rlhf_cli.stages.ppo.rollout import own_sampling
    from rlhf_cli.stages.ppo.trainer import PPOTrainer

    def vowels(prompts, texts, columns):
        return Scores([sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts], {})

    histories = []
    for attention in ("sdpa", "torch"):
        source = ModelSource(str(tiny_llama), attention=attention)
        torch.manual_seed(0)
        models = SharedBackbone(load_policy(source), LoraSettings(rank=4, alpha=8.0))
        engine = ForwardPasses(models, autocast=nullcontext, micro_batch_size=4, temperature=1.0)
        settings = PPOSettings(
            steps=2, prompts_per_step=8 // samples, samples_per_prompt=samples, epochs=2, micro_batch_size=4,
            rollout_batch_size=8, max_new_tokens=6, learning_rate=1e-3, schedule="constant", ratio_limit=1e6,
        )  # fmt: skip
        texts = ["The cat sat", "Why is the sky blue?", "Bread", "A short answer"]
        policy = Policy.load(source, Sampling.resolve(own_sampling(settings)), weights=models.policy)
        prompts = TokenizedPrompts(texts, [policy.prompt_ids(text) for text in texts])
        work = tmp_path / attention
        work.mkdir()
        data = PPOData(prompts)
        trainer = PPOTrainer(models, engine, data, vowels, settings, policy=policy, seed=0, work=work, stop=NeverStop())
        histories.append([trainer.step(step).metrics for step in range(2)])
    metrics_match(histories[1], histories[0])


def test_who_takes_groups(tiny_llama: Path, tiny_t5: Path, tiny_bert: Path):
    ours = "torch"
    assert reads_groups(load_policy(ModelSource(str(tiny_llama), attention=ours)))
    assert not reads_groups(load_policy(ModelSource(str(tiny_llama), attention="sdpa")))
    t5 = load_policy(ModelSource(str(tiny_t5), attention=ours))
    assert not reads_groups(t5)
    check_projection(t5, "t5")
    bert = new_reward_model(ModelSource(str(tiny_bert), attention=ours), template=None, lora=None)
    plain = new_reward_model(ModelSource(str(tiny_bert), attention="sdpa"), template=None, lora=None)
    assert not bert.reads_groups
    pairs = ["Why?", "Why?", "Why is it so?"], ["Because.", "So it is, they say.", "No."]
    assert bert.score(*pairs) == pytest.approx(plain.score(*pairs), abs=1e-5)


def test_a_layout_never_reaches_an_attention_that_would_not_read_it():
    plan = plan_groups(SEQUENCES)
    with pytest.raises(AssertionError, match="silently ignore a layout"):
        last_hidden(tiny("Llama").get_decoder(), plan.input_ids, plan.layout)


def test_a_model_that_mixes_tokens_by_convolution_keeps_its_padding(tmp_path: Path):
    config = transformers.Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    strong(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    model = load_policy(ModelSource(str(tmp_path)))
    assert not reads_groups(model)
    batch = SequenceBatch.for_model(model, PROMPTS, RESPONSES)
    assert batch.layout is None
    found = Projection.of(model).token_logprobs(completion_hidden(model, batch), batch, temperature=1.0).logprobs
    torch.testing.assert_close(found[batch.is_completion], torch.cat(alone(model)), atol=1e-5, rtol=1e-5)
