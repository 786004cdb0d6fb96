"""Models with their own Python code: what runs, where the permission ends, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.loading import ModelSource, check_policy, load_config, load_policy, load_tokenizer
from rlhf_cli.models.remote_code import has_trusted_code
from rlhf_cli.models.reward_model.classifier import check_classifier
from rlhf_cli.models.saving import save_model_folder
from rlhf_cli.models.verification import check_tokenizer
from rlhf_cli.models.weight_loading import load_weights
from rlhf_cli.settings.shared import ModelSettings
from rlhf_cli.stages.common import trusts_code
from rlhf_cli.stages.ppo.critic import FullCritic
from tests.conftest import byte_level_tokenizer

_CONFIGURATION = "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
_MODEL = (
    "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
)


_BACKBONE = (
    "from transformers import LlamaModel\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnModel(LlamaModel):\n    config_class = OwnConfig\n"
)
_TOKENIZER = (
    "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizerFast(PreTrainedTokenizerFast):\n    pass\n"
)


@pytest.fixture
def own(tiny_llama: Path, tmp_path: Path, own_modules: Path) -> Path:
    """A Llama under classes of its own."""
    folder = tmp_path / "own-model"
    shutil.copytree(tiny_llama, folder)
    (folder / "configuration_own.py").write_text(_CONFIGURATION)
    (folder / "modeling_own.py").write_text(_MODEL)
    fields = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_code_runs_only_where_it_is_allowed_and_is_written_with_the_model(own: Path, tiny_llama: Path, tmp_path: Path):
    for load in (load_policy, check_policy, check_classifier):
        with pytest.raises(ModelError, match="comes with Python code of its own") as caught:
            load(ModelSource(str(own)))
        assert "model.trust_remote_code=true" in (caught.value.hint or "")
    source = ModelSource(str(own), trust_remote_code=True, revision="main")
    model = load_policy(source)
    assert type(model).__name__ == "OwnForCausalLM"
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, load_policy(ModelSource(str(tiny_llama)))(ids).logits)
    with pytest.raises(ModelError, match="is of type own, which cannot be a reward model"):
        check_classifier(source)

    written = tmp_path / "run/sft"
    save_model_folder(model, byte_level_tokenizer(), written, dtype=torch.float32)
    assert has_trusted_code(str(written), str(own))
    again = load_policy(ModelSource(str(written), trust_remote_code=True))
    assert torch.equal(again(ids).logits, model(ids).logits)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_tokenizer_and_a_critic_with_own_code_are_read_back(own: Path, tmp_path: Path):
    (own / "modeling_own.py").write_text(_BACKBONE)
    (own / "tokenization_own.py").write_text(_TOKENIZER)
    edit(
        own / "config.json",
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"},
    )
    edit(own / "tokenizer_config.json", tokenizer_class="OwnTokenizer",
         auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]})  # fmt: skip
    source = ModelSource(str(own), trust_remote_code=True, revision="main")
    tokenizer = load_tokenizer(source)
    assert type(tokenizer).__name__ == "OwnTokenizerFast"
    tokenizer.save_pretrained(tmp_path / "written")
    check_tokenizer(tokenizer, tmp_path / "written", source)
    with pytest.raises(ModelError):
        check_tokenizer(tokenizer, tmp_path / "written", ModelSource(str(own)))

    model = load_weights(AutoModel, source, load_config(source))
    assert type(model).__name__ == "OwnModel"
    FullCritic(model).save(tmp_path / "critic")
    assert (tmp_path / "critic/modeling_own.py").is_file()


def name_class(folder: Path, name: str) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": name})


@pytest.mark.parametrize(
    ("change", "is_trusted"),
    [
        (lambda copy: None, True),
        (lambda copy: (copy / "modeling_own.py").unlink(), True),
        (lambda copy: (copy / "modeling_own.py").open("a").write("# more\n"), False),
        (lambda copy: (copy / "other.py").write_text("print()\n"), False),
        (lambda copy: shutil.copytree(copy, copy / "critic"), True),
        (lambda copy: ((copy / "parts").mkdir(), (copy / "parts/other.py").write_text("print()\n")), False),
        (lambda copy: name_class(copy, "modeling_own.OwnForCausalLM"), True),
        (lambda copy: name_class(copy, "modeling_own.OwnConfig"), False),
        (lambda copy: name_class(copy, "acme/other--modeling_own.OwnForCausalLM"), False),
        (lambda copy: edit(copy / "tokenizer_config.json", auto_map=["modeling_own.Reader", None]), False),
    ],
    ids=[
        "same",
        "fewer files",
        "changed",
        "another file",
        "again in a subfolder",
        "another file in a subfolder",
        "fewer classes",
        "another class",
        "another repository",
        "a tokenizer",
    ],
)
def test_permission_is_for_the_same_code(change, is_trusted: bool, own: Path, tmp_path: Path):
    copy = shutil.copytree(own, tmp_path / "copy")
    change(copy)
    allowed: Any = SimpleNamespace(model=ModelSettings(path=str(own), trust_remote_code=True, revision="main"))
    assert trusts_code(allowed, str(copy)) == is_trusted
    assert trusts_code(allowed, str(own))
    asked: Any = SimpleNamespace(model=ModelSettings(path=str(own)))
    assert not trusts_code(asked, str(own))
    assert not trusts_code(asked, str(copy))


def test_a_model_without_code_needs_no_permission(own: Path, tiny_llama: Path):
    assert not has_trusted_code(str(tiny_llama), str(own))
    assert not has_trusted_code("acme/tiny", str(own))


def recipe_of(folder: Path) -> Any:
    return SimpleNamespace(model=ModelSettings(path=str(folder), trust_remote_code=True, revision="main"))


def test_an_answer_is_not_kept(own: Path, tmp_path: Path):
    copy = shutil.copytree(own, tmp_path / "copy")
    assert trusts_code(recipe_of(own), str(copy))
    (copy / "modeling_own.py").write_text("print()\n")
    assert not trusts_code(recipe_of(own), str(copy))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused(file: str, own: Path):
    edit(own / file, auto_map={"AutoTokenizer": [None, "acme/other--tokens.Own"]})
    with pytest.raises(ModelError, match=f"{file} names Python code of another repository") as caught:
        trusts_code(recipe_of(own), str(own))
    assert "`tokens.Own`" in (caught.value.hint or "")
    edit(own / file, auto_map={"AutoTokenizer": [None, "tokens.Own"]})  # as the hint says
    assert trusts_code(recipe_of(own), str(own))


def test_an_adapter_on_a_base_with_own_code_is_refused_by_name(own: Path, tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(own), "r": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=r"the base of the PEFT adapter .* comes with Python code") as caught:
        load_config(ModelSource(str(tmp_path / "adapter"), trust_remote_code=True))
    assert "merge_and_unload" in (caught.value.hint or "")
