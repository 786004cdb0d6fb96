"""Checks everything outside the run directory before the first stage starts.

A bad line in PPO's prompts is found immediately, not after an hour of fine-tuning. Data is checked without torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import DataError, RLHFError, UsageError, raise_all
from rlhf_cli.files import hash_file
from rlhf_cli.generation.contract import Contract, read_contract, split_of
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.tensor_parallel import indivisible
from rlhf_cli.models.role import ModelRole
from rlhf_cli.pipeline.adapter_targets import check_adapter_targets
from rlhf_cli.pipeline.paths import check_critic, check_data, check_file, function_file
from rlhf_cli.pipeline.tokenizer_checks import check_with_tokenizer
from rlhf_cli.progress import say, warn
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import SamplingSettings
from rlhf_cli.stages.common import trusts_code
from rlhf_cli.stages.inputs import Input
from rlhf_cli.stages.registry import stages
from rlhf_cli.stages.sharding import check_sharding
from rlhf_cli.training.monitoring.trackers import check_trackers

if TYPE_CHECKING:
    from rlhf_cli.data.checks import PromptKeys
    from rlhf_cli.models.loading import ModelSource


def preflight(recipe: Recipe, inputs: Iterable[Input], written: Container[str] = ()) -> None:
    """Check every data record, model folder, function file, endpoint URL and token; raises an `RLHFError`.

    Args:
        recipe: recipe with resolved paths.
        inputs: inputs of all stages that will run; duplicates are checked once.
        written: names of these stages: their artifacts are not yet what they will be.
    """
    _check_attention(recipe.model.attention)
    check_trackers(recipe.tracking.trackers)
    _check_bitsandbytes(recipe)
    check_sharding(recipe, written)
    _check_vllm(recipe)
    if recipe.value("evaluate.tasks") and importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            f"`evaluate.tasks: {recipe.value('evaluate.tasks')}` needs lm-eval, which is not installed",
            hint="pip install 'rlhf-cli[tasks]', or remove `evaluate.tasks`",
            setting="evaluate.tasks",
        )
    seen: set[tuple[str, str | None]] = set()
    keys: dict[tuple[str, str | None], PromptKeys] = {}
    inputs = list(inputs)
    for given in inputs:
        key = (given.source, given.records)
        if given.kind == "endpoint":
            _check_endpoint(given)
        if key in seen or not given.matters:
            continue
        seen.add(key)
        if given.kind == "data":
            check_data(given.source, given.setting)
            keys[key] = _check_records(recipe, given)
        elif given.kind == "file":
            check_file(given.source, given.setting)
        elif given.kind == "critic":
            check_critic(given.source, given.setting)
        elif given.kind == "function":
            file = function_file(given.source, given.setting)
            say(f"{given.setting}: will run {given.source} with your permissions (sha256 of {file}: {hash_file(file)})")
    _check_evaluation(recipe, inputs, keys)
    _check_trained(recipe, inputs, keys, written)
    check_models_of_run(recipe, inputs)
    check_with_tokenizer(recipe, inputs, keys)
    check_adapter_targets(recipe, written)


def _check_vllm(recipe: Recipe) -> None:
    server = recipe.generation.vllm_server
    if recipe.generation.engine != "vllm" and server is None:
        return
    name = "generation.engine" if server is None else "generation.vllm_server"
    setting = f"`{name}: vllm`" if server is None else f"`{name}`"
    for package in ("vllm",) if server is None else ("vllm", "trl"):
        if importlib.util.find_spec(package) is None:
            other = "--set generation.engine=auto" if server is None else "--set generation.vllm_server=null"
            raise UsageError(
                f"{setting} needs {package}, which is not installed",
                hint=f"docs/generation.md describes an environment with vllm; or use `{other}`",
                setting=name,
            )


def _check_bitsandbytes(recipe: Recipe) -> None:
    """Check that bitsandbytes is installed if a setting needs it."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return
    sections = {stage.section: recipe.section(stage.name) for stage in stages()}
    needs = {f"{name}.optimizer": getattr(section, "optimizer", "adamw") for name, section in sections.items()}
    used = {setting: value for setting, value in needs.items() if value == "adamw-8bit"}
    if recipe.model.quantize != "none":
        used["model.quantize"] = recipe.model.quantize
    for setting, value in used.items():
        raise UsageError(
            f"`{setting}: {value}` needs bitsandbytes, which is not installed",
            hint=f"pip install 'rlhf-cli[quantized]', or remove `{setting}`",
            setting=setting,
        )


