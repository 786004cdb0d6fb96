"""What PPO's critic starts from, in both of its forms, and that a saved one is the same critic again."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.models.adapter_layers import adapter_layers
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.pipeline.preflight import check_models_of_run
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.inputs import Input
from rlhf_cli.stages.ppo import critic_files
from rlhf_cli.stages.ppo.critic_files import check_saved_critic
from rlhf_cli.stages.ppo.forward_passes import Completions, ForwardPasses
from rlhf_cli.stages.ppo.model_loading import LoadedPPOModels, load_ppo_models
from rlhf_cli.stages.ppo.models import PPOModels, SharedBackbone
from rlhf_cli.stages.ppo.settings import PPOSettings

LORA = LoraSettings(rank=4, alpha=8.0)
PROMPTS = ["What is bread?", "Why?"]
ANSWERS = ["Flour and water.", "Because air scatters light."]


def load(
    folder: Path, reward: Path | None = None, *, adapter: str = "lora", seed: int = 0, **settings
) -> LoadedPPOModels:
    lora = {"lora": LORA} if adapter == "lora" else {}
    return load_ppo_models(
        ModelSource(str(folder)),
        PPOSettings(adapter=adapter, **lora, **settings),
        reward_path=None if reward is None else str(reward),
        template=None,
        seed=seed,
    )


def reward_model(base: Path, folder: Path, *, adapter: bool = True) -> Path:
    """A reward model with random weights and a scale of its own."""
    lora = LoraSettings(rank=4, alpha=8.0) if adapter else None
    reward_model = new_reward_model(ModelSource(str(base)), template=None, lora=lora, seed=3)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reward_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        reward_model.bias += 0.7
    reward_model.mean, reward_model.std = 0.4, 2.0
    folder.mkdir()
    save_reward_model(reward_model, folder)
    return folder


def values(models: PPOModels, folder: Path) -> torch.Tensor:
    """What the passes of a step give for two answers: (2, T)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts, answers = ([tokenizer(text).input_ids for text in texts] for texts in (PROMPTS, ANSWERS))
    given = Completions(PROMPTS, prompts, answers, ANSWERS, [True] * 2, torch.zeros(2))
    forward_passes = ForwardPasses(models, autocast=nullcontext, micro_batch_size=8, temperature=1.0)
    return forward_passes.rollout_tensors(given).values


def value_at_the_end(made: LoadedPPOModels, folder: Path) -> tuple[float, float]:
    """The critic's value once a whole answer was read, and the reward of that answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reward = made.reward_model
    assert reward is not None
    ids = reward.model.format.pair_ids(PROMPTS[0], ANSWERS[0])
    # One token more than the answer, since a value is read before its token.
    given = Completions(PROMPTS[:1], [ids[:4]], [[*ids[4:], tokenizer.eos_token_id]], [""], [True], torch.zeros(1))
    forward_passes = ForwardPasses(made.models, autocast=nullcontext, micro_batch_size=8, temperature=1.0)
    return float(forward_passes.rollout_tensors(given).values[0, -1]), reward.score(PROMPTS[:1], ANSWERS[:1])[0]


def move(models: PPOModels) -> None:
    """As if the critic had trained."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in models.critic_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("policy", ["lora", "none"], ids=["LoRA policy", "full policy"])
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full reward model"])
def test_a_separate_critic_starts_as_the_reward_model(adapter, policy, tiny_llama, tmp_path):
    reward = reward_model(tiny_llama, tmp_path / "rm", adapter=adapter)
    made = load(tiny_llama, reward, adapter=policy, critic="separate")
    value, expected = value_at_the_end(made, tiny_llama)
    assert value == pytest.approx(expected, abs=1e-5)
    assert abs(value) > 0.01
    assert made.notes[-1] == "the critic starts from the reward model"
    with made.models.critic() as critic, made.models.policy() as policy:
        assert critic is not policy
        assert not adapter_layers(critic)
        trained = {id(parameter) for parameter in made.models.critic_parameters()}
        assert all(parameter.requires_grad and id(parameter) in trained for parameter in critic.parameters())
        assert {parameter.dtype for parameter in critic.parameters()} == {torch.float32}


