"""Reports: the verdict, what is doubted, hostile texts, cards, and several runs on one page."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from huggingface_hub import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from typer.testing import CliRunner

from rlhf_cli.cli.app import app
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.files import WrittenFiles, hash_file
from rlhf_cli.pipeline.manifest import read_manifest
from rlhf_cli.report import build, tables
from rlhf_cli.report.build import write_charts, write_report
from rlhf_cli.report.gather import read_run
from rlhf_cli.report.made import how_it_was_made
from rlhf_cli.report.samples import samples
from rlhf_cli.report.verdict import verdict
from rlhf_cli.stages.best_of_n.curve import measure


@pytest.mark.parametrize(
    ("changes", "outcome", "headline"),
    [
        ({}, "better", "It worked"),
        (
            {"judge": "reward model", "judged_with": {"reward_model": "b"}},
            "better",
            "It worked according to its own reward model",
        ),
        (
            {"judge": "reward model", "judged_with": {"reward_model": "c"}},
            "better",
            "It worked according to a reward model",
        ),
        ({"win_rate": (0.55, 0.42, 0.67)}, "undecided", "It cannot be told whether it worked"),
        ({"win_rate": (0.2, 0.1, 0.32)}, "worse", "It did not work: good/sft was better"),
        (
            {"controlled": (0.55, 0.43, 0.66)},
            "better",
            "It worked according to this judge, but perhaps by length alone",
        ),
        ({"evaluated": False}, "unknown", "Not evaluated"),
    ],
)
def test_the_verdict(runs, changes, outcome, headline):
    found = verdict(read_run(runs.write(**changes)))
    assert (found.outcome, found.headline) == (outcome, headline)
    if changes.get("evaluated", True):
        assert "held-out prompts (95% interval" in found.reason


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({}, "The judge is a function"),
        ({"judge": "reward model"}, "The judge is a reward model"),
        ({"judge": "judges"}, "The judges are language models"),
        ({"win_rate": (0.55, 0.42, 0.67)}, "60 prompts are too few"),
        ({"length": 44.0}, "2.00 times the length"),
        ({"kl": 45.0}, "The KL is 45 nats"),
        ({}, "Training, length: twice as long"),
        ({}, "`evaluate` skipped 2 records"),
        ({}, "Labels, ana: favors the first."),
        ({}, "another seed may give another result"),
    ],
)
def test_what_is_doubted(runs, changes, doubt):
    found = "\n".join(verdict(read_run(runs.write(**changes))).doubts)
    assert doubt in found
    assert "Training, reward" not in found, "which was fine"
    assert "labeled all" not in found, "which limits the result, and does not put it in doubt"


def test_several_policies_are_decided_by_the_interval_for_all_of_them(runs):
    run = runs.write()
    path = run / "evaluate" / "evaluation.json"
    plain = json.loads(path.read_text())
    plain["pairs"][0]["win_rate_joint"] = {"value": 0.8, "low": 0.48, "high": 0.95, "n": 60, "pairs": 6}
    path.write_text(json.dumps(plain))
    found = verdict(read_run(run))
    assert found.outcome == "undecided"
    assert "(95% interval for all 6 pairs of models together 48.0% to 95.0%)" in found.reason


def test_runs_of_one_name_keep_their_sentences(runs, tmp_path):
    first = runs.write("a", seed=0)
    other = type(runs)(tmp_path / "elsewhere").write("a", seed=1)
    replace(read_manifest(other / "sft"), metrics={"records": 901.0, "steps": 40.0}).write(other / "sft")
    made = json.loads(write_report([first, other], tmp_path / "both.html").plain.read_text())["made"]
    assert len(made) == 2
    assert "900 demonstrations" in made[0]
    assert "901 demonstrations" in made[1]


def test_a_judge_that_also_ranked_the_labels_is_named(runs):
    assert "The same function ranked" not in "\n".join(verdict(read_run(runs.write())).doubts)
    same = runs.write("same", labeled_by="abc")
    assert "The same function ranked the training labels" in "\n".join(verdict(read_run(same)).doubts)


def test_a_loss_of_variety_is_named(runs):
    run = runs.write()
    path = run / "evaluate" / "evaluation.json"
    plain = json.loads(path.read_text())
    plain["models"]["good/ppo"]["distinct_2"]["value"] = 0.4
    path.write_text(json.dumps(plain))
    found = "\n".join(verdict(read_run(run)).doubts)
    assert "distinct-2 is 0.40 instead of 0.60" in found


def test_nothing_unusual_is_not_doubted(runs):
    found = "\n".join(verdict(read_run(runs.write())).doubts)
    assert not re.search("too few|times the length|The KL is|less varied|The same function", found)


def test_the_page_needs_nothing_else_and_shows_hostile_texts_as_text(runs):
    run = runs.write(hostile=True)
    report = write_report([run], run / "report.html")
    page = report.html.read_text(encoding="utf-8")
    assert len(page.encode()) < 1_000_000
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "more characters" in page
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?https?:""", page)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_what_scrolls_can_be_reached_by_keyboard(runs):
    folders = [runs.write("a"), runs.write("b", **{"ppo.kl_coef": 0.2})]
    both = write_report(folders, folders[0].parent / "both.html")
    for report, least in ((write_report(folders[:1], folders[0] / "report.html"), 3), (both, 2)):
        found = re.findall(r'<(?:pre|div class="scroll")[^>]*>', report.html.read_text())
        assert len(found) >= least
        assert all('tabindex="0"' in one and "aria-label" in one for one in found)


