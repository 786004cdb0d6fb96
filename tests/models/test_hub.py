"""Models by hub id are the same as by folder: weights, `reward.json`, adapters and their bases, contracts."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from rlhf_cli.data.splits import Split
from rlhf_cli.errors import ModelError
from rlhf_cli.generation.contract import Contract, read_contract
from rlhf_cli.models import hub
from rlhf_cli.models.base_model import check_base
from rlhf_cli.models.findings import ModelUse
from rlhf_cli.models.hub import HubModel, check_model_name, commit_of, download, hub_model, local_folder
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.peft_folder import find_peft_folder
from rlhf_cli.models.preflight import check_model
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.pipeline.fingerprint import hash_model, recall_commits
from rlhf_cli.settings.shared import LoraSettings, SamplingSettings
from tests.hub_server import COMMIT, HubServer, forget, hub_server

PROMPTS, COMPLETIONS = ["Why is the sky blue?", "What is bread?"], ["Because.", "Flour, water and salt."]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache; nothing can be downloaded."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    forget()
    yield folder
    forget()


@pytest.fixture
def server(cache, monkeypatch):
    """A hub on the loopback, from which models can be downloaded."""
    with hub_server() as running:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            running.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield running


def put(cache: Path, name: str, folder: Path, commit: str = COMMIT) -> None:
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)


def trained(base: str, folder: Path, *, lora: bool) -> Path:
    """A reward model whose normalization and template matter."""
    model = new_reward_model(
        ModelSource(base), template="Q: {prompt}\nA:", lora=LoraSettings(rank=2) if lora else None, seed=3
    )
    model.mean, model.std = 2.0, 0.5
    folder.mkdir()
    save_reward_model(model, folder)
    return folder


def rewards(name: str) -> list[float]:
    return load_reward_model(ModelSource(name), template=None).eval().score(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "full"])
def test_a_reward_model_in_the_cache_scores_as_its_folder_does(cache, tmp_path, tiny_llama, lora):
    folder = trained(str(tiny_llama), tmp_path / "rm", lora=lora)
    put(cache, "acme/rm", folder)
    assert rewards("acme/rm") == rewards(str(folder))
    assert rewards(f"acme/rm@{COMMIT}") == rewards("acme/rm@main") == rewards("acme/rm")


def test_an_adapter_and_its_base_come_from_the_hub(server: HubServer, tmp_path, tiny_llama):
    server.models["acme/base"] = tiny_llama
    server.models["acme/rm"] = folder = trained("acme/base", tmp_path / "rm", lora=True)
    recorded = json.loads((folder / "reward.json").read_text())
    assert (recorded["base"], recorded["base_revision"]) == ("acme/base", COMMIT)
    by_folder = rewards(str(folder))
    assert rewards("acme/rm") == by_folder
    said = load_reward_model(ModelSource("acme/rm"), template=None)
    assert said.format.template == "Q: {prompt}\nA:"
    assert said.format.name == "`acme/rm`", "with the tokenizer that it was trained with"


def test_weights_wait_until_they_are_needed_and_pickles_are_never_fetched(server: HubServer, tmp_path, tiny_llama):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    Contract(None, {}, SamplingSettings(temperature=0.3), Split(0.2, 5), False, frozenset()).write(folder)
    server.models["acme/tiny"] = folder
    contract = read_contract("acme/tiny")
    assert contract is not None
    assert contract.sampling.temperature == 0.3
    assert not [path for path in server.requests if path.endswith(".safetensors")]
    model = load_policy(ModelSource("acme/tiny"))
    expected = load_policy(ModelSource(str(folder)))
    ids = torch.arange(8).unsqueeze(0)
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    names = {file.name for file in local_folder("acme/tiny").rglob("*")}
    assert not {"pytorch_model.bin", "onnx"} & names
    assert not [path for path in server.requests if path.endswith(".bin")]


def test_a_name_means_one_commit_for_the_whole_run_and_the_cache_serves_offline(server, monkeypatch, tiny_llama):
    server.models["acme/tiny"] = tiny_llama
    assert commit_of(HubModel("acme/tiny")) == COMMIT
    local_folder("acme/tiny")
    asked = len(server.requests)
    local_folder("acme/tiny")
    assert len(server.requests) == asked
    forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_folder("acme/tiny").name == COMMIT
    assert len(server.requests) == asked


def test_a_rerun_reads_the_commit_of_the_cache(server: HubServer, tiny_llama):
    server.models["acme/tiny"] = tiny_llama
    assert local_folder("acme/tiny").name == COMMIT
    forget()
    server.commit = "d" * 40
    assert local_folder("acme/tiny").name == COMMIT
    assert local_folder("acme/tiny@" + "d" * 40).name == "d" * 40


def test_the_cache_stands_in_for_a_hub_that_fails(server: HubServer, capsys, tiny_llama):
    server.models["acme/tiny"] = tiny_llama
    local_folder("acme/tiny")
    forget()
    server.failing["acme/tiny"] = (503, "")
    assert local_folder("acme/tiny").name == COMMIT
    assert "is read from the hub's cache" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("status", "code", "said", "hint"),
    [
        (404, "RepoNotFound", "no such model on the hub", "spelling"),
        (404, "RevisionNotFound", "has no revision `main`", "commit"),
        (401, "GatedRepo", "gated model", "accept its terms"),
        (403, "", "refuses access", "log in"),
        (500, "", "cannot be reached", "network"),
        (0, "", "cannot be reached: timed out", "network"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_error_within_seconds(server, monkeypatch, status, code, said, hint):
    monkeypatch.setattr(hub, "REPLY_SECONDS", 1)
    server.failing["acme/tiny"] = (status, code)
    began = time.monotonic()
    with pytest.raises(ModelError) as raised:
        local_folder("acme/tiny")
    assert time.monotonic() - began < 15
    assert said in raised.value.message
    assert hint in (raised.value.hint or "")
    assert "HuggingFaceTB" not in raised.value.message + (raised.value.hint or "")


def test_offline_says_so(cache):
    with pytest.raises(ModelError, match="not in the hub's cache") as raised:
        local_folder("acme/tiny")
    assert "HF_HUB_OFFLINE" in (raised.value.hint or "")


@pytest.mark.parametrize(
    "name", ["runs/my-sft", "models/typo", "./x", "../x", "a/b/c", "/nowhere", "x.safetensors", "work/typo", "a b/c"]
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(server: HubServer, tmp_path, name):
    (tmp_path / "work").mkdir()
    with pytest.raises(ModelError, match="no such model folder"):
        hub_model(name)
    assert server.requests == []


def test_similar_folders_are_offered(cache, tmp_path):
    for folder in ("runs/qa/train-rm", "runs/qa/sft", "runs/other"):
        (tmp_path / folder).mkdir(parents=True)
    for typo in ("runs/qa/trian-rm", "runs/qaa/train-rm"):
        with pytest.raises(ModelError) as raised:
            check_model_name(typo)
        assert raised.value.hint == "did you mean runs/qa/train-rm?"


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("gpt2", None, HubModel("gpt2", None)),
        ("acme/tiny", "v1", HubModel("acme/tiny", "v1")),
        ("acme/tiny@v1", None, HubModel("acme/tiny", "v1")),
        ("acme/tiny@refs/pr/3", None, HubModel("acme/tiny", "refs/pr/3")),
        ("acme/tiny@v1", COMMIT, HubModel("acme/tiny", COMMIT)),
    ],
)
def test_names_of_the_hub(cache, name, revision, expected):
    assert hub_model(name, revision) == expected


def test_the_base_of_an_adapter_is_known_by_its_weights(cache, tmp_path, tiny_llama):
    base, run = tmp_path / "run" / "sft", tmp_path / "run"
    shutil.copytree(tiny_llama, base)
    folder = trained(str(base), run / "train-rm", lora=True)
    before = rewards(str(folder))
    run.rename(tmp_path / "moved")
    assert rewards(str(tmp_path / "moved" / "train-rm")) == before
    weights = tmp_path / "moved" / "sft" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match="was trained on other weights"):
        rewards(str(tmp_path / "moved" / "train-rm"))
    shutil.rmtree(tmp_path / "moved" / "sft")
    with pytest.raises(ModelError, match="which is not there") as raised:
        rewards(str(tmp_path / "moved" / "train-rm"))
    assert "reward.json" in (raised.value.hint or "")


def test_an_adapter_without_a_config_has_a_commit_in_the_cache_too(server: HubServer, tmp_path, tiny_llama):
    folder = trained(str(tiny_llama), tmp_path / "rm", lora=True)
    shutil.move(folder / "adapter", tmp_path / "adapter")
    server.models["acme/adapter"] = tmp_path / "adapter"
    assert local_folder("acme/adapter", with_weights=False).name == COMMIT
    forget()
    server.commit = "d" * 40
    assert local_folder("acme/adapter", with_weights=False).name == COMMIT


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin"])
def test_pickles_alone_are_named_before_anything_is_downloaded(server: HubServer, tmp_path, tiny_llama, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / name).write_bytes(b"pickle")
    server.models["acme/tiny"] = folder
    found = check_model(ModelUse(ModelSource("acme/tiny@v1"), "policy"))
    assert [error.message for error in found.errors] == [
        f"`acme/tiny` has its weights only as pickles, such as {name}, which can run code when they are read"
    ]
    assert "`hf download acme/tiny --revision v1 --local-dir FOLDER`" in (found.errors[0].hint or "")
    assert not [path for path in server.requests if "/resolve/" in path]


def test_a_hub_that_fails_between_config_and_weights_is_named(server: HubServer, tiny_llama, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits 23 s between its attempts
    server.models["acme/tiny"] = tiny_llama
    local_folder("acme/tiny", with_weights=False)
    server.failing["acme/tiny"] = (503, "")
    with pytest.raises(ModelError, match=r"cannot be reached.*503"):
        local_folder("acme/tiny")


def test_a_full_disk_while_weights_are_downloaded_is_named(server: HubServer, monkeypatch, tiny_llama):
    server.models["acme/tiny"] = tiny_llama
    local_folder("acme/tiny", with_weights=False)

    def full(*arguments, local_files_only=False, **options):
        if not local_files_only:
            raise OSError(28, "No space left on device")
        return str(download(HubModel("acme/tiny"), with_weights=False))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(ModelError, match=r"cannot be stored in .* No space left on device"):
        local_folder("acme/tiny")


def test_without_the_hub_weights_that_are_missing_or_damaged_are_found(cache, tiny_llama):
    put(cache, "acme/tiny", tiny_llama)
    weights = cache / "models--acme--tiny" / "snapshots" / COMMIT / "model.safetensors"

    def errors() -> str:
        forget()
        return " ".join(error.message for error in check_model(ModelUse(ModelSource("acme/tiny"), "policy")).errors)

    assert errors() == ""
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "model.safetensors is truncated" in errors()
    weights.unlink()
    assert "`acme/tiny`: its weights are not in the hub's cache" in errors()
    (weights.parent / "pytorch_model.bin").write_bytes(b"pickle")
    assert "holds its weights as pytorch_model.bin, a pickle" in errors()


def test_online_a_damaged_file_of_the_cache_is_found_and_weights_to_come_are_not_asked_for(server, tiny_llama):
    server.models["acme/tiny"] = tiny_llama
    use = ModelUse(ModelSource("acme/tiny"), "policy")
    assert check_model(use).errors == []
    assert not [path for path in server.requests if path.endswith(".safetensors")]
    weights = local_folder("acme/tiny") / "model.safetensors"
    content = weights.read_bytes()[:-8]
    weights.unlink()
    weights.write_bytes(content)
    assert "is truncated" in check_model(use).errors[0].message


def test_what_a_stage_was_started_with_names_the_commit(server: HubServer, cache, monkeypatch, tiny_llama):
    server.models["acme/tiny"] = tiny_llama
    digest = hash_model("acme/tiny")
    assert digest == f"hub:acme/tiny@main {COMMIT}"
    assert hash_model("acme/tiny", "v1").startswith("hub:acme/tiny@v1 ")
    forget()
    assert hash_model("acme/tiny") == digest
    put(cache, "acme/tiny", tiny_llama, commit="d" * 40)  # as `hf download` does
    assert hash_model("acme/tiny") == f"hub:acme/tiny@main {'d' * 40}"
    forget()
    shutil.rmtree(cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hash_model("acme/tiny") == "hub:acme/tiny@main"


@pytest.mark.parametrize(
    ("now", "then", "expected"),
    [
        ("hub:a/b@main", "hub:a/b@main c1", "hub:a/b@main c1"),
        ("hub:a/b@main c2", "hub:a/b@main c1", "hub:a/b@main c2"),
        ("hub:a/b@v1", "hub:a/b@main c1", "hub:a/b@v1"),
        ("1f on hub:a/b@main", "1f on hub:a/b@main c1", "1f on hub:a/b@main c1"),
        ("1f", "1f", "1f"),
    ],
)
def test_a_commit_that_is_not_known_now_is_the_one_of_then(now, then, expected):
    what = {"stage": "sft", "inputs": {"base": now}}
    assert recall_commits(what, {"inputs": {"base": then}})["inputs"] == {"base": expected}
    assert recall_commits(what, None) == recall_commits(what, {"inputs": {}}) == what


def test_the_folder_of_an_adapter_alone_keeps_the_commit_of_its_base(server: HubServer, tmp_path, tiny_llama):
    server.models["acme/base"] = tiny_llama
    adapter = trained("acme/base", tmp_path / "rm", lora=True) / "adapter"
    found = find_peft_folder(str(adapter))
    assert found is not None
    assert (found.base, found.base_revision) == ("acme/base", COMMIT)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"revision": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "base.json").write_text(json.dumps({"revision": "d" * 40, "sha256": None}))
    found = find_peft_folder(str(adapter))
    assert found is not None
    assert found.base_revision == "d" * 40


def test_one_process_of_several_hashes_a_base(monkeypatch, tiny_llama):
    file = Path("runs/x/reward.json")
    with pytest.raises(ModelError, match="was trained on other weights"):
        check_base(str(tiny_llama), "0" * 64, file)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("rlhf_cli.models.base_model.hash_weights", lambda path: pytest.fail("hashed"))
    check_base(str(tiny_llama), "0" * 64, file)
