"""`recipe show`, the derived sizes, the JSON schema and the reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rlhf_cli.recipe.document import parse
from rlhf_cli.recipe.fields import walk
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.recipe.reference import json_schema, markdown
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.recipe.show import as_json, as_yaml, derived_sizes, scalar

FULL = """\
name: full
model: {path: m, attention: sdpa}
data: {prompts: "p: q.jsonl", columns: {prompt: "a: b", completion: no}, prompt_template: "Q: {prompt}\\nA:"}
sampling: {max_new_tokens: 128}
sft: {data: d, learning_rate: 1e-7}
label: {by: function, function: "gold.py:f", completions_per_prompt: 5}
train_rm: {batch_size: 10, micro_batch_size: 4, lora: {target_modules: [q_proj, v_proj]}}
ppo:
  steps: 10
  prompts_per_step: 12
  samples_per_prompt: 2
  epochs: 3
  minibatches: 5
  micro_batch_size: 2
  rewards: [{function: a.b:c}, {function: "x.py:y", weight: -0.5}]
evaluate: {samples_per_prompt: 3}
"""


@pytest.fixture
def loaded(tmp_path: Path):
    (tmp_path / "full.yaml").write_text(FULL)
    return load_recipe(tmp_path / "full.yaml", ["seed=11"])


def test_what_is_shown_is_the_same_recipe(loaded, tmp_path):
    shown = tmp_path / "shown.yaml"
    for only_changes in (False, True):
        shown.write_text(as_yaml(loaded, Path("runs/full"), only_changes=only_changes))
        assert load_recipe(shown).recipe == loaded.recipe


@pytest.mark.parametrize("name", ["human-labels", "overopt", "qa-human", "quickstart"])
def test_the_changes_of_a_shipped_recipe_are_the_same_recipe(name, tmp_path):
    own = ["sft.data=d.jsonl", "label.data=r.jsonl", "data.prompts=p.jsonl"] if name == "qa-human" else []
    loaded = load_recipe(Path(__file__).parents[2] / "recipes" / f"{name}.yaml", own)
    shown = tmp_path / "shown.yaml"
    shown.write_text(as_yaml(loaded, Path("runs/x"), only_changes=True))
    assert load_recipe(shown).recipe == loaded.recipe


def test_changes_omit_what_has_its_default(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {path: m}\nsft: {data: d}\ntrain_rm:\nppo: {gamma: 1, steps: 7, rewards: [{url: 'http://x'}]}\n"
    )
    text = as_yaml(load_recipe(tmp_path / "r.yaml"), Path("runs/r"), only_changes=True)
    settings = " ".join(re.sub(" +#.*", "", text.partition("# derived sizes")[0]).split())
    changed = "name: r model: path: m sft: data: d train_rm: {} ppo: rewards: - url: http://x steps: 7"
    assert settings.replace('"', "") == changed


def test_every_value_shows_its_origin(loaded, tmp_path):
    text = as_yaml(loaded, Path("runs/full"))
    assert re.search(rf"  learning_rate: 1e-07 +# {re.escape(str(tmp_path))}/full.yaml:5\n", text)
    assert re.search(r"  gamma: 1.0 +# default\n", text)
    assert "# --set seed=11" in text
    assert "# output: runs/full/STAGE/" in text
    assert "# stages to run: sft, label, train-rm, ppo, evaluate" in text


def test_json_holds_origins_sizes_and_stages(loaded):
    shown = as_json(loaded, Path("runs/full"))
    assert shown["settings"]["ppo"]["steps"] == 10
    assert shown["origins"]["seed"] == "--set seed=11"
    assert shown["origins"]["ppo.gamma"] == "default"
    assert shown["origins"]["ppo.rewards.1.weight"].endswith("full.yaml:15")
    assert shown["stages"] == ["sft", "label", "train-rm", "ppo", "evaluate"]
    assert shown["run_dir"] == "runs/full"


def test_derived_sizes_by_hand(loaded):
    sizes = derived_sizes(loaded.recipe)
    assert sizes["ppo"] == {
        "completions per step": 24,
        "episodes in total": 240,
        "optimizer steps per step": 15,
        "optimizer steps in total": 150,
        "completions per minibatch": "4 to 5",
        "micro-batches per minibatch": 3,
        "maximum tokens sampled per step": 3_072,
        "maximum tokens sampled in total": 30_720,
        "checkpoints kept": 2,
        "peak learning rate": "1e-05",
        "peak learning rate of the critic": "1e-05",
    }
    assert sizes["train_rm"] == {
        "micro-batches per optimizer step": 3,
        "peak learning rate": "0.0001",
        "pairs per optimizer step, without ties": 100,
    }
    assert sizes["label"]["pairs per prompt, without ties"] == 10
    assert sizes["sft"] == {"micro-batches per optimizer step": 4, "peak learning rate": "1e-07"}


def test_derived_sizes_of_optional_features(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "ppo: {steps: 10, warmup_share: 0.1, ptx: {data: d, batch_size: 5}, eval_steps: 4, kl_budget: 9}\n"
    )
    sizes = derived_sizes(load_recipe(tmp_path / "r.yaml").recipe)["ppo"]
    assert sizes["optimizer steps of warm-up"] == 4
    assert sizes["demonstrations read in total"] == 10 * 4 * 5
    assert sizes["evaluations"] == 4  # after 0, 4, 8 and 10 steps
    assert sizes["checkpoints kept"] == 3


@pytest.mark.parametrize(
    ("section", "lora", "full"),
    [("sft: {data: d}", "0.0002", "2e-05"), ("train_rm: {}", "0.0001", "1e-05"), ("ppo: {}", "1e-05", "1e-06")],
)
def test_the_default_learning_rate_depends_on_the_adapter(section, lora, full, tmp_path):
    (tmp_path / "r.yaml").write_text(section)
    name = section.partition(":")[0]
    for adapter, expected in (("lora", lora), ("none", full)):
        recipe = load_recipe(tmp_path / "r.yaml", [f"{name}.adapter={adapter}"]).recipe
        assert derived_sizes(recipe)[name]["peak learning rate"] == expected
        assert f"{recipe.section(name.replace('_', '-')).peak_rate:g}" == expected


def test_the_critic_s_default_learning_rate(tmp_path):
    """That of the policy if it is given; a critic in full learns at the rate of a reward model, not of a policy."""
    (tmp_path / "r.yaml").write_text("ppo: {adapter: none}")
    for settings, expected in (
        ([], 1e-5),
        (["ppo.learning_rate=3e-6"], 3e-6),
        (["ppo.learning_rate=3e-6", "ppo.critic_learning_rate=2e-5"], 2e-5),
    ):
        assert load_recipe(tmp_path / "r.yaml", settings).recipe.ppo.critic_peak_rate == expected


def test_absent_sections_are_listed(tmp_path):
    (tmp_path / "r.yaml").write_text("ppo:\n")
    text = as_yaml(load_recipe(tmp_path / "r.yaml"), Path("runs/default"))
    assert "# stages without a section, not run: sft, label, train-rm, evaluate" in text


@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow])  # the first text waits for tables of characters
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**6), 10**6)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=6,
    )
)
def test_scalars_round_trip(value):
    assert parse(f"x: {scalar(value)}\n").value == {"x": value}


def test_every_setting_is_documented_and_in_the_schema():
    undocumented = [setting.key_path for setting in walk() if not (setting.field.description or "").strip()]
    assert undocumented == []
    schema = json_schema()
    ppo = schema["$defs"]["PPOSettings"]
    assert ppo["properties"]["kl_coef"]["description"].startswith("Weight of the per-token KL penalty")
    assert ppo["properties"]["steps"]["minimum"] == 1
    assert ppo["additionalProperties"] is False
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)


def test_the_committed_reference_is_up_to_date():
    committed = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"
    assert committed.read_text() == markdown(), "write it anew: rlhf recipe reference > docs/recipe.md"


def test_the_reference_holds_every_setting():
    text = markdown()
    for setting in walk():
        assert f"| `{setting.key_path[-1]}` |" in text