def test_every_figure_of_the_json_is_that_of_the_files(runs):
    run = runs.write()
    plain = json.loads(write_report([run], run / "report.html").plain.read_text())
    assert plain["verdict"]["outcome"] == "better"
    (only,) = plain["runs"]
    assert only["evaluation"] == json.loads((run / "evaluate" / "evaluation.json").read_text())
    assert only["stages"]["train-rm"]["metrics"]["rm/accuracy"] == 0.71


def test_samples_are_the_best_the_worst_and_others(runs):
    shown = read_run(runs.write()).samples
    assert (len(shown.rows), shown.of) == (36, 60)
    reasons = [row["chosen_as"] for row in shown.rows]
    assert {reason: reasons.count(reason) for reason in set(reasons)} == {
        "largest gain": 12, "largest loss": 12, "random": 12,
    }  # fmt: skip
    gains = [row["gold_policy"] - row["gold_baseline"] for row in shown.rows]
    best = max(gains)
    assert shown.rows[gains.index(best)]["chosen_as"] == "largest gain"


def test_a_sample_says_which_is_preferred_and_what_was_cut(runs):
    first, *others = samples(read_run(runs.write()))
    assert "cut at the token limit" in first.sides[0].label
    assert not any("cut at" in side.label for sample in others for side in sample.sides)
    for sample in (first, *others):
        assert [side.won for side in sample.sides] == [" · preferred · gold " in side.label for side in sample.sides]


def test_cards_are_what_the_hub_reads_and_change_no_artifact(runs):
    run = runs.write()
    before = read_manifest(run / "ppo").content_digest
    write_report([run], run / "report.html")
    read_manifest(run / "ppo").verify(run / "ppo")
    assert read_manifest(run / "ppo").content_digest == before
    metadata = metadata_load(run / "ppo" / "README.md")
    assert metadata["base_model"] == "org/base"
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "good/ppo"
    assert {result.metric_type: result.metric_value for result in results} == {"win_rate": 0.8, "kl": 6.9}
    text = (run / "ppo" / "README.md").read_text()
    assert "## Limits" in text
    assert r"1 \| 2" in text
    accuracy = metadata_load(run / "train-rm" / "README.md")["model-index"][0]["results"][0]["metrics"][0]
    assert accuracy["value"] == 0.71


