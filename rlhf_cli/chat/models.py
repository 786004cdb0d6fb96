"""The models of a chat: those of a run, or folders and hub ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rlhf_cli.errors import DataError, ModelError, UsageError
from rlhf_cli.generation.contract import read_contract
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import PromptStyle, prompt_style
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.device import resolve_device
from rlhf_cli.models.loading import DTYPES, ModelSource, as_stored, load_config, load_tokenizer
from rlhf_cli.models.peft_folder import find_peft_folder
from rlhf_cli.models.reward_model.files import read_reward_config
from rlhf_cli.models.weight_loading import base_of
from rlhf_cli.pipeline.manifest import FILE_NAME, DamagedArtifact, Manifest
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.progress import say
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import SamplingSettings
from rlhf_cli.stages.common import trusts_code
from rlhf_cli.stages.model_names import model_names

if TYPE_CHECKING:
    from rlhf_cli.models.reward_model.model import RewardModel

_STAGES = ("sft", "ppo")
_REWARD_MODEL = "train-rm"


@dataclass(frozen=True)
class ChatModel:
    """A model that replies.

    Attributes:
        name: unique in the chat.
        policy: the model; its weights are loaded at its first reply.
        reference: name of the model that its KL is measured to, if that replies too.
    """

    name: str
    policy: Policy
    reference: str | None = None


@dataclass(frozen=True)
class ChatModels:
    """All models of a chat.

    Attributes:
        models: that reply, the least trained first.
        reward: source of the reward model, if there is one.
        run: run directory that they come from, if it is one.
    """

    models: tuple[ChatModel, ...]
    reward: ModelSource | None = None
    run: Path | None = None

    @property
    def sources(self) -> list[ModelSource]:
        """Where the weights of all models are, and those of the bases of adapters."""
        own = [model.policy.source for model in self.models]
        return [part for one in (*own, self.reward) if one is not None for part in _with_bases(one)]

    def load_reward_model(self) -> RewardModel | None:
        """Load the reward model."""
        from rlhf_cli.models.reward_model.loading import load_reward_model

        if self.reward is None:
            return None
        template = self.models[-1].policy.format.template
        return load_reward_model(self.reward, template=template)


@dataclass(frozen=True)
class _Named:
    """A model by name, before anything of it is read."""

    name: str
    path: str
    recipe: RunSettings
    reference: str | None = None


def find_models(
    where: Sequence[str], *, only: Sequence[str], sampling: SamplingSettings, device: str | None = None
) -> ChatModels:
    """Find the models of a chat.

    Args:
        where: run directories, model folders or hub ids.
        only: names of the models that reply; empty takes all.
        sampling: how completions are drawn; what is null is how each model was trained.
        device: `auto`, or as `model.device`; None is that of the run.

    Raises:
        UsageError: there is no such model, or no model in a run directory.
    """
    found: list[_Named] = []
    reward: ModelSource | None = None
    runs = [Path(one) for one in where if _is_run(Path(one))]
    for one in where:
        if Path(one) in runs:
            own, own_reward = _of_run(Path(one), prefix=f"{Path(one).resolve().name}/" if len(where) > 1 else "")
            found += own
            reward = reward or own_reward
        else:
            _check_model(Path(one))
            found.append(_Named(model_names(one)[0], one, RunSettings()))
    found = _unique(found)
    if only:
        found = _chosen(found, only)
    models = tuple(_load(one, sampling, device) for one in found)
    if reward is not None and device is not None:
        reward = replace(reward, device=resolve_device(device))
    return ChatModels(models, reward, runs[0] if len(where) == 1 and runs else None)


def _with_bases(source: ModelSource) -> list[ModelSource]:
    """A model, and the base that it is an adapter on, and so on."""
    config = read_reward_config(source.folder)
    if config is not None and config.adapter:
        return [source, *_with_bases(config.base_source(source))]
    adapter = find_peft_folder(source.path, source.revision)
    return [source] if adapter is None else [source, *_with_bases(base_of(adapter, source))]


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and any((folder / stage / FILE_NAME).is_file() for stage in (*_STAGES, _REWARD_MODEL))


def _check_model(folder: Path) -> None:
    """Check that what is named can be talked to, as far as its path says."""
    if folder.is_absolute() and not folder.exists():
        raise UsageError(
            f"{folder}: no such run directory or model folder", hint="name runs/NAME, a model folder or a hub id"
        )
    if (folder / "reward.json").is_file():
        raise UsageError(
            f"{folder} is a reward model, which scores and does not reply",
            hint=f"name {folder.parent}: its models reply, and this reward model scores the replies"
            if (folder.parent / "sft").is_dir()
            else "name the model that it was trained for",
        )


def _of_run(folder: Path, *, prefix: str) -> tuple[list[_Named], ModelSource | None]:
    """Return the models of a run in the order of its stages, and its reward model."""
    run = RunDirectory(folder)
    try:
        manifests = {stage: run.read_manifest(stage) for stage in (*_STAGES, _REWARD_MODEL)}
    except DamagedArtifact as damage:
        raise DataError(f"{damage}", hint="recreate it with `rlhf run RECIPE`") from None
    made = {stage: manifest for stage, manifest in manifests.items() if manifest is not None}
    recipe = _recipe([made[stage] for stage in (_REWARD_MODEL, *_STAGES) if stage in made][-1], folder)
    found: list[_Named] = []
    if (base := recipe.model.path) is not None and _is_there(base):
        found.append(_Named(f"{prefix}base", base, recipe))
    for stage in _STAGES:
        if stage in made:
            reference = found[-1].name if found else None
            found.append(_Named(f"{prefix}{stage}", str(run.artifact(stage)), recipe, reference))
    if not found:
        raise UsageError(
            f"{folder} has no model to talk to: neither `sft` nor `ppo` is finished",
            hint=f"finish the run, or name a model folder in place of {folder}",
        )
    has_reward = _REWARD_MODEL in made
    return found, _source(recipe, str(run.artifact(_REWARD_MODEL)), None) if has_reward else None


def _is_there(base: str) -> bool:
    """Whether the base model of a run can still be loaded; says so if not."""
    try:
        load_config(ModelSource(base))
    except ModelError as error:
        say(f"the base model does not reply: {error.message}")
        return False
    return True


def _recipe(manifest: Manifest, folder: Path) -> RunSettings:
    kept = {name: manifest.settings[name] for name in ("model", "data", "sampling") if name in manifest.settings}
    try:
        return RunSettings.model_validate(kept)
    except ValidationError as error:
        raise DataError(f"{folder}: the settings of `{manifest.stage}` cannot be read: {error}") from error


def _unique(found: Sequence[_Named]) -> list[_Named]:
    counts = Counter(one.name for one in found)
    return [replace(one, name=one.path) if counts[one.name] > 1 else one for one in found]


def _chosen(found: Sequence[_Named], only: Sequence[str]) -> list[_Named]:
    known = {one.name: one for one in found}
    for name in only:
        if name not in known:
            raise UsageError(f"no model `{name}` to talk to", hint=f"choose among {', '.join(known)}")
    return [replace(known[name], reference=_kept(known[name].reference, only)) for name in known if name in only]


def _kept(reference: str | None, only: Sequence[str]) -> str | None:
    return reference if reference in only else None


def _load(one: _Named, sampling: SamplingSettings, device: str | None) -> ChatModel:
    contract = read_contract(one.path)
    trained = SamplingSettings() if contract is None else contract.sampling
    source = as_stored(_source(one.recipe, one.path, device))
    tokenizer = load_tokenizer(source)
    style = (
        PromptStyle(contract.prompt_template, dict(contract.template_kwargs))
        if contract is not None
        else prompt_style(one.recipe.data, one.path, tokenizer, name=one.name, may_differ=True)
    )
    drawn = Sampling.resolve(sampling, one.recipe.sampling, trained)
    return ChatModel(one.name, Policy.load(source, drawn, style=style, tokenizer=tokenizer), one.reference)


def _source(recipe: RunSettings, path: str, device: str | None) -> ModelSource:
    """Return how a model is loaded: in the precision of its run, by default in bfloat16 on a GPU."""
    settings: Any = recipe.model
    where = resolve_device(device or settings.device)
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if where.type == "cuda" else "float32"
    return ModelSource(
        path=path,
        trust_remote_code=trusts_code(recipe, path),
        dtype=DTYPES[precision],
        precision=DTYPES[precision],
        attention=settings.attention,
        device=where,
    )