def check_models_of_run(recipe: Recipe, inputs: Sequence[Input]) -> None:
    """Check every model of the run for its role; reports the problems of all of them at once."""
    uses: dict[tuple[str, ModelRole], list[Input]] = {}
    for given in inputs:
        if given.kind == "model" and given.role is not None and (given.matters or given.sampled_by):
            uses.setdefault((given.source, given.role), []).append(given)
    errors: dict[str, RLHFError] = {}
    for (source, role), members in uses.items():
        try:
            contract = read_contract(source)  # finds out without torch whether there is such a model
            found = _check_use(recipe, source, role, _sections(members, inputs), contract)
        except RLHFError as error:
            found = [error]
        for error in found:
            message = f"{error.message} (`{members[0].setting}`)"
            errors[error.message] = type(error)(message, hint=error.hint)
    raise_all(list((_check_descendants(recipe, inputs) | _check_critics(inputs) | errors).values()))


def _check_descendants(recipe: Recipe, inputs: Sequence[Input]) -> dict[str, RLHFError]:
    """Return, by message, why what `sft` makes of `model.path` cannot have the roles that later stages give it.

    Training keeps the architecture, so that of `model.path` decides before there is an artifact. An artifact that is
    there already, and that no stage of this run writes, is looked at itself.
    """
    # That `model.path` can be a policy is checked for `sft`.
    descendants = [one for one in inputs if one.kind == "artifact" and one.role not in (None, "policy")]
    if not descendants:
        return {}
    from rlhf_cli.models.loading import ModelSource, load_config
    from rlhf_cli.models.preflight import check_architecture

    is_written = any(one.setting == "model.path" and one.matters for one in inputs)
    errors: dict[str, RLHFError] = {}
    for given in descendants:
        assert given.role is not None
        source = recipe.model.path if is_written else given.source
        if source is None or (not is_written and not Path(source).is_dir()):  # made by `model.build`
            continue
        try:
            config = load_config(ModelSource(source, trust_remote_code=trusts_code(recipe, source)))
            check_architecture(config, given.role, source)
        except RLHFError as error:
            message = f"{error.message} (the output of `{given.upstream}` is used as {given.role})"
            errors[error.message] = type(error)(message, hint=error.hint)
    return errors


def _check_critics(inputs: Sequence[Input]) -> dict[str, RLHFError]:
    """Return, by message, what is wrong with saved critics."""
    critics = [one for one in inputs if one.kind == "critic"]
    if not critics:
        return {}
    from rlhf_cli.stages.ppo.critic_files import check_saved_critic  # imports torch, which the stage needs anyway

    errors: dict[str, RLHFError] = {}
    for given in critics:
        try:
            check_saved_critic(Path(given.source))
        except RLHFError as error:
            errors[error.message] = type(error)(f"{error.message} (`{given.setting}`)", hint=error.hint)
    return errors


def _sections(members: Sequence[Input], inputs: Sequence[Input]) -> list[str]:
    """Return the sections of the stages that draw completions from a model, or from what is trained from it."""
    found = [one.sampled_by for one in members]
    if members[0].setting == "model.path":
        found += [one.sampled_by for one in inputs if one.kind == "artifact"]
    return [section for section in found if section is not None]


def _check_use(
    recipe: Recipe, source: str, role: ModelRole, sections: Sequence[str], contract: Contract | None
) -> list[RLHFError]:
    """Return the problems of a model in a role; warns of what a stage can go on with."""
    from rlhf_cli.models.findings import ModelUse
    from rlhf_cli.models.loading import ModelSource  # imports torch, which the stages need anyway
    from rlhf_cli.models.preflight import check_model

    use = ModelUse(
        ModelSource(source, trust_remote_code=trusts_code(recipe, source)),
        role,
        *_prompting(recipe, contract),
        max_new_tokens=_longest_completion(recipe, sections, contract),
    )
    found = check_model(use)
    for warning in found.warnings:
        warn(warning)
    return found.errors or (_undivided(recipe, use.source) if sections else [])


def _undivided(recipe: Recipe, source: ModelSource) -> list[RLHFError]:
    """Return that vLLM does not divide a model as the recipe says."""
    generation = recipe.generation
    size = generation.tensor_parallel_size
    if generation.engine != "vllm" or size == 1:
        return []
    from rlhf_cli.models.loading import load_config

    reason = indivisible(load_config(source).to_dict(), size)
    hint = "choose another number, or use `--set generation.engine=torch`"
    message = f"vllm cannot use {source.path} with `generation.tensor_parallel_size: {size}`: {reason}"
    return [] if reason is None else [UsageError(message, hint=hint)]


