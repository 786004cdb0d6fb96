"""Names of models: a local folder, or an id of the Hugging Face hub, which is resolved to a local folder as well.

All files of a model, those of our artifacts included, are then read from that folder. Imports no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import re
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from rlhf_cli.console import interactive
from rlhf_cli.errors import ModelError
from rlhf_cli.models.stored_weights import ADAPTER, MODEL, PICKLED, MissingWeightsError, weight_files
from rlhf_cli.progress import warn

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")
_FILE_ENDINGS = (
    *(".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".yaml", ".yml", ".safetensors", ".arrow"),
    *(".bin", ".pt", ".gguf"),
)
_FOLDERS = ("runs", "models", "outputs", "checkpoints")
"""First components of a path that nobody means as the owner of a model on the hub."""

_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.py", "*.md")
_ADAPTERS = ("*adapter_model.safetensors", "*head.safetensors")
_WEIGHTS = ("*.safetensors",)
_NEVER = ("original/*", "onnx/*", "openvino/*", "consolidated*", "checkpoint-*/*", "critic/*", "runs/*")
"""Copies of the weights in other formats, and models beside the model."""


REPLY_SECONDS = 5
"""How long the hub may take to answer."""


class HubModel(NamedTuple):
    """A model on the hub.

    Attributes:
        id: such as `owner/name`.
        revision: commit, tag or branch; None is the main branch.
    """

    id: str
    revision: str | None = None


def hub_model(name: str, revision: str | None = None) -> HubModel | None:
    """Return the model of the hub that a name means; None if it is a local folder.

    Args:
        name: folder, `owner/name` or `owner/name@revision`.
        revision: replaces the one in the name.

    Raises:
        ModelError: the name is neither.
    """
    if Path(name).expanduser().is_dir():
        return None
    check_model_name(name)
    found = _ID.fullmatch(name)
    assert found is not None
    return HubModel(found["id"], revision or found["revision"])


def check_model_name(name: str) -> None:
    """Raise `ModelError` unless a name is a local folder or can be the id of a model on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if path.exists():
        raise ModelError(f"{name}: is a file, not a model folder", hint="give a folder, or a hub id such as owner/name")
    if not _ID.fullmatch(name) or name.lower().endswith(_FILE_ENDINGS) or _is_inside_a_folder(path):
        similar = _similar_folders(path)
        raise ModelError(
            f"{name}: no such model folder",
            hint=f"did you mean {' or '.join(similar)}?"
            if similar
            else "give a folder, or a hub id such as owner/name",
        )


def _is_inside_a_folder(path: Path) -> bool:
    """Whether a name without a folder is that of one: a folder of other things, such as a run directory, is not the
    owner of a hub id."""
    return len(path.parts) > 1 and (path.parts[0] in _FOLDERS or Path(path.parts[0]).is_dir())


def _similar_folders(path: Path) -> list[str]:
    """Return up to three existing folders whose path differs from `path` in one component, closest first."""
    for at in range(len(path.parts)):
        parent = Path(*path.parts[:at])
        if (parent / path.parts[at]).is_dir() or not parent.is_dir():
            continue
        names = [folder.name for folder in parent.iterdir() if folder.is_dir()]
        close = difflib.get_close_matches(path.parts[at], names, n=3, cutoff=0.6)
        whole = [Path(parent, name, *path.parts[at + 1 :]) for name in close]
        return [str(folder) for folder in whole if folder.is_dir()]
    return []


