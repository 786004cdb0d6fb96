"""`rlhf push`: what is sent to the hub, what never is, and what its refusals say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.export import push
from rlhf_cli.export.models import find_model
from tests.export.upload_server import upload_server

KEPT_BACK = (
    *("samples.jsonl", "labels.jsonl", "metrics.jsonl", "skips.jsonl", "manifest.json", "optimizer.safetensors"),
    *("critic/model.safetensors", "steps/4/model.safetensors", "checkpoint-10/model.safetensors", "training_args.bin"),
    *("adapter/prompts.jsonl", "adapter/optimizer.pt", "prompts.parquet", ".cache/model.safetensors", "notes.txt"),
    *("model.safetensors.partial", "other/adapter/adapter_model.safetensors", "votes.jsonl", "curves.png"),
)
SENT = (
    *(
        "README.md",
        "adapter/adapter_config.json",
        "adapter/base.json",
        "adapter/base_adapter/adapter_model.safetensors",
    ),
    *("model-00001-of-00002.safetensors", "contract.json", "trained_prompts.txt"),
)


@pytest.fixture
def folder(made_run: Path, tmp_path: Path) -> Path:
    """A policy with all that a run may leave in its folder."""
    shutil.copytree(made_run / "sft", tmp_path / "policy")
    for name in (*KEPT_BACK, *SENT[1:5]):
        path = tmp_path / "policy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path / "policy"


def plan(folder: Path, repo: str = "ann/mine") -> push.Upload:
    return push.plan_upload(find_model(str(folder)), repo, is_private=False, revision=None, message=None)


def test_only_files_of_the_model_are_sent(folder: Path):
    files = plan(folder).files
    assert not files.keys() & set(KEPT_BACK)
    assert set(SENT) | {"model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
    assert files["config.json"] == (folder / "config.json").stat().st_size


@pytest.mark.slow
def test_the_hub_gets_one_commit(folder: Path, tmp_path: Path, rlhf):
    arguments = ("push", folder, "ann/mine", "--private", "--revision", "second", "--commit-message", "Try it")
    with upload_server() as server:
        env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_x"}
        shown = rlhf(*arguments, "--dry-run", env=env)
        assert server.paths == []
        assert all(text in shown.stdout for text in ("ann/mine", "private", "second", "Try it", "# mine/sft"))
        listed = json.loads(rlhf(*arguments, "--dry-run", "--json", env=env).stdout)["files"]
        done = rlhf(*arguments, env=env)
        assert done.stdout == f"{server.url}/ann/mine/commit/c0ffee{'0' * 34}\n"
        assert (server.repos, server.branches, server.messages) == ({"ann/mine": True}, ["second"], ["Try it"])
        assert {name: len(body) for name, body in server.files.items()} == listed
        assert server.files["config.json"] == (folder / "config.json").read_bytes()
        rlhf("push", folder, "ann/mine", env=env)  # a repository that exists gets another commit
        assert server.messages[1:] == [f"Upload {folder.parent.name}/policy with rlhf"]
        server.failing = 403
        refused = rlhf("push", folder, "ann/mine", env=env, code=65)
        assert "use a token with write permission for ann" in " ".join(refused.stderr.split())
    unreachable = rlhf("push", folder, "ann/mine", env=env, code=65)
    assert "cannot reach the hub" in unreachable.stderr
    no_token = rlhf("push", folder, "ann/mine", env=env | {"HF_TOKEN": ""}, code=2)
    assert "hf auth login" in no_token.stderr
    offline = rlhf("push", folder, "ann/mine", env=env | {"HF_HUB_OFFLINE": "1"}, code=2)
    assert "unset it" in offline.stderr


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "hf auth login"), (403, "write permission for ann"), (404, "does not count"), (409, "another name")],
)
def test_every_refusal_of_the_hub_says_what_to_do(folder: Path, status: int, hint: str):
    error = push.refusal(plan(folder), status, "no")
    assert isinstance(error, ModelError)
    assert hint in str(error.hint)


def test_what_nobody_could_load_or_name_is_refused(made_run: Path, folder: Path):
    with pytest.raises(UsageError, match="adapter on the local model") as caught:
        plan(made_run / "train-rm")
    assert "rlhf export" in str(caught.value.hint)
    for name in ("a/b/c", "ann/my model", "-x"):
        with pytest.raises(UsageError, match="cannot be the name of a repository"):
            plan(folder, name)
