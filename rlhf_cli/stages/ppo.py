"""The `ppo` stage: from the recipe's section and the artefacts before it to a trained policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.pipeline.stage import StageContext, StageOutcome
from rlhf_cli.progress import say
from rlhf_cli.stages.common import load_prompts, model_source, prompt_format, prompt_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_cli.data.skips import SkipLog
    from rlhf_cli.data.templates import PromptFormat
    from rlhf_cli.models.actors import RewardModel
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.models.roles import Roles
    from rlhf_cli.recipe.schema import PPOSettings
    from rlhf_cli.rollout.experience import RewardFunction
    from rlhf_cli.training.ppo import PromptSet


def run(context: StageContext) -> StageOutcome:
    """Train the policy against the reward; write it merged, with its critic and its metrics."""
    import dataclasses

    import torch

    from rlhf_cli.rollout.experience import Engine
    from rlhf_cli.rollout.logprobs import check_projection
    from rlhf_cli.training.ppo import PPOTrainer
    from rlhf_cli.training.ppo_options import PPOOptions

    settings = context.recipe.ppo
    assert settings is not None
    source = model_source(context.recipe, context.inputs["sft"])
    roles, reward_model = _actors(context, settings, source)

    def autocast() -> torch.autocast:
        is_mixed = source.precision != torch.float32
        return torch.autocast(source.device.type, dtype=source.precision, enabled=is_mixed)

    with roles.reference() as model, autocast():
        check_projection(model, source.path)
        prompts, skips = _prompts(context, prompt_format(context.recipe, source), model)
    options = PPOOptions(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(PPOOptions)})
    engine = Engine(
        roles, autocast=autocast, micro_batch_size=settings.micro_batch_size, temperature=settings.temperature
    )
    trainer = PPOTrainer(
        roles,
        engine,
        prompts,
        _reward(settings, reward_model),
        options,
        seed=context.recipe.seed,
        work=context.work,
        metrics=context.work / "metrics.jsonl",
        stop=context.stop,
    )
    history = trainer.train()
    _save(context.output, roles, source, settings)
    (context.output / "metrics.jsonl").write_bytes((context.work / "metrics.jsonl").read_bytes())
    if skips.total:
        skips.write(context.output / "skips.jsonl")
    return _outcome(history, dict(skips.counts))


def _actors(context: StageContext, settings: PPOSettings, source: ModelSource) -> tuple[Roles, RewardModel | None]:
    from rlhf_cli.models.actors import LoraShape, separate_actors, shared_actors

    reward_path = context.inputs.get("train-rm")
    if reward_path is None and not settings.rewards:
        raise UsageError(
            "`ppo` has no reward: no reward model and no function",
            hint="name one with `--set ppo.reward_model=PATH`, or give `ppo.rewards`",
        )
    arguments = {
        "reward_path": reward_path,
        "template": prompt_template(context.recipe, source.path),
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    if settings.adapter == "none":
        roles, reward = separate_actors(source, **arguments)
        say("ppo: policy, reference and critic are separate models, all weights trained")
        return roles, reward
    lora = LoraShape(settings.lora.rank, settings.lora.alpha, settings.lora.target_modules)
    roles, reward = shared_actors(source, lora, **arguments)
    place = "no model" if reward is None else ("an adapter on it too" if reward.is_shared else "a model of its own")
    say(f"ppo: policy, critic and reference share one backbone; the reward is {place}")
    return roles, reward


def _reward(settings: PPOSettings, model: RewardModel | None) -> RewardFunction:
    """The sum of the reward model's and the functions' rewards, all given as text."""
    from rlhf_cli.rewards.checks import finite_scores
    from rlhf_cli.rewards.functions import load_scoring_function

    functions = [(load_scoring_function(entry.function), entry.weight) for entry in settings.rewards if entry.function]

    def reward(prompts, texts, ended) -> list[float]:
        total = [0.0] * len(texts) if model is None else model.score(prompts, texts)
        for function, weight in functions:
            total = [
                sum_ + weight * score
                for sum_, score in zip(total, finite_scores(function, prompts, texts), strict=True)
            ]
        return total

    return reward


def _prompts(context: StageContext, form: PromptFormat, model: PreTrainedModel) -> tuple[PromptSet, SkipLog]:
    """The prompts that are not held out, with what sampling needs to know."""
    from rlhf_cli.data.records import is_held_out
    from rlhf_cli.rollout.sampling import stop_ids
    from rlhf_cli.training.ppo import PromptSet

    recipe = context.recipe
    assert recipe.ppo is not None
    loaded = load_prompts(context, form, model.config, max_new_tokens=recipe.ppo.max_new_tokens)
    training = [
        (prompt, ids)
        for prompt, ids in zip(loaded.prompts, loaded.ids, strict=True)
        if not is_held_out(prompt, recipe.data.holdout, recipe.seed)
    ]
    if not training:
        raise DataError(
            f"{context.inputs['prompts']}: no prompt is left to train on: all {len(loaded.prompts):,} are held out",
            hint="give more prompts, or lower `data.holdout`",
        )
    prompts, ids = zip(*training, strict=True)
    return PromptSet(prompts, ids, form.tokenizer, stop_ids(model, form.tokenizer)), loaded.skips


def _save(output: Path, roles: Roles, source: ModelSource, settings: PPOSettings) -> None:
    """The policy as an ordinary model folder, merged in float32 from the SFT weights as they are on disk."""
    import torch

    from rlhf_cli.models.adapters import add_lora, load_adapter_state, merge_lora
    from rlhf_cli.models.loading import load_config, load_policy, load_tokenizer
    from rlhf_cli.models.saving import save_model_folder

    roles.save_critic(output / "critic")
    load_tokenizer(source).save_pretrained(output / "critic")
    trained = {key.removeprefix("policy."): value for key, value in roles.state().items() if key.startswith("policy.")}
    model = load_policy(source, dtype=torch.float32)
    if settings.adapter == "lora":
        lora = settings.lora
        add_lora(model, rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules, name="policy")
        load_adapter_state(model, trained, "policy")
        merge_lora(model, "policy")
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(trained[name])
    stored = load_config(source).dtype
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    save_model_folder(model, load_tokenizer(source), output, dtype=dtype)


def _outcome(history: list[dict[str, float]], skipped: dict[str, int]) -> StageOutcome:
    """First and last tenth of the run, since a single step's mean is noisy."""
    width = max(1, len(history) // 10)

    def mean(name: str, steps: list[dict[str, float]]) -> float:
        return sum(metrics[name] for metrics in steps) / len(steps)

    first, last = history[:width], history[-width:]
    metrics = {
        "objective/scores_first": mean("objective/scores", first),
        "objective/scores": mean("objective/scores", last),
        "objective/kl": mean("objective/kl", last),
        "objective/entropy": mean("objective/entropy", last),
        "length/mean": mean("length/mean", last),
        "policy/clipfrac_avg": mean("policy/clipfrac_avg", last),
        "val/explained_variance": mean("val/explained_variance", last),
        "episode": history[-1]["episode"],
    }
    summary = [
        ("reward", f"{metrics['objective/scores_first']:.2f} -> {metrics['objective/scores']:.2f}"),
        ("KL", f"{metrics['objective/kl']:.1f} nats an answer"),
        ("answers", f"{metrics['episode']:,.0f}"),
    ]
    return StageOutcome(metrics=metrics, skipped=skipped, summary=summary)