def test_several_runs_are_compared_on_one_page(runs):
    names = [runs.write("a"), runs.write("b", seed=0, **{"ppo.kl_coef": 0.2})]
    page = write_report(names, names[0].parent / "both.html").html.read_text()
    assert "The runs compared" in page
    assert "Settings that differ" in page
    assert "<code>ppo.kl_coef</code>" in page
    assert ">a</text>" in page, "curves are named by their run"
    assert "It cannot be told which setting is better" in page, "one run per group"
    assert "<code>b</code>: The judge is a function" in page


def test_seeds_of_a_setting_share_a_color_and_a_clear_difference_is_said(runs):
    low = [runs.write(f"low{seed}", seed=seed) for seed in range(3)]
    high = [runs.write(f"high{seed}", seed=seed, gain=3.0, **{"ppo.kl_coef": 0.2}) for seed in range(3)]
    page = write_report([*low, *high], low[0].parent / "all.html").html.read_text()
    assert "ppo.kl_coef 0.2 is better" in page
    assert page.count('class="line c0"') == page.count('class="line c1"') > 0
    assert 'class="line c2"' not in page
    assert "It is one training run" not in page


def test_best_of_n_is_drawn_from_what_its_stage_writes(runs):
    run = runs.write()
    rewards = np.random.default_rng(0).normal(size=(20, 8))
    found = measure(rewards.tolist(), (-rewards).tolist()).to_json()
    runs.stage(run, "best-of-n", settings={}, files={"best_of_n.json": json.dumps(found)})
    page = write_report([run], run / "report.html").html.read_text()
    assert "best of n (KL at most)" in page
    assert "best of n, gold" in page


def test_the_command_writes_a_picture_beside_every_chart(runs, tmp_path):
    run = runs.write()
    shown = CliRunner().invoke(app, ["report", str(run), "--json"])
    assert json.loads(shown.stdout)["verdict"] == "It worked"
    page = (run / "report.html").read_text()
    pictures = {path.name for path in Path(json.loads(shown.stdout)["charts"]).iterdir()}
    assert "charts.json" in pictures
    assert page.count('<svg class="chart"') == len(pictures) - 1
    assert {"ppo-kl.png", "ppo-reward-against-the-square-root-of-the-kl.png", "sft-loss.png"} <= pictures
    assert "reward-model-is-its-confidence-justified.png" in pictures
    assert f"charts as PNG files: {run / 'report-charts'}" in shown.stderr.replace("\n", "")


def test_pictures_of_an_earlier_report_are_removed_but_nothing_of_the_user(runs, tmp_path, capsys):
    run = runs.write()
    folder = write_charts(write_report([run], run / "report.html"))
    assert folder is not None
    (folder / "sft-mine.png").write_bytes((folder / "sft-loss.png").read_bytes())
    (folder / "ppo-kl.png").write_bytes(b"edited by the user")
    (folder / "notes.txt").write_text("mine")
    earlier = {path.name for path in folder.iterdir()}
    for stage in ("sft", "ppo"):
        shutil.rmtree(run / stage)
    capsys.readouterr()
    assert write_charts(write_report([run], run / "report.html")) == folder
    left = {path.name for path in folder.iterdir()}
    assert {"sft-mine.png", "ppo-kl.png", "notes.txt"} <= left
    assert "sft-loss.png" not in left
    assert "reward-model-is-its-confidence-justified.png" in left
    said = "".join(capsys.readouterr().err.split())
    for name in earlier - left:
        assert f"removed{folder / name}:ofthereportbefore" in said
    shutil.rmtree(run / "train-rm")
    assert write_charts(write_report([run], run / "report.html")) is None
    assert {path.name for path in folder.iterdir()} == {"sft-mine.png", "ppo-kl.png", "notes.txt"}