def test_a_reward_model_of_another_width_and_family_is_a_critic_where_tokens_agree(tiny_llama, tmp_path):
    """Anyone's sequence classifier of one label, without a reward.json."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(6)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    made = load(tiny_llama, tmp_path / "rm", critic="separate", critic_from="reward-model")
    assert made.models.value_head.in_features == 24
    value, expected = value_at_the_end(made, tiny_llama)
    assert value == pytest.approx(expected, abs=1e-5)


def test_beside_a_lora_policy_the_critic_is_an_adapter_and_the_reward_model_has_no_gradients(tiny_llama, tmp_path):
    """Trap 24: neither a critic trained in full nor a reward model with gradients."""
    made = load(tiny_llama, reward_model(tiny_llama, tmp_path / "rm"))
    assert made.reward_model is not None
    trained = {id(parameter) for parameter in [*made.models.policy_parameters(), *made.models.critic_parameters()]}
    with made.models.policy() as policy, made.models.critic() as critic:
        assert critic is policy
        grows = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        assert {name.split(".")[-2] for name in grows} == {"policy", "critic"}
        assert all(id(p) in trained for p in policy.parameters() if p.requires_grad)
    scores = made.reward_model.model
    assert not any(p.requires_grad for p in scores.parameters() if id(p) not in trained)
    with made.reward_model.activate():
        reward = scores(scores.batch([scores.encode(PROMPTS[0], ANSWERS[0])]))
    assert not reward.requires_grad


@pytest.mark.parametrize("policy", ["lora", "none"], ids=["LoRA policy", "full policy"])
def test_a_reward_model_loaded_apart_has_no_gradients_either(policy, tiny_llama, tiny_gpt2, tmp_path):
    made = load(tiny_llama, reward_model(tiny_gpt2, tmp_path / "rm"), adapter=policy)
    assert made.reward_model is not None
    assert not any(parameter.requires_grad for parameter in made.reward_model.model.parameters())


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_t5", "tiny_bart"])
@pytest.mark.parametrize("critic", ["adapter", "separate", "head"])
def test_a_saved_critic_gives_the_same_values_again(critic, name, request, tmp_path):
    base = request.getfixturevalue(name)
    first = load(base, critic=critic)
    move(first.models)
    expected = values(first.models, base)
    assert expected.std() > 1e-2
    first.models.save_critic(tmp_path / "critic")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "critic")
    check_saved_critic(tmp_path / "critic")
    again = load(base, critic=critic, critic_from=str(tmp_path / "critic"), seed=9)
    torch.testing.assert_close(values(again.models, base), expected, atol=0, rtol=0)
    assert again.notes[-1] == f"the critic starts from {tmp_path / 'critic'}"


def _scaled(path: Path, name: str | None = None) -> None:
    """Change one tensor of a written file a little."""
    state = load_file(path)
    key = name or sorted(state)[0]
    save_file(state | {key: state[key] * 1.001}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("critic", "file", "tensor"),
    [
        ("adapter", "adapter_model.safetensors", None),
        ("adapter", "value_head.safetensors", "weight"),
        ("separate", "model.safetensors", None),
        ("separate", "value_head.safetensors", "bias"),
        ("head", "value_head.safetensors", "weight"),
    ],
)
def test_a_critic_that_was_not_written_as_trained_is_refused(critic, file, tensor, tiny_llama, tmp_path, monkeypatch):
    made = load(tiny_llama, critic=critic)
    move(made.models)
    with torch.no_grad():
        made.models.value_head.bias.fill_(0.5)
    folder = tmp_path / "critic"

    def spoiled(*arguments):  # the head is written last
        save_file(*arguments)
        _scaled(folder / file, tensor)

    monkeypatch.setattr(critic_files, "save_file", spoiled)
    with pytest.raises(ModelError, match=r"is not the model that was trained: `.*` has other values"):
        made.models.save_critic(folder)


def test_a_critic_that_was_an_adapter_goes_on_in_full(tiny_llama, tmp_path):
    """On the SFT model's backbone, though the policy starts elsewhere: a second run of PPO."""
    first = load(tiny_llama)
    move(first.models)
    first.models.save_critic(tmp_path / "critic")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "critic")
    moved = load_policy(ModelSource(str(tiny_llama)))
    with torch.no_grad():
        moved.model.layers[0].mlp.up_proj.weight.add_(0.1)
    moved.save_pretrained(tmp_path / "ppo")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "ppo")
    start = str(tmp_path / "critic")
    for policy in ("lora", "none"):
        again = load(tmp_path / "ppo", adapter=policy, critic="separate", critic_from=start)
        torch.testing.assert_close(
            values(again.models, tiny_llama), values(first.models, tiny_llama), atol=1e-5, rtol=1e-4
        )
    with pytest.raises(ModelError, match=r"is an adapter on .* but the policy starts from") as caught:
        load(tmp_path / "ppo", critic_from=start)
    assert "ppo.critic=separate" in (caught.value.hint or "")


