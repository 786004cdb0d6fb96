"""Recipes: valid content, error messages, and origins of values."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin

import pytest

from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.fields import RENAMED, dotted, field_at, walk
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import OUR_ATTENTION, THEIR_ATTENTION, ModelSettings


def load(tmp_path: Path, text: str, *settings: str):
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(path, settings)


def problems(tmp_path: Path, text: str, *settings: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *settings)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-6", 1e-6), ("1e-5", 1e-5), ("1E-5", 1e-5), ("0.5", 0.5), ("1", 1.0), (".5", 0.5), ("1_000", 1000.0)],
)
def test_numbers_as_people_write_them(tmp_path, written, value):
    recipe = load(tmp_path, f"sft:\n  data: d\n  learning_rate: {written}\n").recipe
    assert recipe.sft.learning_rate == value
    assert isinstance(recipe.sft.learning_rate, float)


@pytest.mark.parametrize(
    "written", ["no", "yes", "on", "off", "2024-01-01", "1:30", "=", "nan", "'1'", '"true"', "a#b", "0x", "<<"]
)
def test_text_stays_text(tmp_path, written):
    recipe = load(tmp_path, f"model: {{revision: {written}}}\n").recipe
    assert recipe.model.revision == written.strip("'\"")


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    assert load(tmp_path, "ppo: {steps: 1e3}\nevaluate: {max_prompts: 2e1}\n").recipe.ppo.steps == 1000


def test_a_bare_section_has_its_defaults_and_null_has_none(tmp_path):
    recipe = load(tmp_path, "ppo:\ntrain_rm: null\nevaluate: ~\nmodel:\n").recipe
    assert recipe.ppo is not None
    assert recipe.train_rm is None
    assert recipe.evaluate is None


def test_bom_crlf_and_a_last_line_without_end(tmp_path):
    assert load(tmp_path, "\ufeffname: x\r\nseed: 3").recipe.seed == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\nname: a\nseed: 2\n", "r.yaml:3: `seed` is given twice; the first is on line 1"),
        ("ppo:\n  steps: 1\n  steps: 1\n", "r.yaml:3: `steps` is given twice; the first is on line 2"),
        ("a: &x 1\n", "r.yaml:1: anchors and aliases"),
        ("seed: 1\nname: *x\n", "r.yaml:2: anchors and aliases"),
        ("seed: !!int 1\n", "r.yaml:1: tags are not allowed"),
        ("name: !!python/object:os.system x\n", "r.yaml:1: tags are not allowed"),
        ("seed: 1\n---\nseed: 2\n", "r.yaml:2: a second document"),
        ("ppo:\n\tsteps: 1\n", "r.yaml:2: not valid YAML: a tab in the indentation; use spaces"),
        ("name: a: b\n", "r.yaml:1: not valid YAML: a second `:` on this line"),
        ("name: [a\n", "not valid YAML: an unclosed bracket or quote"),
        ("name: 'a\n", "not valid YAML: an unclosed bracket or quote"),
        ("x: " + "[" * 30 + "\n", "r.yaml:1: nested deeper than 20 levels"),
        ("x:\n" + "".join("  " * i + "- \n" for i in range(1, 40)), "nested deeper than 20 levels"),
        ("- a\n", "r.yaml:1: a recipe must be a mapping of sections such as `sft:`; got a list"),
        ("hello\n", "got a single value"),
        ("", "r.yaml: the recipe is empty"),
        ("# only a comment\n", "r.yaml: the recipe is empty"),
        ("seed: 1\nname: \x00\n", "r.yaml:2: not valid YAML: "),
        ("? [a]\n: 1\n", "r.yaml:1: a key must be a scalar"),
    ],
)
def test_invalid_yaml(tmp_path, text, problem):
    (found,) = problems(tmp_path, text)
    assert problem in found


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"name: x\nseed: \xff\n", "r.yaml:2: byte 0xff is not UTF-8"),
        ("name: x\n".encode("utf-16"), "r.yaml:1: encoded as UTF-16"),
        (b"#" * (1 << 20) + b"\n", "larger than 1 MiB"),
    ],
)
def test_invalid_encodings(tmp_path, raw, problem):
    (tmp_path / "r.yaml").write_bytes(raw)
    with pytest.raises(RecipeError, match=problem):
        load_recipe(tmp_path / "r.yaml")


def test_invalid_recipe_files(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ppo:\n  learning_rat: 1\n", "r.yaml:2: unknown setting `ppo.learning_rat`, did you mean `learning_rate`?"),
        ("ppo:\n  lr: 1\n", "r.yaml:2: unknown setting `ppo.lr`, did you mean `learning_rate`?"),
        ("Model:\n", "r.yaml:1: unknown setting `Model`, did you mean `model`?"),
        ("ppo: {'list[str]': 1}\n", "unknown setting `ppo.list[str]`"),
        ("modle:\n  path: x\n", "r.yaml:1: unknown setting `modle`, did you mean `model`?"),
        ("train-rm:\n", "r.yaml:1: unknown setting `train-rm`, did you mean `train_rm`?"),
        ("sft:\n  data: d\n  kl_coef: 1\n", "r.yaml:3: unknown setting `sft.kl_coef`; it belongs under `ppo`"),
        ("sampling:\n  stop: [x]\n", "r.yaml:2: unknown setting `sampling.stop`, did you mean `stop_tokens`?"),
        ("ppo:\n  lora: {zzz: 1}\n", "unknown setting `ppo.lora.zzz`; known here: `rank`, `alpha`, `dropout`"),
        ("ppo: {learning_rate: .nan}\n", "r.yaml:1: `ppo.learning_rate` must be a finite number; got .nan"),
        ("ppo: {kl_coef: .inf}\n", "`ppo.kl_coef` must be a finite number; got .inf"),
        ("ppo:\n\n  prompts_per_step: -4\n", "r.yaml:3: `ppo.prompts_per_step` must be at least 1; got -4"),
        ("data: {holdout: 1.5}\n", "`data.holdout` must be less than 1; got 1.5"),
        ("ppo: {gamma: 1.01}\n", "`ppo.gamma` must be at most 1; got 1.01"),
        ("ppo: {temperature: 0}\n", "`ppo.temperature` must be greater than 0; got 0"),
        ("ppo: {steps: 1.5}\n", "`ppo.steps` must be a whole number; got 1.5"),
        ("ppo: {steps: true}\n", "`ppo.steps` must be a whole number; got true"),
        ("ppo: {learning_rate: fast}\n", '`ppo.learning_rate` must be a number; got "fast"'),
        ("ppo: {learning_rate: 1e-5 # why\n}\n", ""),
        ("sft: {data: d, packing: no}\n", '`sft.packing` must be true or false; got "no"'),
        ("name: 7\n", "`name` must be text; got 7 (quote it to make it text)"),
        ("name: ../up\n", "`name`: expected letters, digits"),
        ("ppo: {schedule: cosin}\n", '`ppo.schedule` must be `constant`, `linear` or `cosine`; got "cosin"'),
        ("ppo: [1]\n", "`ppo` must be a section with settings; got a list"),
        ("ppo: {rewards: {function: f}}\n", "`ppo.rewards` must be a list; got a mapping"),
        (
            "ppo: {rewards: [{weight: 1}]}\n",
            "`ppo.rewards.0`: expected exactly one of `function`, `model` and `url`; got none",
        ),
        (
            "ppo: {detectors: {kl: {stop: 20}}}\n",
            "`ppo.detectors`: `kl.stop: 20` is reached before `kl.warn: 30`: it must be at least that",
        ),
        (
            'ppo: {rewards: [{url: "https://host/score?key=word"}]}\n',
            "`ppo.rewards.0.url`: expected a URL without a query (`?...`) or fragment (`#...`)",
        ),
        ('ppo: {rewards: [{url: "https://host/score#word"}]}\n', "`ppo.rewards.0.url`: expected a URL without"),
        ("ppo: {lora: {target_modules: 3}}\n", "must be text or a list of text; got 3"),
        (
            "ppo: {lora: {target_modules: [3]}}\n",
            "`ppo.lora.target_modules` must be text or a list of text; got a list",
        ),
        ("data: {columns: {prompt: 3}}\n", "`data.columns.prompt` must be text or a list of text; got 3"),
        ("sft: {epochs: 2}\n", "r.yaml:1: `sft` needs `data`: demonstration records"),
        ("label: {by: function}\n", "r.yaml:1: `label`: `by: function` needs `function`"),
        ("label: {by: import, data: d, function: f}\n", "`function` has no effect with `by: import`"),
        ("model: {path: a, build: {}}\n", "`model`: `path` and `build` are mutually exclusive"),
        ("model: {build: {}}\n", "r.yaml: `model.build` creates an untrained model"),
        (
            "model: {build: {architecture: encoder-decoder}}\nsft: {data: d}\ntrain_rm: {data: d}\n",
            "an encoder-decoder cannot be a reward model: set `train_rm.model` to another model",
        ),
        (
            "model: {build: {architecture: encoder-decoder}}\nsft: {data: d, packing: true}\n",
            "`sft.packing` needs a decoder-only model; `model.build` makes an encoder-decoder",
        ),
        ("model: {attention: tilled}\n", "got `tilled`, did you mean `tiled`?"),
        ("model: {attention: Triton}\n", "got `Triton`, did you mean `triton`?"),
        ("model: {attention: 'torch '}\n", "got `torch `, did you mean `torch`?"),
        (
            "model: {attention: zebra}\n",
            "`model.attention`: expected one of auto, reference, tiled, torch, triton, sdpa",
        ),
        ("ppo: {lora: {dropout: 0.1}}\n", "`lora.dropout` must be 0"),
        ("ppo: {kl_coef: 0, kl_target: 6}\n", "`kl_target` has no effect with `kl_coef: 0`"),
        ("ppo: {critic_warmup_steps: 2, value_coef: 0}\n", "`critic_warmup_steps` has no effect with `value_coef: 0`"),
        ("ppo: {eval_prompts: 3}\n", "`eval_prompts` has no effect without `eval_steps`"),
        ("ppo: {shown_prompts: 1}\n", "`shown_prompts` has no effect without `show_steps`"),
        ("ppo: {kl_estimator: k3}\n", "`kl_estimator: k3` needs `kl_in: loss`: in the reward, only `kl_estimator: k1`"),
        ("ppo: {kl_in: loss}\n", "`kl_in: loss` needs `kl_estimator: k2` or `k3`"),
        ("ppo: {kl_budget: 3}\n", "`kl_budget` selects among evaluated policies and needs `eval_steps`"),
        (
            "ppo: {kl_budget: 3, eval_steps: 1, reward_scale: running, length_penalty: 0.1}\n",
            "use a fixed `reward_scale`",
        ),
        (
            "data: {prompt_template: 'Q:'}\n",
            "`data.prompt_template`: expected `auto`, `chat`, null or text that contains `{prompt}`",
        ),
        ("seed: -1\n", "`seed` must be at least 0; got -1"),
        ("seed: 99999999999\n", "`seed` must be less than 4294967296"),
    ],
)
def test_invalid_settings(tmp_path, text, problem):
    if not problem:
        assert load(tmp_path, text).recipe.ppo is not None
        return
    (found,) = problems(tmp_path, text)
    assert problem in found


def unions() -> list[str]:
    """Return all settings that take values of several types; null is not one."""
    found = []
    for setting in walk():
        members = get_args(setting.field.annotation)
        is_union = get_origin(setting.field.annotation) in (Union, UnionType)
        if is_union and len([one for one in members if one is not NoneType]) > 1:
            found.append(dotted(setting.key_path))
    return found


@pytest.mark.parametrize("name", unions())
@pytest.mark.parametrize("value", ["node", "-3", "1.5", "true", "{a: 1}", "[1, [2]]", '""'])
def test_a_setting_of_several_types_has_one_problem_that_names_them_all(name, value):
    required = {"sft": "sft.data=d", "data": "data.comparison.completions=[a, b]"}
    before = [required[part] for part in name.split(".") if part in required]
    try:
        load_recipe(None, [*before, f"{name}={value}"])
    except RecipeError as error:
        (problem,) = error.problems
        assert problem.startswith(f"--set {name}={value}: `{name}` must be ")
        assert re.search(r" or (`\w+`|a list of \w+); got ", problem), problem
    else:
        assert value in ("node", "1.5", '""'), "other values are of no type that any of them takes"


def test_the_types_of_a_setting_are_named_in_words():
    assert {"model.sharding_size", "ppo.reward_scale", "ppo.lora.target_modules", "data.comparison.verdict"} <= set(
        unions()
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, ["model.sharding_size=node", "ppo.reward_scale=0"])
    assert caught.value.problems == [
        '--set model.sharding_size=node: `model.sharding_size` must be a whole number or `machine`; got "node"',
        "--set ppo.reward_scale=0: `ppo.reward_scale` must be greater than 0 or `running`; got 0",
    ]


def test_attention_names_match_the_registry():
    from rlhf_cli.attention import registry

    assert set(OUR_ATTENTION) == set(registry.names())
    for name in (*OUR_ATTENTION, *THEIR_ATTENTION, "mine:attend", "my.package:attend", "kernels-community/flash-attn3"):
        assert ModelSettings(attention=name).attention == name


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path):
    text = "ppo:\n  steps: 0\n  clip: 1\nseed: x\nsft:\n  data: 3\n"
    found = problems(tmp_path, text, "ppo.gamma=2", "ppo.nothing", "evaluate.tie_margn=1")
    assert [problem.split(": ")[0] for problem in found[:4]] == ["r.yaml:2", "r.yaml:3", "r.yaml:4", "r.yaml:6"]
    assert set(found[4:]) == {
        "--set ppo.gamma=2: `ppo.gamma` must be at most 1; got 2",
        "--set ppo.nothing: expected SETTING=VALUE, such as ppo.learning_rate=1e-6",
        "--set evaluate.tie_margn=1: unknown setting `evaluate.tie_margn`, did you mean `tie_margin`?",
    }


def test_a_long_value_is_shortened_and_control_characters_are_shown(tmp_path):
    (found,) = problems(tmp_path, 'ppo: {steps: "\\e[31m' + "x" * 200 + '"}\n')
    assert "\\x1b[31m" in found
    assert len(found) < 160


@pytest.mark.parametrize(
    ("settings", "read", "value"),
    [
        (["ppo.learning_rate=1e-6"], lambda r: r.ppo.learning_rate, 1e-6),
        (["evaluate.max_prompts=500"], lambda r: r.evaluate.max_prompts, 500),
        (["evaluate={}"], lambda r: r.evaluate is not None, True),
        (["evaluate="], lambda r: r.evaluate is not None, True),
        (["ppo=null"], lambda r: r.ppo, None),
        (["ppo.kl_target=9", "ppo.kl_target=null"], lambda r: r.ppo.kl_target, None),
        (["ppo.rewards.0.weight=2"], lambda r: r.ppo.rewards[0].weight, 2.0),
        (["ppo.rewards.1={function: g}"], lambda r: r.ppo.rewards[1].function, "g"),
        (["ppo.lora.target_modules=[q, v]"], lambda r: r.ppo.lora.target_modules, ["q", "v"]),
        (["data.columns.prompt=question"], lambda r: r.data.columns, {"prompt": "question"}),
        (["data.prompt_template='Q: {prompt}'"], lambda r: r.data.prompt_template, "Q: {prompt}"),
        (["ppo.lora={rank: 4}", "ppo.lora.alpha=8"], lambda r: (r.ppo.lora.rank, r.ppo.lora.alpha), (4, 8.0)),
        (["model.revision=a=b"], lambda r: r.model.revision, "a=b"),
    ],
)
def test_set(tmp_path, settings, read, value):
    recipe = load(tmp_path, "ppo:\n  rewards: [{function: f}]\n", *settings).recipe
    assert read(recipe) == value


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("ppo.rewards.3.weight=1", "`ppo.rewards` has 1 entries, numbered from 0"),
        ("ppo.rewards.first=1", "`ppo.rewards` is a list; give the number of an entry"),
        ("name.x=1", "`name` is a single value and has no settings"),
        ("=3", "expected SETTING=VALUE"),
        ("ppo..steps=3", "expected SETTING=VALUE"),
        ("ppo.steps=[", "not valid YAML: an unclosed bracket or quote"),
        ("ppo.steps=!!int 3", "tags are not allowed"),
        ("ppo.lorra.rank=3", "unknown setting `ppo.lorra`, did you mean `lora`?"),
    ],
)
def test_an_invalid_set_is_quoted(tmp_path, setting, problem):
    (found,) = problems(tmp_path, "name: x\nppo:\n  rewards: [{function: f}]\n", setting)
    assert found.startswith(f"--set {setting}: ")
    assert problem in found


CONTRADICTIONS = "name: x\nmodel:\n  path: m\n  sharding: fsdp\nppo:\n  rewards: [{function: f}]\nlabel:\n  by: judge\n"


@pytest.mark.parametrize(
    ("settings", "blamed", "problem"),
    [
        (["model.sharding=none", "model.sharding_size=2"], 1, "`sharding_size` has no effect without `sharding: fsdp`"),
        (["model.quantize=4bit"], 0, "`sharding: fsdp` does not support `quantize: 4bit`"),
        (["model={path: m, sharding_size: 2}"], 0, "`sharding_size` has no effect without `sharding: fsdp`"),
        (["ppo.kl_coef=0", "ppo.kl_target=6"], 1, "`kl_target` has no effect with `kl_coef: 0`"),
        (["ppo.steps=3", "ppo.eval_prompts=3"], 1, "`eval_prompts` has no effect without `eval_steps`"),
        (["ppo.lora.dropout=0.1"], 0, "`lora.dropout` must be 0"),
        (["ppo.rewards.0.url=https://host/score"], 0, "expected exactly one of `function`, `model` and `url`"),
        (["generation.engine=torch", "generation.vllm_server=http://host:1"], 1, "`vllm_server` has no effect with"),
        (["data.comparison.completions=[a, b]", "data.comparison.verdict=[]"], 1, "several columns in `verdict`"),
    ],
)
def test_a_contradiction_names_the_option_that_causes_it(tmp_path, settings, blamed, problem):
    """Two settings contradict each other: the line of their section is not to blame for what an option says."""
    found = [one for one in problems(tmp_path, CONTRADICTIONS, *settings) if problem in one]
    assert len(found) == 1
    assert found[0].startswith(f"--set {settings[blamed]}: ")


def test_a_contradiction_of_a_file_has_its_line(tmp_path):
    (found,) = problems(tmp_path, "model:\n  path: m\nppo:\n  eval_prompts: 3\n", "ppo.steps=3")
    assert found.startswith("r.yaml:3: ")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_former_setting_name_is_refused_with_the_new_name(old, new):
    former, current = (tuple(name.split(".")) for name in (old, new))
    assert field_at(former) is None
    assert field_at(current) is not None
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [f"{old}=null"])
    assert (
        f"--set {old}=null: unknown setting `{old}`, which was renamed: did you mean `{new}`?" in caught.value.problems
    )


def test_origins(tmp_path):
    loaded = load(tmp_path, "seed: 3\nppo:\n  steps: 5\n", "ppo.gamma=0.9")
    path = tmp_path / "r.yaml"
    assert loaded.origin(("seed",)) == f"{path}:1"
    assert loaded.origin(("ppo", "steps")) == f"{path}:3"
    assert loaded.origin(("ppo", "gamma")) == "--set ppo.gamma=0.9"
    assert loaded.origin(("ppo", "epochs")) == "default"
    assert loaded.origin(("sft", "epochs")) == "default"


def test_a_recipe_from_the_command_line_alone():
    loaded = load_recipe(None, ["sft.data=d", "model.path=m"])
    assert loaded.recipe == Recipe.model_validate({"sft": {"data": "d"}, "model": {"path": "m"}})