def test_a_list_of_pictures_that_names_other_folders_removes_nothing_there(tmp_path):
    outside = tmp_path / "theirs.png"
    outside.write_bytes(b"x")
    folder = tmp_path / "charts"
    folder.mkdir()
    (folder / "link.png").symlink_to(outside)
    digest = hash_file(outside)
    names = ("../theirs.png", str(outside), "link.png")
    (folder / "charts.json").write_text(json.dumps(dict.fromkeys(names, digest)))
    assert WrittenFiles(folder / "charts.json").replace([]) == []
    assert outside.exists()
    assert (folder / "link.png").is_symlink()
    for damaged in ("[1]", "{", '{"a.png": 1}'):
        (folder / "charts.json").write_text(damaged)
        assert WrittenFiles(folder / "charts.json").replace([]) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("label/warnings.json", "[{"),
        ("label/warnings.json", '{"warnings": []}'),
        ("label/warnings.json", '[{"kind": "order"}]'),
        ("evaluate/judge.json", "[]"),
        ("evaluate/evaluation.json", "[1]"),
        ("evaluate/samples.jsonl", '{"prompt": 1}\n{"pro'),
        ("ppo/metrics.jsonl", "1\n"),
    ],
)
def test_a_damaged_file_is_named(runs, name, content):
    run = runs.write()
    (run / name).write_text(content)
    with pytest.raises(DataError, match=f"{re.escape(str(run / name))} is damaged"):
        read_run(run)


def test_a_warning_of_a_later_version_may_say_more(runs):
    run = runs.write()
    rows = json.loads((run / "label/warnings.json").read_text())
    (run / "label/warnings.json").write_text(json.dumps([row | {"level": 3} for row in rows]))
    assert [one.kind for one in read_run(run).label_warnings["label"]] == ["order"]


def test_a_warning_that_does_not_say_whether_it_is_a_doubt_is_shown(runs):
    run = runs.write()
    rows = json.loads((run / "label/warnings.json").read_text())
    for row in rows:
        del row["is_doubt"]
    (run / "label/warnings.json").write_text(json.dumps(rows))
    assert [one.kind for one in read_run(run).label_warnings["label"]] == ["order", "one person"]


def test_without_matplotlib_there_are_no_pictures_and_it_is_said(runs, monkeypatch, capsys):
    monkeypatch.setattr(build, "has_matplotlib", lambda: False)
    run = runs.write()
    assert write_charts(write_report([run], run / "report.html")) is None
    assert "no report-charts/*.png: matplotlib is not installed (`pip install 'rlhf-cli[plots]'`)" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (run / "report-charts").exists()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such run directory"):
        write_report([tmp_path / "absent"], tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no manifest\.json of a finished stage"):
        read_run(tmp_path / "empty")


def test_one_sentence_says_how_it_was_made(runs):
    run = runs.write()
    report = write_report([run], run / "report.html")
    said = (
        "`org/base` was fine-tuned on 900 demonstrations (40 steps); a reward model was trained and measured on "
        "1,280 completions of 320 prompts, ranked by the function `judge.py:score`; PPO trained the fine-tuned model "
        "for 40 steps (640 completions) to raise the reward of the reward model."
    )
    assert list(report.page.made) == [said]
    assert json.loads(report.plain.read_text())["made"] == [said]
    assert said in (run / "ppo" / "README.md").read_text()
    assert "<code>judge.py:score</code>" in report.html.read_text()


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ({"by": "human"}, "ranked by people"),
        ({"by": "judge"}, "ranked by language models"),
        ({"by": "reward-model", "reward_model": "acme/rm"}, "ranked by the reward model `acme/rm`"),
        ({"by": "import", "data": "/data/sets/ranks.jsonl"}, "with rankings from `ranks.jsonl`"),
    ],
)
def test_where_labels_came_from(runs, label, said):
    found = runs.folder / "run"
    runs.stage(found, "label", settings={}, metrics={"prompts": 1.0, "completions": 4.0}, sections={"label": label})
    assert how_it_was_made(read_run(found)) == f"Its labels are 4 completions of 1 prompt, {said}."


