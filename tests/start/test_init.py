"""`rlhf init --model M --prompts P`: what the recipe holds for a model and data, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf_cli.recipe.loader import load_recipe
from tests.start.conftest import QUESTIONS


@pytest.fixture
def init(rlhf_here, tmp_path, tiny_llama, questions):
    """Writes mine.yaml for the tiny chat model and the questions; returns its recipe, text and the messages."""

    def write(*arguments, model=tiny_llama, prompts=questions, code=0):
        found, said = rlhf_here("init", "mine.yaml", "--model", model, "--prompts", prompts, *arguments)
        assert found == code, said
        path = tmp_path / "mine.yaml"
        return (load_recipe(path).recipe, path.read_text(), said) if code == 0 else (None, "", said)

    return write


def sections(text: str) -> list[str]:
    return [line.partition(":")[0] for line in text.splitlines() if not line.startswith("#")]


def test_a_recipe_for_people_holds_what_differs_from_the_defaults(init, tiny_llama, questions):
    recipe, text, said = init("--steps", "10")
    assert sections(text) == ["name", "model", "data", "sampling", "label", "train_rm", "ppo", "evaluate"]
    assert len(text.splitlines()) <= 17
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n# Written by `rlhf init")
    assert (recipe.model.path, recipe.data.prompts, recipe.label.by) == (str(tiny_llama), str(questions), "human")
    assert (recipe.data.prompt_template, recipe.data.holdout) == ("auto", 0.2)
    assert (recipe.ppo.steps, recipe.ppo.prompts_per_step) == (10, 16)
    assert "llama" in said
    assert "prompted in its chat template" in said
    assert "30 prompts of" in said
    training = int(said.partition(" to train on")[0].split()[-1])
    assert f"{training} to train on, {30 - training} held out" in said
    assert f"# {training} prompts to train on, {30 - training} held out" in text
    assert said.endswith("# talk to the models before and after PPO")
    commands = [
        said.partition("no problems")[2].index(f"rlhf {command} #")
        for command in ("plan mine.yaml", "label mine.yaml", "run mine.yaml", "chat runs/mine")
    ]
    assert commands == sorted(commands)
    assert "Next: rlhf label mine.yaml\n" in text


def test_preferences_of_a_file_are_imported_and_counted(init, preferences):
    recipe, _, said = init("--labels", preferences)
    assert (recipe.label.by, recipe.label.data) == ("import", str(preferences))
    assert recipe.ppo.steps == 100
    assert recipe.train_rm.batch_size == 4
    assert "30 rankings of 2 completions, on 30 prompts" in said
    assert "rlhf label" not in said


def test_a_function_rewards_ppo_itself_and_is_tried_at_once(init, scoring):
    recipe, text, said = init("--reward", scoring)
    assert sections(text) == ["name", "model", "data", "sampling", "ppo", "evaluate"]
    assert [one.function for one in recipe.ppo.rewards] == [scoring]
    assert recipe.evaluate.judge_function == scoring
    assert "a score of 2.2" in said


def test_a_url_rewards_ppo_and_cannot_evaluate(init):
    recipe, text, said = init("--reward", "http://localhost:1/score")
    assert sections(text) == ["name", "model", "data", "sampling", "ppo"]
    assert (recipe.ppo.rewards[0].url, recipe.ppo.eval_steps) == ("http://localhost:1/score", 20)
    assert "will send prompts and completions to http://localhost:1/score" in said


def test_judges_are_models_and_endpoints(init, tiny_llama):
    recipe, _, said = init("--judge", tiny_llama, "--judge", "big@http://localhost:1/v1")
    assert [(one.model, one.name, one.url) for one in recipe.label.judge.panel] == [
        (str(tiny_llama), None, None),
        (None, "big", "http://localhost:1/v1"),
    ]
    assert "big at http://localhost:1/v1" in said


def test_demonstrations_come_before_the_rest(init, tmp_path):
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "completion": "Paris."}) + "\n" for q in QUESTIONS))
    recipe, text, said = init("--demonstrations", path)
    assert (recipe.sft.data, recipe.sft.batch_size) == (str(path), 8)
    assert "30 demonstrations of up to" in said
    assert "rlhf run mine.yaml --to sft # fine-tunes" in said
    assert sections(text).index("sft") < sections(text).index("label")


def test_a_model_without_a_template_learns_from_the_completions_beside_its_prompts(
    init, tiny_gpt2, tmp_path, questions
):
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "completion": "Paris."}) + "\n" for q in QUESTIONS))
    recipe, _, said = init(model=tiny_gpt2, prompts=path)
    assert (recipe.sft.data, recipe.data.prompt_template) == (str(path), "{prompt}\n")
    assert "used as demonstrations" in said
    recipe, _, said = init("--force", model=tiny_gpt2)
    assert recipe.sft is None
    assert "it continues text and may not reply" in said


def test_a_chat_model_does_not(init, tmp_path):
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "completion": "Paris."}) + "\n" for q in QUESTIONS))
    recipe, _, said = init(prompts=path)
    assert recipe.sft is None
    assert f"`--demonstrations {path}` trains on them first" in said


def test_a_template_that_reasons_is_told_not_to(init, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "thinks")
    template = folder / "chat_template.jinja"
    template.write_text("{% if enable_thinking is defined and not enable_thinking %}{% endif %}" + template.read_text())
    recipe, _, _ = init(model=folder)
    assert recipe.data.template_kwargs == {"enable_thinking": False}


def test_settings_of_the_command_are_read_and_written(init, tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text("ask me\n" + "".join(f"{question}\n" for question in QUESTIONS))
    _, _, said = init(prompts=path, code=65)
    assert "`ask me`" in said
    recipe, text, _ = init("--set", "data.columns={prompt: ask me}", "--set", "ppo.kl_coef=0.1", prompts=path)
    assert recipe.data.columns == {"prompt": "ask me"}
    assert recipe.ppo.kl_coef == 0.1
    assert sections(text).count("ppo") == 1


def test_long_prompts_raise_the_limit_as_far_as_the_model_reads(init, tmp_path, tiny_llama):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{'why ' * 20}{question}\n" for question in QUESTIONS))
    recipe, _, _ = init("--set", "data.max_prompt_tokens=400", prompts=path)
    assert recipe.data.max_prompt_tokens == 400
    path.write_text("".join(f"{'why ' * 200}{question}\n" for question in QUESTIONS))
    _, _, said = init("--force", prompts=path, code=65)
    assert "longer than 192 tokens" in said


@pytest.mark.parametrize(("count", "holdout", "held_out"), [(4, 0.2, 1), (12, None, 2), (30, 0.2, 6)])
def test_as_few_prompts_are_held_out_as_an_evaluation_needs(init, tmp_path, count, holdout, held_out):
    path = tmp_path / "few.txt"
    path.write_text("".join(f"{question}\n" for question in QUESTIONS[:count]))
    recipe, _, said = init(prompts=path)
    assert recipe.data.holdout == holdout
    assert f"{count - held_out} to train on, {held_out} held out" in said


def test_one_prompt_is_too_few(init, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("Why?\n")
    assert "too few" in init(prompts=path, code=65)[2]


def test_a_model_trained_here_keeps_its_own_prompting_and_split(init, tiny_llama, tmp_path):
    from rlhf_cli.data.splits import Split
    from rlhf_cli.generation.contract import Contract
    from rlhf_cli.settings.shared import SamplingSettings

    folder = shutil.copytree(tiny_llama, tmp_path / "ours")
    Contract("Q: {prompt}", {}, SamplingSettings(), Split(0.5, 3)).write(folder)
    recipe, _, said = init(model=folder)
    assert (recipe.data.holdout, recipe.data.prompt_template) == (None, "auto")
    assert "prompted as 'Q: {prompt}'" in said


def test_a_comment_that_a_setting_contradicts_is_dropped(init):
    text = init("--set", "label.completions_per_prompt=2", "--set", "train_rm.epochs=1")[1]
    assert "four completions" not in text
    assert "three passes" not in text
    assert "a first look" in init("--steps", "10", "--force")[1]
    assert "a first look" not in init("--steps", "10", "--force", "--set", "ppo.steps=200")[1]
    assert "# compares the models after and before PPO" in text


def test_the_next_commands_are_quoted_for_a_shell(rlhf_here, tmp_path, tiny_llama, questions):
    code, said = rlhf_here("init", "my runs/mine.yaml", "--model", tiny_llama, "--prompts", questions)
    assert code == 0, said
    assert "rlhf run 'my runs/mine.yaml' #" in said
    assert "`rlhf recipe show 'my runs/mine.yaml'`" in (tmp_path / "my runs" / "mine.yaml").read_text()


def test_a_recipe_names_the_schema_beside_it_by_which_editors_check_it(init, tmp_path):
    schema = tmp_path / "recipe.schema.json"
    schema.write_text('{"mine": 1}')
    text = init()[1]
    assert schema.read_text() == '{"mine": 1}', "a file of the user stays"
    assert text.startswith("# Written by")
    schema.write_text('{"$id": "urn:rlhf-cli:recipe:0.0.1"}')
    text = init("--force")[1]
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert json.loads(schema.read_text())["properties"]["ppo"]


def test_existing_files_stay_without_force(rlhf_here, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: old\n")
    code, said = rlhf_here("init", "--model", "m", "--prompts", "p")
    assert (code, "mine.yaml exists" in said, "--force" in said) == (2, True, True)
    assert (tmp_path / "mine.yaml").read_text() == "name: old\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine", "--model", "m", "--prompts", "p"], "name it mine.yaml"),
        (["--model", "m"], "give both"),
        ([], "rlhf init my-run"),
        (["--model", "m", "--prompts", "p", "--labels", "l", "--reward", "r"], "`--labels` and `--reward` exclude"),
        (["--model", "absent/", "--prompts", "p"], "no such model folder"),
    ],
)
def test_what_cannot_be_written_is_said(rlhf_here, arguments, said):
    code, message = rlhf_here("init", *arguments)
    assert code in (2, 65), message
    assert said in message


def test_without_a_terminal_start_names_the_options(rlhf_here):
    code, said = rlhf_here("start")
    assert code == 2
    assert "rlhf init mine.yaml --model MODEL --prompts FILE --steps 10" in said


def test_the_recipe_runs_as_it_is(init, rlhf_here, scoring, tmp_path):
    init("--reward", scoring, "--steps", "1", "--set", "sampling.max_new_tokens=8", "--set", "ppo.prompts_per_step=4")
    code, said = rlhf_here("run", "mine.yaml")
    assert code == 0, said
    assert (Path(tmp_path) / "runs" / "mine" / "report.html").is_file()
