"""What several stages do first: resolve the recipe's settings into models, prompts and logs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import Prompt, Record, prompt_key, prompt_text, references_of
from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.data.splits import Split
from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.generation.contract import Contract, keys_of, read_contract, split_of
from rlhf_cli.generation.prompts import PromptStyle, prompt_style
from rlhf_cli.generation.sampling import Sampling, layered
from rlhf_cli.progress import warn
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import SamplingSettings
from rlhf_cli.stages.base import StageContext
from rlhf_cli.stages.sharding import sharding_size

if TYPE_CHECKING:
    from rlhf_cli.generation.policy import Policy, Weights
    from rlhf_cli.generation.prompts import TokenizedPrompts
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.models.reward_model.model import RewardModel
    from rlhf_cli.training.monitoring.metrics_log import MetricsLog
    from rlhf_cli.training.monitoring.trackers import Trackers

EXCERPT = 80
"""Characters of a prompt that identify a skipped record."""
TOO_LONG = "shorten the prompts, or raise `data.max_prompt_tokens`"
"""What to do about prompts that are longer than the recipe allows."""

CHOSEN_ON = "chosen_on.json"
"""File beside a PPO policy with the keys of the held-out prompts that chose it, which `evaluate` skips."""


def model_source(recipe: RunSettings, path: str, *, quantized: bool = False) -> ModelSource:
    """Return how the model at `path` is loaded, on this machine and in the precision that `decide_precision` left.

    `model.revision` is part of `model.path` by now, if that is on the hub. `model.trust_remote_code` applies to it and
    to what was trained from it, as `models.remote_code` says. `model.quantize` applies to the frozen weights under an
    adapter: a stage that trains one passes `quantized`.
    """
    from rlhf_cli.models.device import resolve_device
    from rlhf_cli.models.loading import DTYPES, ModelSource

    settings = recipe.model
    device = resolve_device(settings.device)
    precision = DTYPES[settings.precision]
    return ModelSource(
        path=path,
        trust_remote_code=trusts_code(recipe, path),
        dtype=precision if settings.dtype == "auto" else DTYPES[settings.dtype],
        precision=precision,
        attention=settings.attention,
        device=device,
        quantize=settings.quantize if quantized else "none",
        sharding_size=sharding_size(settings),
        sharding_cpu_offload=settings.sharding_cpu_offload,
    )


def trusts_code(recipe: RunSettings, path: str) -> bool:
    """Return whether Python code that comes with the model at `path` may run.

    Raises:
        ModelError: the code that the recipe allows is in another repository than `model.path`.
    """
    from rlhf_cli.models.remote_code import check_own_repository, has_trusted_code

    settings = recipe.model
    if not settings.trust_remote_code or settings.path is None:
        return False
    check_own_repository(settings.path)
    return path == settings.path or has_trusted_code(path, settings.path)


def inherited_sampling(recipe: RunSettings, model: str) -> SamplingSettings:
    """Return the section `sampling` of the recipe, with what it leaves open as the model at `model` was trained."""
    contract = read_contract(model)
    return recipe.sampling if contract is None else layered(recipe.sampling, contract.sampling)


def stage_sampling(context: StageContext[Any, Any], own: SamplingSettings, model: str) -> Sampling:
    """Return how a stage draws completions from the model at `model`; warns where the model was trained otherwise.

    Args:
        context: of the stage.
        own: values of the stage's section.
        model: folder or hub id.
    """
    contract = read_contract(model)
    trained = SamplingSettings() if contract is None else contract.sampling
    sampling = Sampling.resolve(own, context.recipe.sampling, trained)
    if contract is not None and contract.samples_in_training:
        different = "; ".join(sampling.differences(trained))
        if different:
            warn(f"{context.stage.name} samples with other settings than the training of {model}: {different}")
    return sampling


def load_policy(
    context: StageContext[Any, Any],
    path: str,
    sampling: Sampling,
    *,
    style: PromptStyle | None = None,
    quantized: bool = False,
    weights: Weights | None = None,
) -> Policy:
    """Return the policy at `path`; its weights are loaded when they are first used.

    With `model.sharding: fsdp` the processes divide them, and use the policy together.

    Args:
        context: of the stage.
        path: folder or hub id.
        sampling: how it draws tokens.
        style: how it is prompted; None is what the recipe says, else how it was trained.
        quantized: hold its weights as `model.quantize` says.
        weights: of a model that is in memory already; see `Policy.load`.

    Raises:
        UsageError: the recipe's prompt template differs from the one that the model was trained with.
    """
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.models.loading import as_stored, load_tokenizer

    source = model_source(context.recipe, path, quantized=quantized)
    if context.recipe.model.dtype == "auto" and weights is None:
        source = as_stored(source)
    tokenizer = load_tokenizer(source)
    style = style or prompt_style(context.recipe.data, path, tokenizer)
    divides = context.recipe.model.sharding != "none"
    return Policy.load(source, sampling, style=style, tokenizer=tokenizer, weights=weights, is_sharded=divides)


def load_reward_model(context: StageContext[Any, Any], path: str, *, policy: str | None) -> RewardModel:
    """Load the reward model at `path`, frozen; with `model.sharding: fsdp` the processes divide it, and score together.

    Args:
        context: of the stage.
        path: folder or hub id.
        policy: folder or hub id of the model that wrote what is scored; None if no model did.

    Raises:
        ModelError: several labels, no head, or damaged files.
    """
    from rlhf_cli.generation.prompts import text_template
    from rlhf_cli.models.reward_model import loading, sharded

    is_whole = context.recipe.model.sharding == "none"
    load = loading.load_reward_model if is_whole else sharded.load_divided
    return load(model_source(context.recipe, path), template=text_template(context.recipe.data, policy))


def warn_of_rounding(context: StageContext[Any, Any], source: ModelSource) -> None:
    """Warn where frozen weights that are stored in float32, after training in full, are held in bfloat16.

    Rounding may take back a part of that training that is small beside the weights. Weights that an adapter was trained
    on are held as they were in its training (docs/decisions/0010).
    """
    from rlhf_cli.models.loading import as_stored
    from rlhf_cli.models.policy_adapter import has_policy_adapter

    is_frozen = getattr(context.settings, "adapter", "none") == "lora"
    is_ours = read_contract(source.path) is not None and not has_policy_adapter(source.folder)
    if is_frozen and is_ours and source.dtype != as_stored(source).dtype:
        warn(
            f"the weights of {source.path} are stored in float32 and held in bfloat16: small changes of training may "
            "be lost; `--set model.dtype=float32` keeps them"
        )


def split_from(context: StageContext[Any, Any], model: str | None) -> Split:
    """Return which prompts are held out in a stage that starts from the model at `model`."""
    return split_of(context.recipe.data, read_contract(model) if model is not None else None)


def warn_of_trained(records: Sequence[Record], model: str, use: str) -> None:
    """Warn of held-out records with prompts that a model was trained on.

    Args:
        records: held-out records.
        model: folder or hub id of the model that the stage starts from.
        use: what the records are for, such as "the held-out loss".
    """
    contract = read_contract(model)
    if contract is None:
        return
    if seen := len(keys_of(records) & contract.trained_prompts):
        warn(
            f"{model} was trained on {seen:,} of the {len(records):,} held-out prompts, so {use} looks better than it "
            "is: remove `data.holdout` and `data.split_seed` to hold out the same prompts as in its training"
        )


def write_contract(
    context: StageContext[Any, Any],
    start: str,
    style: PromptStyle,
    sampling: SamplingSettings,
    trained: Iterable[Record],
    *,
    samples_in_training: bool = False,
) -> None:
    """Write the contract of the stage's artifact, which includes the training prompts of the model it started from.

    Args:
        context: of the stage.
        start: folder or hub id of that model.
        style: how the model is prompted.
        sampling: how its completions were drawn.
        trained: records that it was trained on.
        samples_in_training: whether it was trained on completions that were drawn in this way.
    """
    before = read_contract(start)
    keys = keys_of(trained) | (before.trained_prompts if before is not None else frozenset())
    split = split_of(context.recipe.data, before)
    Contract(style.template, style.kwargs, sampling, split, samples_in_training, keys).write(context.output)


def load_prompts(context: StageContext[Any, Any], policy: Policy, setting: str) -> tuple[TokenizedPrompts, SkipLog]:
    """Read the prompts of the stage's "prompts" input, held-out ones too, each once, and skip those that are too long.

    Args:
        context: of the stage.
        policy: that will complete them.
        setting: the setting that `policy.sampling.max_new_tokens` comes from, for messages.

    Raises:
        DataError: the source cannot be read, or too many prompts are too long.
        UsageError: completions are so long that no prompt fits.
    """
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.data.template_checks import check_records
    from rlhf_cli.data.token_lists import TokenLists
    from rlhf_cli.generation.prompts import TokenizedPrompts

    data, source = context.recipe.data, context.inputs.prompts.source
    longest = min(data.max_prompt_tokens, policy.longest_prompt(setting))
    loaded = read_records(source, "prompt", columns=data.columns, comparison=data.comparison, max_skip=data.max_skip)
    check_records(policy.format, loaded.records)
    prompts: list[Prompt] = []
    ids = TokenLists()
    seen: set[str] = set()
    for record in loaded.records:
        if (key := prompt_key(record.prompt)) in seen:
            continue
        seen.add(key)
        tokens = policy.prompt_ids(record.prompt)
        if len(tokens) > longest:
            excerpt = prompt_text(record.prompt)[:EXCERPT]
            loaded.skips.add(Skip(record.location or source, f"prompt longer than {longest:,} tokens", excerpt))
            continue
        prompts.append(record.prompt)
        ids.append(tokens)
    fix = TOO_LONG if longest == data.max_prompt_tokens else "shorten the prompts, or lower `max_new_tokens`"
    loaded.skips.check(loaded.total, data.max_skip, source, fix=fix)
    return TokenizedPrompts(prompts, ids, references_of(loaded.records)), loaded.skips


def trackers(context: StageContext[Any, Any]) -> Trackers | None:
    """Return the recipe's trackers, in the process that writes metrics; None if there are none.

    They receive the settings that the stage's result depends on, without paths and addresses.
    """
    tracking = context.recipe.tracking
    if not tracking.trackers or not is_main():
        return None
    from rlhf_cli.training.monitoring.trackers import TrackedRun, Trackers

    run = TrackedRun(
        project=tracking.project,
        group=context.recipe.name,
        stage=context.stage.name,
        folder=context.output.parent / "tracking" / context.stage.name,
        state=context.work / "tracking.json",
        settings={name: value for name, value in context.tracked.items() if not _is_address(value)},
    )
    return Trackers(tracking.trackers, run)


def metrics_log(context: StageContext[Any, Any]) -> Callable[..., MetricsLog]:
    """Return what makes the stage's metrics log, with its trackers, from the other arguments of `MetricsLog`."""
    from rlhf_cli.training.monitoring.metrics_log import MetricsLog

    return partial(MetricsLog, trackers=trackers(context))


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and "://" in value