def test_ppo_on_its_own_says_what_it_trained_and_for_which_rewards(runs):
    found = runs.folder / "run"
    rewards = [{"function": "a/b.py:score", "weight": 1.0}, {"url": "http://127.0.0.1:80/x", "weight": 0.5},
               {"function": "logged.py:score", "weight": 0.0}]  # fmt: skip
    section = {"ppo": {"model": "runs/x/y/sft", "steps": 5, "rewards": rewards}}
    runs.stage(found, "ppo", settings={}, sections=section, inputs={"policy": "a"})
    assert how_it_was_made(read_run(found)) == (
        "PPO trained `sft` for 5 steps to raise the reward of `b.py:score` and that of `http://127.0.0.1:80/x`."
    )


def test_what_changed_in_the_completions_is_said(runs):
    run = runs.write(length=44.0)
    page = write_report([run], run / "report.html").page
    (section,) = [one for one in page.sections if one.title == "What changed in the completions"]
    assert section.text == [
        "Completions of good/ppo are 2.00 times as long (44.0 instead of 22.0 tokens) and about as varied (distinct-2: "
        "0.60 instead of 0.60), compared with those of good/sft. 2.5% of them are the same as the baseline's.",
        "The largest change in phrases: more of them begin with “thank you for” (40.0% instead of 5.0%).",
    ]
    assert ["“the warm stone.”", "10.0%", "11.0%"] in section.tables[2].rows


def test_variety_that_the_baseline_has_none_of_is_more(runs):
    run = runs.write()
    path = run / "evaluate" / "evaluation.json"
    plain = json.loads(path.read_text())
    plain["models"]["good/sft"]["distinct_2"]["value"] = 0.0
    path.write_text(json.dumps(plain))
    assert "and more varied (distinct-2: 0.60 instead of 0.00" in tables.changes(read_run(run))[0]


def test_an_evaluation_of_an_earlier_version_is_shown_without_what_it_lacks(runs):
    run = runs.write()
    path = run / "evaluate" / "evaluation.json"
    plain = json.loads(path.read_text())
    for name in ("outcomes", "identical_share", "phrases"):
        del plain["pairs"][0][name]
    path.write_text(json.dumps(plain))
    report = write_report([run], run / "report.html")
    assert report.page.verdict.reason.endswith("(95% interval 68.0% to 89.0%).")


def test_a_share_has_the_same_digits_everywhere(runs):
    run = runs.write()
    report = write_report([run], run / "report.html")
    said = "80.0% of comparisons on 60 held-out prompts (95% interval 68.0% to 89.0%): 48 wins, 1 tie and 11 losses."
    assert said in report.page.verdict.reason
    assert said in (run / "ppo" / "README.md").read_text()
    shown = re.sub(
        r"<figure.*?</figure>|<style>.*?</style>|<details>.*?</details>", "", report.html.read_text(), flags=re.S
    )
    digits = {len(part) for whole, part in re.findall(r"(\d+)(?:\.(\d+))?%", shown) if whole not in ("95", "50")}
    assert digits == {1}


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_errors_or_requests(runs, browser, width, scheme):
    run = runs.write(hostile=True)
    report = write_report([run], run / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=True)
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.html.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing overflows"
    wins = page.locator(".sample.policy").count()
    page.locator("label", has_text="policy better").click()
    assert page.locator(".sample:visible").count() == wins > 0
    assert messages == []
    assert requests == [report.html.as_uri()]
    assert Axe().run(page).response["violations"] == []
    page.close()


def test_the_report_of_a_run_that_only_trained_says_so(runs):
    run = runs.write(evaluated=False)
    page = Path(write_report([run], run / "report.html").html).read_text()
    assert "Not evaluated" in page
    assert "rlhf evaluate RECIPE --run-dir" in page, "none is recorded"