def test_a_run_directory_can_be_moved_with_its_critic(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "run/sft")
    models = load(tmp_path / "run/sft").models
    move(models)
    expected = values(models, tiny_llama)
    models.save_critic(tmp_path / "run/ppo/critic")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    again = load(tmp_path / "elsewhere/sft", critic_from=str(tmp_path / "elsewhere/ppo/critic"))
    torch.testing.assert_close(values(again.models, tiny_llama), expected)


def bert(request, tmp_path):
    return reward_model(request.getfixturevalue("tiny_bert"), tmp_path / "rm", adapter=False)


def other_tokens(request, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(request.getfixturevalue("tiny_llama"), folder)
    AutoTokenizer.from_pretrained(request.getfixturevalue("tiny_t5")).save_pretrained(folder)
    return reward_model(folder, tmp_path / "rm")


def fewer_embeddings(request, tmp_path):
    return _classifier(request, tmp_path, vocab_size=300)


def short(request, tmp_path):
    return _classifier(request, tmp_path, max_position_embeddings=128)


def _classifier(request, tmp_path, **changes):
    sizes = {"vocab_size": 320, "hidden_size": 24, "intermediate_size": 32, "max_position_embeddings": 256}
    config = LlamaConfig(**sizes | changes, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(request.getfixturevalue("tiny_llama")).save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


@pytest.mark.parametrize(
    ("made_by", "reason"),
    [
        (bert, "is an encoder, which reads a completion as a whole"),
        (other_tokens, "has a different tokenizer from"),
        (fewer_embeddings, "has embeddings for 300 tokens, but the policy's vocabulary has 320"),
        (short, "reads at most 128 tokens, but a prompt with its completion may have 256"),
        (lambda *_: None, "there is no reward model"),
    ],
    ids=["encoder", "other tokenizer", "fewer embeddings", "short", "none given"],
)
def test_a_reward_model_that_does_not_fit_is_refused_or_passed_over(
    made_by, reason, request, tiny_llama, tmp_path, monkeypatch
):
    reward = made_by(request, tmp_path)
    with monkeypatch.context() as unread:
        unread.setattr("rlhf_cli.stages.ppo.critic_initialization.load_weights", None)  # no weight needs to be read
        with pytest.raises(ModelError, match=f"the critic cannot start from the reward model: .*{reason}") as caught:
            load(tiny_llama, reward, critic="separate", critic_from="reward-model")
    assert "ppo.critic_from=policy" in (caught.value.hint or "")
    made = load(tiny_llama, reward, critic="separate")
    assert made.notes[-1].startswith("the critic starts from the policy and predicts 0")
    assert (reward is None) != (reason in made.notes[-1])
    assert not values(made.models, tiny_llama).any()


def test_a_reward_model_that_is_no_adapter_on_the_policy_is_no_adapter_for_its_critic(tiny_llama, tmp_path):
    reward = reward_model(tiny_llama, tmp_path / "rm", adapter=False)
    with pytest.raises(ModelError, match=r"is not an adapter on .*tiny-llama") as caught:
        load(tiny_llama, reward, critic_from="reward-model")
    assert "ppo.critic=separate" in (caught.value.hint or "")
    assert "is not an adapter on" in load(tiny_llama, reward).notes[-1]
    assert not values(load(tiny_llama, reward_model(tiny_llama, tmp_path / "a"), critic_from="policy").models,
                      tiny_llama).any()  # fmt: skip


def test_no_reward_model_reads_as_the_decoder_of_an_encoder_decoder(tiny_t5, tiny_llama, tmp_path):
    reward = reward_model(tiny_llama, tmp_path / "rm")
    with pytest.raises(ModelError, match="the policy is an encoder-decoder"):
        load(tiny_t5, reward, adapter="none", critic_from="reward-model")
    assert "the policy is an encoder-decoder" in load(tiny_t5, reward, adapter="none").notes[-1]


def test_what_is_no_saved_critic_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ModelError, match="is not a saved critic"):
        load(tiny_llama, critic_from=str(tiny_llama))
    models = load(tiny_llama, critic="separate").models
    models.save_critic(tmp_path / "critic")
    with pytest.raises(ModelError, match="is a whole model, not an adapter") as caught:
        load(tiny_llama, critic_from=str(tmp_path / "critic"))
    assert "ppo.critic=separate" in (caught.value.hint or "")
    (tmp_path / "critic/value_head.safetensors").write_bytes(b"torn")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "critic")
    with pytest.raises(ModelError, match=r"cannot read .*value_head\.safetensors"):
        load(tiny_llama, critic="separate", critic_from=str(tmp_path / "critic"))