def local_folder(name: str, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """Return the folder with the files of a model; downloads those of the hub that the local cache lacks.

    Within a process, a name always means the same commit.

    Args:
        name: folder, `owner/name` or `owner/name@revision`.
        revision: of a model on the hub, replaces the one in the name.
        with_weights: whether weights are downloaded, too.

    Raises:
        ModelError: there is no such folder, and no such model on the hub; or the hub cannot be reached.
    """
    model = hub_model(name, revision)
    return Path(name).expanduser() if model is None else download(model, with_weights=with_weights)


@cache
def commit_of(model: HubModel) -> str:
    """Return the commit that the revision of a model stands for; raises as `local_folder`."""
    return download(model, with_weights=False).name


def known_commit(model: HubModel) -> str | None:
    """Return the commit that the revision of a model stands for; None if the hub's cache does not say it, and the hub
    cannot be asked."""
    try:
        return _cached_commit(model) or commit_of(model)
    except ModelError:
        return None


def _cached_commit(model: HubModel) -> str | None:
    """Return the commit that the revision of a model stands for in the hub's cache; None if it is not there."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    storage = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model.id, repo_type="model"))
    revision = model.revision or "main"
    reference = storage / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return commit if commit and (storage / "snapshots" / commit).is_dir() else None


@cache
def download(model: HubModel, *, with_weights: bool) -> Path:
    """Return the folder of the hub's cache with the files of a model, all or those without weights.

    The commit in the cache is read where there is one, so that a run that resumes, or a rerun, reads the same model.

    Raises:
        ModelError: the model does not exist, is neither cached nor downloadable, or has pickled weights alone.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars

    if not interactive():
        disable_progress_bars()
    revision = commit_of(model) if with_weights else _cached_commit(model) or model.revision
    patterns = [*_SMALL, *_ADAPTERS, *(_WEIGHTS if with_weights else ())]
    fetch = partial(snapshot_download, model.id, allow_patterns=patterns, ignore_patterns=list(_NEVER))
    try:
        if not constants.HF_HUB_OFFLINE and not with_weights:
            # `snapshot_download` may wait for ever.
            found = HfApi().model_info(model.id, revision=revision, timeout=REPLY_SECONDS)
            _check_not_pickled(model, [file.rfilename for file in found.siblings or ()])
        folder = Path(fetch(revision=revision))
    except (
        OSError,
        HTTPError,
        HFValidationError,
        RuntimeError,
    ) as error:  # RuntimeError: of hf_xet, such as a full disk
        with contextlib.suppress(OSError):
            folder = Path(fetch(revision=revision, local_files_only=True))
            if not with_weights or _has_weights(folder):
                warn(f"{model.id} is read from the hub's cache, commit {folder.name}: {_reason(error)}")
                return folder
        raise _failed(model, error) from error
    if with_weights and constants.HF_HUB_OFFLINE and not _has_weights(folder):
        raise ModelError(
            f"`{model.id}`: its weights are not in the hub's cache, {folder}, or not all of them",
            hint="HF_HUB_OFFLINE is set: unset it to download them, or give a folder",
        )
    return folder


def _has_weights(folder: Path) -> bool:
    """Whether the weight files of a model are in a folder, or damaged, or pickled; reading them says which."""
    try:
        weight_files(folder, ADAPTER if (folder / "adapter_config.json").is_file() else MODEL)
    except MissingWeightsError:
        return False
    except ModelError:
        return True
    return True


def _check_not_pickled(model: HubModel, files: Iterable[str]) -> None:
    """Raise `ModelError` for a repository whose weights are pickles and nothing else.

    Args:
        model: on the hub.
        files: paths of its files.
    """
    files = list(files)
    pickles = sorted(name for pattern in PICKLED.values() for name in fnmatch.filter(files, pattern))
    if not pickles or any(name.endswith(".safetensors") for name in files):
        return
    revision = f" --revision {model.revision}" if model.revision is not None else ""
    raise ModelError(
        f"`{model.id}` has its weights only as pickles, such as {pickles[0]}, which can run code when they are read",
        hint=f"download it with `hf download {model.id}{revision} --local-dir FOLDER` and give FOLDER: the error then "
        "says how to convert it, if you trust it; or ask its owner for safetensors",
    )


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)


def _failed(model: HubModel, error: Exception) -> ModelError:
    """Say why a model of the hub cannot be had, and what can be done."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"`{model.id}`"
    cause = next((one for one in (error, error.__cause__) if isinstance(one, HfHubHTTPError)), error)
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, GatedRepoError):
        return ModelError(
            f"{name} is a gated model of the hub, and your account has no access to it",
            hint=f"accept its terms on https://huggingface.co/{model.id}, then log in with `hf auth login`",
        )
    if isinstance(cause, RevisionNotFoundError):
        return ModelError(
            f"{name} has no revision `{model.revision or 'main'}`", hint="name a branch, a tag or a commit of it"
        )
    if isinstance(cause, RepositoryNotFoundError):
        return ModelError(
            f"{name}: there is no such folder, and no such model on the hub",
            hint="check the spelling; for a private model, log in with `hf auth login`",
        )
    reason = _reason(error)
    if status in (401, 403):
        return ModelError(f"{name}: the hub refuses access: {reason}", hint="log in with `hf auth login`")
    if constants.HF_HUB_OFFLINE:
        return ModelError(
            f"{name}: there is no such folder, and it is not in the hub's cache, {constants.HF_HUB_CACHE}",
            hint="HF_HUB_OFFLINE is set: unset it to download the model, or give a folder",
        )
    if status is None and isinstance(error, OSError) and error.errno is not None:
        return ModelError(
            f"{name} cannot be stored in {constants.HF_HUB_CACHE}: {reason}", hint="set HF_HOME to another folder"
        )
    return ModelError(
        f"{name}: there is no such folder, and the hub cannot be reached: {reason}",
        hint="check the network, or give a folder",
    )
