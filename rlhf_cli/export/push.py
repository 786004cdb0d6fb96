"""Upload a model folder to the Hugging Face hub: the files of the model and its card, and nothing else of a run."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import ModelError, RLHFError, UsageError
from rlhf_cli.export.models import ExportedModel
from rlhf_cli.files import MODEL_CARD
from rlhf_cli.models.json_files import read_json
from rlhf_cli.progress import warn
from rlhf_cli.quoting import word
from rlhf_cli.stages.model_names import model_names

_OF_A_MODEL = (
    MODEL_CARD,
    *("LOADING.md", "config.json", "generation_config.json", "reward.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "head.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("contract.json", "trained_prompts.txt"),  # the second has hashes of prompts, without which rlhf reads no contract
)
_OF_AN_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_OF_OUR_ADAPTER = (
    *_OF_AN_ADAPTER,
    "base.json",
)  # in adapter/, and in base_adapter/ below it, see models.policy_adapter


@dataclass(frozen=True)
class Upload:
    """What a push sends.

    Attributes:
        folder: of the model.
        files: path in the folder -> size in bytes.
        repo: `owner/name`, or `name` for the account of the token.
        is_private: visibility of a repository that is created; None is the default of the account.
        revision: branch; None is the main branch.
        message: of the commit.
    """

    folder: Path
    files: dict[str, int]
    repo: str
    is_private: bool | None
    revision: str | None
    message: str

    @property
    def card(self) -> str | None:
        """Text of the model card, if there is one."""
        path = self.folder / MODEL_CARD
        return path.read_text(encoding="utf-8") if path.is_file() else None


def plan_upload(
    model: ExportedModel, repo: str, *, is_private: bool, revision: str | None, message: str | None
) -> Upload:
    """Return what a push would send; nothing is sent.

    Raises:
        UsageError: the model is not a local folder, the repository's name is invalid, or nobody else could load it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not Path(model.name).is_dir():
        raise UsageError(f"`{model.name}` is on the hub already", hint="give RUN/STAGE or a model folder")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"`{repo}` cannot be the name of a repository: {error}", hint="use owner/name, such as ann/mine-ppo"
        ) from error
    _check_base(model)
    files = {
        name: path.stat().st_size
        for path in sorted(model.folder.rglob("*"))
        if path.is_file() and _is_allowed(name := path.relative_to(model.folder).as_posix())
    }
    return Upload(
        model.folder,
        files,
        repo,
        is_private or None,
        revision,
        message or f"Upload {model_names(model.name)[0]} with rlhf",
    )


def _is_allowed(path: str) -> bool:
    """Whether a file belongs to the model: samples, labels, metrics, critics and policies of other steps do not."""
    *folders, name = path.split("/")
    if not folders:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*_OF_A_MODEL, *_OF_AN_ADAPTER))
    return folders[0] == "adapter" and set(folders[1:]) <= {"base_adapter"} and name in _OF_OUR_ADAPTER


def _check_base(model: ExportedModel) -> None:
    """Raise `UsageError` for an adapter on a local folder, which nobody else has."""
    reward, adapter = (read_json(model.folder / name) for name in ("reward.json", "adapter_config.json"))
    base = reward.get("base") if reward.get("adapter") else adapter.get("base_model_name_or_path")
    if isinstance(base, str) and (base.startswith(".") or (model.folder / base).is_dir() or Path(base).is_dir()):
        raise UsageError(
            f"{model.name} is an adapter on the local model {base}, without which nobody can load it",
            hint=f"merge it first: `rlhf export {word(model.name)} FOLDER --to llama`, then push FOLDER",
        )


def upload(plan: Upload) -> str:
    """Create the repository if it does not exist, upload the files as one commit, and return its address.

    Raises:
        ModelError: the hub refuses, or cannot be reached.
        UsageError: there is no token.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UsageError("HF_HUB_OFFLINE is set, so nothing can be uploaded", hint="unset it")
    if get_token() is None:
        raise UsageError(
            "there is no token for the hub", hint="log in with `hf auth login`, or set HF_TOKEN; it must allow writing"
        )
    api = HfApi()
    with _hub_errors(plan):
        repo = api.create_repo(plan.repo, private=plan.is_private, repo_type="model", exist_ok=True).repo_id
        found = api.repo_info(repo, repo_type="model")
        if plan.is_private and not found.private:
            warn(f"{repo} existed already and is public; --private only decides how a new one is created")
        if plan.revision is not None:
            api.create_branch(repo, branch=plan.revision, repo_type="model", exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=plan.folder,
            commit_message=plan.message,
            repo_type="model",
            revision=plan.revision,
            allow_patterns=[glob.escape(name) for name in plan.files],
        )
    return str(commit.commit_url)


@contextmanager
def _hub_errors(plan: Upload) -> Iterator[None]:
    """Turn errors of the hub into errors that say what to do."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise refusal(plan, error.response.status_code, _first_line(error)) from error
    except (HTTPError, OSError) as error:
        raise ModelError(
            f"cannot reach the hub to upload `{plan.repo}`: {_first_line(error)}",
            hint="check the network and run the same command again; what was uploaded is not sent twice",
        ) from error


def refusal(plan: Upload, status: int, reason: str) -> RLHFError:
    """Return the error for a status of HTTP with which the hub refuses an upload."""
    owner = plan.repo.partition("/")[0] if "/" in plan.repo else "your account"
    page = f"https://huggingface.co/{plan.repo}"
    text, hint = {
        401: ("does not accept the token", "log in again with `hf auth login`, or set HF_TOKEN to a valid token"),
        403: (
            f"does not let this token write to `{plan.repo}`",
            f"use a token with write permission for {owner}, or a repository of your own account",
        ),
        404: (
            f"has no model repository `{plan.repo}` that this token can see",
            f"check {page}: a data set or Space of that name does not count; use another name or token",
        ),
        409: (f"has something else under `{plan.repo}`", "use another name"),
        429: ("limits the rate of requests", "wait a few minutes and run the same command again"),
    }.get(status, ("refused the upload", "run the same command again; https://status.huggingface.co says if it is up"))
    return ModelError(f"the hub {text} (HTTP {status}): {reason}", hint=hint)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