@pytest.mark.parametrize("policy", ["lora", "none"])
def test_a_head_reads_the_policys_states_and_its_loss_reaches_the_policy(policy, tiny_llama):
    made = load(tiny_llama, adapter=policy, critic="head")
    models = made.models
    assert [*models.critic_parameters()] == [*models.value_head.parameters()]
    assert not values(models, tiny_llama).any(), "it starts at 0"
    assert "the critic is a head on the policy" in made.notes[0]
    move(models)
    before = values(models, tiny_llama)
    with torch.no_grad():
        for parameter in models.policy_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert not torch.allclose(values(models, tiny_llama), before, atol=1e-3)


@pytest.mark.parametrize("policy", ["lora", "none"])
def test_one_pass_for_policy_and_head_has_the_gradient_of_two(policy, tiny_llama):
    """Both losses add up in the gradient of the policy's weights; in warm-up the head alone learns."""
    models = load(tiny_llama, adapter=policy, critic="head").models
    move(models)
    passes = ForwardPasses(models, autocast=nullcontext, micro_batch_size=8, temperature=0.7)
    given = Completions(["x"] * 2, [[5, 6], [7, 8, 9]], [[1, 2, 3], [4, 5]], ["y"] * 2, [True] * 2, torch.zeros(2))
    batch = passes.batch(given, [0, 1])
    trained = [*models.policy_parameters(), *models.critic_parameters()]

    def gradient(*losses) -> list[torch.Tensor | None]:
        for parameter in trained:
            parameter.grad = None
        for loss in losses:
            loss().backward()
        return [None if parameter.grad is None else parameter.grad.clone() for parameter in trained]

    with models.policy() as model:
        weights = torch.randn(2, 3)

        def joint() -> torch.Tensor:
            now, predicted = passes.logprobs_and_values(model, batch)
            return (weights * now.logprobs).sum() + (weights * predicted).sum()

        together = gradient(joint)
        apart = gradient(
            lambda: (weights * passes.logprobs(model, batch).logprobs).sum(),
            lambda: (weights * passes.values(model, batch)).sum(),
        )
        for one, other in zip(together, apart, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        alone = gradient(lambda: (weights * passes.values(model, batch, trains_head_only=True)).sum())
    policy_count = len(models.policy_parameters())
    assert all(one is None for one in alone[:policy_count])
    assert all(one is not None and one.any() for one in alone[policy_count:])


def test_a_head_and_a_critic_with_weights_of_its_own_do_not_start_from_each_other(tiny_llama, tmp_path):
    for kind in ("head", "adapter", "separate"):
        load(tiny_llama, critic=kind).models.save_critic(tmp_path / kind)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / kind)
    for kind, critic in (("adapter", "head"), ("separate", "head"), ("head", "adapter"), ("head", "separate")):
        with pytest.raises(ModelError, match="a head on") as caught:
            load(tiny_llama, critic=critic, critic_from=str(tmp_path / kind))
        # `separate` starts from an adapter too, and can be chosen with `adapter: none` as well.
        assert f"ppo.critic={'head' if kind == 'head' else 'separate'}" in (caught.value.hint or "")
    with pytest.raises(ValueError, match="`critic_from: reward-model` needs `critic: adapter`"):
        PPOSettings(critic="head", critic_from="reward-model")


