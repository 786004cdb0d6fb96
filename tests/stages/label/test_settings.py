"""The `label` section: every combination that has no effect or no sense is refused, in words that say which."""

from __future__ import annotations

import pytest

from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.recipe.overrides import override
from rlhf_cli.recipe.schema import Recipe

LOCAL = "judge: {panel: [{model: m}]}"
REMOTE = 'judge: {panel: [{url: "http://h/v1", name: n'


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ("by: machine", "`label.by` must be"),
        ("by: judge", "`by: judge` needs `judge`"),
        ("by: human, function: f", "`function` has no effect with `by: human`"),
        ("by: function, function: f, human: {}", "`human` has no effect with `by: function`"),
        ("by: function, function: f, judge: {panel: [{model: m}]}", "`judge` has no effect with `by: function`"),
        ("by: human, tie_margin: 1", "`tie_margin` has no effect with `by: human`"),
        (f"by: judge, {LOCAL}, tie_margin: 1", "`tie_margin` has no effect with `by: judge`"),
        ("by: import, data: d, items: i", "`items` has no effect with `by: import`"),
        (
            "by: import, data: d, active_learning: {by: random, prompts: 3}",
            "`active_learning` has no effect with `by: import`",
        ),
        ("by: human, items: i, model: m", "`model` has no effect together with `items`"),
        ("by: human, items: i, prompts: p", "`prompts` has no effect together with `items`"),
        (
            "by: human, items: i, completions_per_prompt: 3",
            "`completions_per_prompt` has no effect together with `items`",
        ),
        ("by: human, items: i, sampling: {temperature: 0.5}", "`sampling` has no effect together with `items`"),
        (
            "by: human, active_learning: {by: random, prompts: 3, completions: 5}",
            "`active_learning.completions: 5` exceeds",
        ),
        (
            "by: human, active_learning: {by: random, prompts: 3, reward_models: [a]}",
            "`reward_models` has no effect with",
        ),
        (
            "by: human, active_learning: {by: uncertainty, prompts: 3}",
            "`by: uncertainty` needs exactly one reward model; got 0",
        ),
        (
            "by: human, active_learning: {by: disagreement, prompts: 3, reward_models: [a]}",
            "at least two reward models; got 1",
        ),
        (
            "by: human, active_learning: {by: disagreement, prompts: 3, reward_models: [a, a]}",
            "lists the same reward model twice",
        ),
        ("by: human, active_learning: {by: random}", "`label.active_learning` needs `prompts`"),
        ("by: human, human: {strengths: true}", "`human.strengths` needs two completions per prompt"),
        ("by: human, human: {gold_share: 0.1}", "`gold_share` has no effect without `gold`"),
        ("by: human, human: {overlap: 0}", "`label.human.overlap` must be at least 1; got 0"),
        ("by: human, human: {repeat_share: 1}", "`label.human.repeat_share` must be less than 1"),
        ("by: human, human: {criteria: [a, A]}", "the same criterion is listed twice"),
        ('by: human, human: {criteria: ["a:b"]}', "got `a:b`"),
        ("by: human, human: {criteria: [a, b, c, d, e, f, g, h, i, j]}", "at most 9 criteria"),
        ("by: human, human: {overlapp: 2}", "did you mean `overlap`?"),
        ("by: judge, judge: {panel: []}", "`label.judge.panel`"),
        ("by: judge, judge: {panel: [{}]}", "a judge needs either a `model` or a `url`"),
        ('by: judge, judge: {panel: [{model: m, url: "http://h", name: n}]}', "either a `model` or a `url`"),
        ('by: judge, judge: {panel: [{url: "http://h"}]}', "`url` needs `name`"),
        ("by: judge, judge: {panel: [{model: m, timeout: 3}]}", "`timeout` has no effect without `url`"),
        (
            "by: judge, judge: {panel: [{model: m, prompt_price: 3}]}",
            "`prompt_price` and `completion_price` have no effect",
        ),
        (f"by: judge, {REMOTE}, token_env: sk-secret}}]}}", "expected the name of an environment variable"),
        ('by: judge, judge: {panel: [{url: "http://h?k=1", name: n}]}', "expected a URL without a query"),
        ("by: judge, judge: {panel: [{model: m}], method: listwise}", "`method: listwise` needs judges with a `url`"),
        ("by: judge, judge: {panel: [{model: m}], floor: 0.6}", "`floor` has no effect without `calibration`"),
        ("by: judge, judge: {panel: [{model: m}], rubric: r, rubric_file: f}", "`rubric` has no effect together with"),
        ("by: judge, judge: {panel: [{model: m}], max_cost: 3}", "`max_cost` has no effect unless a judge has"),
    ],
)
def test_what_has_no_effect_is_refused(tmp_path, label, problem):
    path = tmp_path / "r.yaml"
    path.write_text(f"label: {{{label}}}\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, [])
    assert problem in "\n".join(raised.value.problems)
    assert "sk-secret" not in str(raised.value)


@pytest.mark.parametrize(
    "label",
    [
        "by: human",
        "by: human, items: i, human: {overlap: 3, gold: g, gold_share: 0.1, strengths: true}",
        "by: human, completions_per_prompt: 2, human: {strengths: true}",
        "by: human, active_learning: {by: random, prompts: 3, completions: 2}, human: {strengths: true}",
        f"by: judge, {LOCAL}",
        f"by: judge, {REMOTE}, prompt_price: 1}}], max_cost: 2, method: listwise, calibration: c, floor: 0.6}}",
        "by: function, function: f, active_learning: {by: disagreement, prompts: 3, reward_models: [a, b]}",
    ],
)
def test_what_recipe_show_writes_out_is_the_same_recipe(tmp_path, label):
    path = tmp_path / "r.yaml"
    path.write_text(f"label: {{{label}}}\n")
    recipe = load_recipe(path, []).recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("label", "samples", "loads"),
    [
        ("by: human", True, True),
        ("by: human, items: i", False, False),
        (f"by: judge, items: i, {LOCAL}", False, True),
        (f"by: judge, items: i, {REMOTE}}}]}}", False, False),
        ("by: reward-model, items: i, reward_model: r", False, True),
        ("by: human, items: i, active_learning: {by: uncertainty, prompts: 3, reward_models: [r]}", False, True),
        ("by: import, data: d", False, False),
    ],
)
def test_whether_a_stage_samples_and_loads_model(tmp_path, label, samples, loads):
    path = tmp_path / "r.yaml"
    path.write_text(f"label: {{{label}}}\n")
    settings = load_recipe(path, []).recipe.label
    assert (settings.samples, settings.loads_model) == (samples, loads)


def test_a_zero_on_the_command_line_is_called_zero():
    flags = [override("label.by", "human", "--by human"), override("label.human.overlap", 0, "--overlap 0")]
    with pytest.raises(RecipeError, match="must be at least 1; got 0"):
        load_recipe(None, [], flags, section="label")
