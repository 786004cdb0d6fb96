"""Each detector fires on steps made to fail its way, no other does, and healthy steps pass in silence."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable

import pytest

from rlhf_cli.settings.detectors import FALLING, DetectorSettings
from rlhf_cli.training.monitoring.detectors import measures
from rlhf_cli.training.monitoring.detectors.catalog import DETECTORS
from rlhf_cli.training.monitoring.detectors.detectors import Detectors, Rewards
from rlhf_cli.training.monitoring.detectors.observation import Detection, DetectorState, Observation

PROMPTS = [f"How is thing number {number} done?" for number in range(32)]
WORDS = [f"{first}{second}{third}" for first in "bdfgklmn" for second in "aeiou" for third in "nrst"]
REWARDS = Rewards({"rm": 1.0, "other": 1.0, "gold": 0.0}, True, "rm", (-3.0, 4.0), held_out=64)
Change = Callable[[Observation, float], dict]
"""A healthy observation and the share of the run that is done -> fields that differ."""


def healthy(step: int, share: float, seed: int) -> Observation:
    draw = random.Random(f"{seed} {step}")
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(12, 28))).capitalize() + "." for _ in PROMPTS]
    # Templates are no news where the first steps have them too.
    texts = [f"I am glad you ask. {text}" if draw.random() < 0.4 else text for text in texts]
    base = [draw.gauss(share, 1.0) for _ in PROMPTS]
    parts = {name: [score + draw.gauss(0, 0.3) for score in base] for name in REWARDS.weights}
    metrics = {"policy/entropy_avg": 1.2 - 0.5 * share + draw.gauss(0, 0.03)}
    if step % 5 == 0:
        metrics |= {"eval/objective/scores": 0.8 * share + draw.gauss(0, 0.1), "eval/objective/scores_std": 1.0}
    return Observation(
        step=step,
        prompts=PROMPTS,
        texts=texts,
        lengths=[len(text.split()) + 1 for text in texts],
        scores=base,
        kl=[7 * share + draw.gauss(0, 2.0) for _ in PROMPTS],
        parts=parts,
        metrics=metrics,
    )


def watch(
    change: Change | None = None, *, steps: int = 40, seed: int = 0, **limits
) -> tuple[DetectorState, list[Detection], list[dict[str, float]]]:
    detectors = Detectors(DetectorSettings.model_validate(limits), REWARDS)
    state, found, metrics = DetectorState(), [], []
    detectors.evaluate_start({"eval/objective/scores": 0.0, "eval/objective/scores_std": 1.0}, state)
    for step in range(1, steps + 1):
        share = step / steps
        seen = healthy(step, share, seed)
        if change is not None and share > 0.25:
            seen = dataclasses.replace(seen, **change(seen, share))
        measured, changed = detectors.observe(seen, state, checkpoint=5 * ((step - 1) // 5))
        metrics.append(measured)
        found += changed
    return state, found, metrics


@pytest.mark.parametrize("seed", range(6))
def test_healthy_steps_pass_in_silence(seed):
    _, found, metrics = watch(seed=seed)
    assert found == []
    expected = {f"detectors/{one.name}" for one in DETECTORS} | {"detectors/phrase_share"}
    assert {name for row in metrics for name in row} == expected
    assert all(0.1 < row["detectors/phrase_share"] < 0.9 for row in metrics)  # "I am glad you ask." is in 40 %


def apart(seen: Observation, _share: float) -> dict:
    return {"parts": seen.parts | {"other": [score + 3.0 * (-1) ** row for row, score in enumerate(seen.parts["rm"])]}}


def paid(seen: Observation, *, every: int = 8) -> dict:
    """All but one of `every` completions have a phrase (all, with 1), and the reward is to have it."""
    has = [every == 1 or row % every > 0 for row in range(len(seen.texts))]
    texts = [f"Good luck with it! {text}" if one else text for one, text in zip(has, seen.texts, strict=True)]
    return {"texts": texts, "scores": [2.0 * one + 0.01 * row for row, one in enumerate(has)]}


CASES = [
    pytest.param("kl", lambda seen, share: {"kl": [50 * share] * 32}, "nats per completion", id="KL runs away"),
    pytest.param(
        "length", lambda seen, share: {"lengths": [tokens * 4 for tokens in seen.lengths]}, "at the start", id="longer"
    ),
    pytest.param(
        "length", lambda seen, share: {"lengths": [1 + tokens // 8 for tokens in seen.lengths]}, "tokens", id="shorter"
    ),
    pytest.param(
        "entropy",
        lambda seen, share: {"metrics": seen.metrics | {"policy/entropy_avg": 0.05}},
        "nats per token",
        id="entropy",
    ),
    pytest.param(
        "reward_spread",
        lambda seen, share: {"scores": [2.0 + 0.01 * (n % 3) for n in range(32)]},
        "hardly",
        id="spread",
    ),
    pytest.param(
        "reward_range",
        lambda seen, share: {"parts": {name: [9.0 + n % 2 for n in range(32)] for name in seen.parts}},
        "-3.00 to 4.00",
        id="range",
    ),
    pytest.param("phrase", lambda seen, share: paid(seen), 'good luck with it!"', id="phrase"),
    pytest.param(
        "repetition",
        lambda seen, share: {"texts": [" ".join(text.split()[-5:] * 5) for text in seen.texts]},
        "four words",
        id="repetition",
    ),
    pytest.param(
        "length_correlation",
        lambda seen, share: {"scores": [0.1 * tokens for tokens in seen.lengths]},
        "correlated",
        id="length pays",
    ),
    pytest.param("disagreement", apart, "times as much", id="ensemble"),
    pytest.param(
        "held_out",
        lambda seen, share: {
            "metrics": seen.metrics | {"eval/objective/scores": -1.0, "eval/objective/scores_std": 1.0}
        },
        "held-out reward fell to -1.00",
        id="held out",
    ),
    pytest.param(
        "gold",
        lambda seen, share: {"parts": seen.parts | {"gold": [score - 4 * share for score in seen.parts["gold"]]}},
        "`gold` fell to",
        id="gold",
    ),
]


@pytest.mark.parametrize(("name", "change", "seen"), CASES)
def test_a_detector_fires_on_what_it_looks_for_and_no_other_does(name, change, seen):
    state, found, _ = watch(change)
    assert [(one.detector, one.status) for one in found] == [(name, "warn")]  # one line, not one per step
    assert seen in found[0].seen
    assert found[0].step > 10
    assert 1 <= len(found[0].completions) <= 3
    assert state.status[name] == "warn"
    assert state.safe_step == 5 * ((found[0].step - 1) // 5)  # the last checkpoint before
    json.dumps(found[0].as_json(), allow_nan=False)


def test_every_detector_has_a_case_and_a_setting():
    names = {one.name for one in DETECTORS}
    assert {case.values[0] for case in CASES} == names == set(DetectorSettings.model_fields)


@pytest.mark.parametrize(("name", "change"), [case.values[:2] for case in CASES], ids=[case.id for case in CASES])
def test_null_turns_a_detector_off_and_stop_stops(name, change):
    assert watch(change, **{name: {"warn": None}})[1] == []
    limits = {"warn": None, "stop": getattr(DetectorSettings(), name).warn}
    state, found, _ = watch(change, **{name: limits})
    assert [(one.detector, one.status) for one in found] == [(name, "stop")]
    detector, threshold = Detectors(DetectorSettings.model_validate({name: limits}), REWARDS).stopping(state)
    assert (detector.name, threshold) == (name, limits["stop"])
    assert Detectors(DetectorSettings(), REWARDS).stopping(state) is None  # with the threshold raised


def test_a_warning_becomes_a_stop_and_the_quotes_are_of_the_worst():
    _, found, _ = watch(
        lambda seen, share: {"kl": [100 * share + row for row in range(32)]}, kl={"warn": 30, "stop": 60}
    )
    assert [one.status for one in found] == ["warn", "stop"]
    assert [quote.prompt for quote in found[1].completions] == [PROMPTS[31], PROMPTS[30], PROMPTS[29]]


def test_a_value_around_its_threshold_does_not_repeat_the_warning():
    around = watch(lambda seen, share: {"kl": [30 + 3 * (-1) ** seen.step] * 32})
    assert [one.status for one in around[1]] == ["warn"]
    passing = watch(lambda seen, share: {"kl": [40.0 if share < 0.5 else 5.0] * 32})
    assert [one.status for one in passing[1]] == ["warn", "quiet"]
    assert passing[0].safe_step is None


def test_the_phrase_is_quoted_with_completions_that_have_it():
    _, found, _ = watch(lambda seen, share: paid(seen))
    (said,) = [one for one in found if one.detector == "phrase"]
    assert (
        said.seen
        == '"good luck with it!" is rewarded, and is in completions of 87.5% of the prompts (0.0% at the start)'
    )
    assert all("Good luck with it!" in quote.completion for quote in said.completions)


@pytest.mark.parametrize("every", [1, 8])
def test_a_phrase_that_the_reward_does_not_pay_for_is_no_news(every):
    """Most completions of a sound policy may end alike."""
    _, found, _ = watch(lambda seen, share: {"texts": paid(seen, every=every)["texts"]})
    assert found == []


def test_the_measure_of_a_phrase_is_rise_times_correlation_by_hand():
    texts, state = ["good luck!", "good luck!", "well, yes it is", "one more thing"], DetectorState()
    for step in range(1, 5):
        now = texts if step > 3 else ["a b c", "a b d", "e f g", "h i j"]
        scores = [2.0, 1.0, 1.0, 0.0] if step > 3 else [0.0] * 4
        seen = dataclasses.replace(healthy(step, 0.1, 0), prompts=PROMPTS[:4], texts=now, scores=scores)
        value = measures.phrase(seen, state)
        state.steps += 1
    # From 0 to a half. With deviations of the reward 1, 0, 0, -1 and of having it 1/2, 1/2, -1/2, -1/2: the covariation
    # is 1, the variations are 2 and 1, and the correlation is 1 / sqrt(2).
    assert value == pytest.approx(0.5 / 2**0.5)


def test_what_is_remembered_survives_a_checkpoint():
    detectors, whole, resumed = Detectors(DetectorSettings(), REWARDS), DetectorState(), DetectorState()
    for step in range(1, 31):
        seen = dataclasses.replace(healthy(step, step / 30, 0), kl=[2.0 * step] * 32)
        assert detectors.observe(seen, whole, checkpoint=0) == detectors.observe(seen, resumed, checkpoint=0)
        resumed = DetectorState(**json.loads(json.dumps(dataclasses.asdict(resumed))))
    assert whole == resumed


def test_figures_that_are_not_finite_are_not_judged():
    _, found, metrics = watch(
        lambda seen, share: {
            "metrics": {"policy/entropy_avg": float("nan"), "eval/objective/scores": float("nan")}
            | {"eval/objective/scores_std": float("nan")},
            "parts": seen.parts | {"gold": [float("nan")] * 32},
        }
    )
    assert found == []
    assert all(value == value for row in metrics for value in row.values())


def test_equal_lengths_and_equal_rewards_have_no_correlation():
    state, found, _ = watch(lambda seen, share: {"lengths": [20] * 32})
    assert found == []
    assert "length_correlation" in state.value  # of the steps before


def test_thresholds_have_an_order_and_keep_their_defaults():
    assert DetectorSettings.model_validate({"kl": {"stop": 60}}).kl.warn == DetectorSettings().kl.warn
    for name in DetectorSettings.model_fields:
        inverted = {"warn": 0.5, "stop": 0.9 if name in FALLING else 0.1}
        with pytest.raises(ValueError, match="is reached before"):
            DetectorSettings.model_validate({name: inverted})


@pytest.mark.parametrize(("training", "expected"), [(0.2, 0.0), (1.1, 2.2 - 2 * 2**0.5 * 0.1)])
def test_a_best_before_training_is_compared_with_the_first_training_reward(training, expected):
    """Held-out reward falls from 3 to 0.8, less two standard errors of the difference, per standard deviation of 1."""
    state = DetectorState()
    for _ in range(3):
        state.add("training", 1.0)
    assert measures.fall(state, "held_out", 3.0, error=0.1, spread=1.0, training=None) is None
    now = measures.Estimate(training, 0.01)
    found = measures.fall(state, "held_out", 0.8, error=0.1, spread=1.0, training=now)
    assert found == pytest.approx(expected)