def _with_head(folder: Path, weight: torch.Tensor) -> None:
    save_file({"weight": weight, "bias": torch.zeros(1)}, folder / "value_head.safetensors")


def _without_config(folder: Path) -> None:
    (folder / "critic.json").unlink()


def _on_another_base(folder: Path) -> None:
    file = folder / "critic.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_sha256": "0" * 64}))


def _with_other_layers(folder: Path) -> None:
    (file,) = folder.glob("*model.safetensors")
    save_file({name.replace("layers.1.", "layers.7."): one for name, one in load_file(file).items()}, file)


def _truncated(folder: Path) -> None:
    (file,) = folder.glob("*model.safetensors")
    file.write_bytes(file.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("critic", "damage", "said"),
    [
        ("adapter", _without_config, "is not a saved critic"),
        ("separate", lambda folder: _with_head(folder, torch.zeros(2, 8)), "is not a value head"),
        ("adapter", lambda folder: _with_head(folder, torch.zeros(8)), "is not a value head"),
        ("adapter", _on_another_base, "was trained on other weights"),
        ("adapter", _with_other_layers, "layers.7"),
        ("separate", _with_other_layers, "layers.1"),
        ("adapter", _truncated, "cannot load an adapter"),
        ("separate", _truncated, "is truncated"),
    ],
)
def test_a_damaged_critic_is_found_from_its_files(critic, damage, said, tiny_llama, tmp_path):
    load(tiny_llama, critic=critic).models.save_critic(tmp_path / "critic")
    check_saved_critic(tmp_path / "critic")
    damage(tmp_path / "critic")
    given = Input("critic", str(tmp_path / "critic"), "ppo.critic_from")
    with pytest.raises(ModelError, match=said) as caught:
        check_models_of_run(Recipe(), [given])
    assert "`ppo.critic_from`" in caught.value.message
    assert caught.value.hint


def test_a_critic_that_is_not_finite_is_not_saved(tiny_llama, tmp_path):
    for critic in ("adapter", "separate"):
        models = load(tiny_llama, critic=critic).models
        with torch.no_grad():
            models.critic_parameters()[0].view(-1)[0] = torch.nan
        with pytest.raises(DivergedError, match="the critic is not saved"):
            models.save_critic(tmp_path / critic)
        assert not (tmp_path / critic).exists()


@pytest.mark.parametrize("critic", ["adapter", "separate"])
def test_state_holds_all_that_trains_and_goes_back(critic, tiny_llama):
    models, other = (load(tiny_llama, critic=critic, seed=seed).models for seed in (1, 2))
    trained = [*models.policy_parameters(), *models.critic_parameters()]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter))
    state = {name: tensor.clone() for name, tensor in models.state().items()}
    assert sum(tensor.numel() for tensor in state.values()) == sum(parameter.numel() for parameter in trained)
    other.load_state(state)
    for mine, theirs in zip(trained, [*other.policy_parameters(), *other.critic_parameters()], strict=True):
        assert torch.equal(mine, theirs)
    with models.reference() as model:
        assert model.training is False


def test_new_adapters_depend_on_the_seed_alone(tiny_llama):
    """Every process gets the same, whatever it drew before."""
    torch.manual_seed(11)
    first = load(tiny_llama, seed=3).models.state()
    torch.manual_seed(12)
    state = torch.random.get_rng_state()
    second = load(tiny_llama, seed=3).models.state()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = load(tiny_llama, seed=4).models.state()
    name = "policy.layers.0.mlp.up_proj.lora_A.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("policy", "critic")])


def test_a_model_that_carries_an_adapter_is_no_backbone(tiny_llama):
    """Trap 15: with the adapter off it would not be the model that was given."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    add_lora(model, LoraSettings(rank=2, alpha=4.0))
    with pytest.raises(ModelError, match="already carries an adapter"):
        SharedBackbone(model, LoraSettings(rank=4, alpha=8.0))


def test_an_adapter_critic_needs_an_adapter_policy(tiny_llama):
    with pytest.raises(ValueError, match="`critic: adapter` needs `adapter: lora`"):
        load(tiny_llama, adapter="none", critic="adapter")