def _prompting(recipe: Recipe, contract: Contract | None) -> tuple[str | None, Mapping[str, Any]]:
    """Return template and template arguments by which a policy is prompted; "auto" for the model's own template."""
    template, kwargs = recipe.data.prompt_template, recipe.data.template_kwargs
    if contract is not None:
        template = contract.prompt_template if template == "auto" else template
        kwargs = contract.template_kwargs if kwargs is None else kwargs
    return template, kwargs or {}


def _longest_completion(recipe: Recipe, sections: Sequence[str], contract: Contract | None) -> int | None:
    """Return the longest completion, in tokens, that the stages of these sections draw from a model; None for none."""
    lengths = [recipe.value(f"{name}.{'' if name == 'ppo' else 'sampling.'}max_new_tokens") for name in sections]
    layers = [recipe.sampling, *(() if contract is None else (contract.sampling,))]
    resolved = [Sampling.resolve(SamplingSettings(max_new_tokens=length), *layers) for length in lengths]
    return max((sampling.max_new_tokens for sampling in resolved), default=None)


def _check_endpoint(given: Input) -> None:
    from rlhf_cli.http_client.addresses import check_endpoint, without_query

    try:
        check_endpoint(given.source, given.token_env)
    except UsageError as error:
        raise UsageError(f"`{given.setting}`: {error.message}", hint=error.hint, setting=given.setting) from error
    say(f"{given.setting}: will send prompts and completions to {without_query(given.source)}")


def _check_attention(name: str) -> None:
    """Raise `UsageError` if a built-in attention backend is not available here.

    A function of the user is hashed but not run before its stage.
    """
    if name in ("reference", "tiled", "torch", "triton"):
        from rlhf_cli.attention import registry  # imports torch, which the stages need anyway

        if (reason := registry.find(name).missing()) is not None:
            raise UsageError(
                f"`model.attention: {name}`: {reason}",
                hint="use `auto`, or see `rlhf attention list`",
                setting="model.attention",
            )


def _check_records(recipe: Recipe, given: Input) -> PromptKeys:
    from rlhf_cli.data.checks import PromptKeys
    from rlhf_cli.data.sources import is_hub, validate_source

    if is_hub(given.source):  # checked by the stage while it reads
        return PromptKeys()
    assert given.records is not None
    report = validate_source(
        given.source,
        given.records,
        columns=recipe.data.columns,
        comparison=recipe.data.comparison,
        max_skip=recipe.data.max_skip,
    )
    for warning in report.warnings:
        warn(warning)
    return report.prompts


def _check_evaluation(
    recipe: Recipe, inputs: Iterable[Input], keys: Mapping[tuple[str, str | None], PromptKeys]
) -> None:
    """Refuse, before anything is trained, prompts to evaluate on that will be trained on."""
    by_use = {use: [one for one in inputs if one.use == use] for use in ("train", "evaluate")}
    for evaluated in by_use["evaluate"]:
        for trained in by_use["train"]:
            own = None if trained.setting == "sft.data" else recipe.value("ppo.model")
            start = own or recipe.model.path
            split = split_of(recipe.data, read_contract(start) if start is not None else None)
            given = keys[evaluated.source, evaluated.records]
            seen = given.in_training_of(keys[trained.source, trained.records], split)
            if seen and recipe.value("evaluate.trained_prompts") == "refuse":
                raise DataError(
                    f"`{evaluated.setting}` ({evaluated.source}): {seen:,} of its prompts are in the training share of "
                    f"`{trained.setting}` ({trained.source})",
                    hint="evaluate on the others with `--set evaluate.trained_prompts=skip`",
                )


def _check_trained(
    recipe: Recipe,
    inputs: Sequence[Input],
    keys: Mapping[tuple[str, str | None], PromptKeys],
    written: Container[str],
) -> None:
    """Refuse prompts that a model to evaluate was trained on, as far as it exists; `evaluate` knows the rest."""
    if recipe.value("evaluate.trained_prompts") != "refuse":
        return
    models = [
        one
        for one in inputs
        if (one.sampled_by == "evaluate" or one.upstream == "ppo")
        and (one.upstream is None or one.upstream not in written)
    ]
    for evaluated in inputs:
        if evaluated.use != "evaluate":
            continue
        for model in models:
            contract = read_contract(model.source)
            trained = frozenset[str]() if contract is None else contract.trained_prompts
            if seen := keys[evaluated.source, evaluated.records].count_in(trained):
                raise DataError(
                    f"`{evaluated.setting}` ({evaluated.source}): {seen:,} of its prompts were in the training of "
                    f"{model.source}",
                    hint="evaluate on the others with `--set evaluate.trained_prompts=skip`, or name other prompts",
                )
