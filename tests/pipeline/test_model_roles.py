"""Roles of what will be written: a model that cannot have them is refused before it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.errors import ModelError
from rlhf_cli.pipeline.preflight import check_models_of_run
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.inputs import Input
from tests.models.test_remote_code import own

__all__ = ["own"]


@pytest.fixture
def dry_run(rlhf_here, tmp_path: Path):
    """Plans `sft` and `train-rm` from a model: exit code and messages."""
    message = [{"role": "user", "content": "Why?"}]
    demonstration = {"prompt": message, "completion": [{"role": "assistant", "content": "Because."}]}
    preference = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    (tmp_path / "sft.jsonl").write_text(f"{json.dumps(demonstration)}\n" * 8)
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(preference)}\n" * 8)
    (tmp_path / "recipe.yaml").write_text("sft: {data: sft.jsonl}\ntrain_rm: {data: pairs.jsonl}\n")

    def run(model: Path | str, *settings: str) -> tuple[int, str]:
        given = [part for one in (f"model.path={model}", *settings) for part in ("--set", one)]
        return rlhf_here("run", "recipe.yaml", "--dry-run", *given)

    return run


@pytest.mark.parametrize("name", ["tiny_t5", "tiny_bart"])
def test_an_encoder_decoder_is_refused_before_it_is_fine_tuned_to_start_a_reward_model(
    dry_run, tiny_llama, name, request
):
    folder = request.getfixturevalue(name)
    code, said = dry_run(folder)
    assert code == 65
    assert "an encoder-decoder cannot be a reward model (the output of `sft` is used as start of a reward" in said
    assert dry_run(folder, "train_rm=null")[0] == 0
    assert dry_run(folder, f"train_rm.model={tiny_llama}")[0] == 0


def test_an_architecture_of_the_models_own_code_is_refused_before_it_is_fine_tuned(dry_run, own):
    trusted = ("model.trust_remote_code=true", "model.revision=" + "c" * 40)
    code, said = dry_run(own, *trusted)
    assert code == 65
    assert "is of type own, which cannot be a reward model (the output of `sft`" in said
    assert dry_run(own, *trusted, "train_rm=null")[0] == 0


def test_an_artifact_that_no_stage_writes_is_looked_at_itself(tiny_llama, tiny_t5):
    recipe = Recipe.model_validate({"model": {"path": str(tiny_llama)}})

    def given(folder: Path) -> list[Input]:
        base = Input("model", str(tiny_llama), "model.path", matters=False, role="policy")
        return [base, Input("artifact", str(folder), upstream="sft", role="start of a reward model")]

    check_models_of_run(recipe, given(tiny_llama))
    with pytest.raises(ModelError, match="tiny-t5` is a t5 model; an encoder-decoder cannot be a reward model"):
        check_models_of_run(recipe, given(tiny_t5))


def test_two_revisions_of_one_model_are_refused(dry_run):
    code, said = dry_run("acme/tiny@main", "model.revision=" + "c" * 40)
    assert code == 2
    assert "`model.path: acme/tiny@main` names the revision `main`, and `model.revision` is `ccc" in said
    assert "set `model.path` to `acme/tiny`" in said
    assert "names the revision" not in dry_run("acme/tiny@main", "model.revision=main")[1]
