"""KL estimators against the exact KL of small distributions."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cli.statistics.kl import completion_kl, disagreement, kl_estimate

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])
EXACT = float((P * np.log(P / Q)).sum())


def chain(rng, count, length=4):
    """Completions of a Markov chain: the next token is drawn from P or its mirror image, by the token before."""
    rows = []
    for _ in range(count):
        token, ratios = 0, []
        for _ in range(length):
            p, q = (P, Q) if token < 2 else (P[::-1], Q[::-1])
            token = rng.choice(3, p=p)
            ratios.append(float(np.log(p[token] / q[token])))
        rows.append(ratios)
    return rows


def test_the_estimators_by_hand():
    assert completion_kl([0.5, -0.25], "k1") == 0.25
    assert completion_kl([np.log(2.0)], "k3") == pytest.approx(0.5 - 1 + np.log(2.0))
    assert completion_kl([-3.0], "k3") > 0
    assert completion_kl([], "k3") == 0.0
    assert completion_kl([-1000.0], "k3") == np.inf


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_over_tokens_is_the_exact_kl(estimator):
    mean = sum(p * completion_kl([np.log(p / q)], estimator) for p, q in zip(P, Q, strict=True))
    assert mean == pytest.approx(EXACT, abs=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_completions_of_several_tokens_and_the_coverage_of_the_interval(estimator):
    # The KL of a chain is the sum over its tokens; the KL of the mirrored distributions is that of P and Q.
    rng, held, sets, found = np.random.default_rng(0), 0, 300, None
    exact, errors = 4 * EXACT, []
    for _ in range(sets):
        found = kl_estimate(range(60), chain(rng, 60), estimator)
        held += found.mean.low <= exact <= found.mean.high
        errors.append(found.mean.value - exact)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / sets**0.5
    assert held / sets == pytest.approx(0.95, abs=0.03)
    assert found.standard_error == pytest.approx(np.std(errors), rel=0.4)
    assert found.to_json()["estimator"] == estimator


def test_k3_varies_less_while_the_two_are_close():
    rows = chain(np.random.default_rng(1), 200)
    errors = [kl_estimate(range(200), rows, estimator).standard_error for estimator in ("k1", "k3")]
    assert errors[1] < errors[0] / 2


def test_prompts_are_the_units_of_the_error():
    found = kl_estimate(["p", "p", "q"], [[1.0], [3.0], [5.0]])
    assert (found.mean.value, found.mean.n, found.standard_error) == (3.5, 2, pytest.approx(1.5))


def test_a_kl_that_is_not_finite_is_null_in_json():
    assert kl_estimate(["p", "q"], [[-1000.0], [1.0]], "k3").to_json()["value"] is None


def rows_of(rng, drawn, policy, baseline, count=200):
    tokens = rng.choice(len(drawn), size=(count, 8), p=drawn)
    return np.log(np.array(policy) / np.array(baseline))[tokens].tolist()


def test_estimators_that_agree_are_not_warned_of():
    rng = np.random.default_rng(2)
    found = [disagreement(range(200), rows_of(rng, P, P, Q)) for _ in range(300)]
    assert sum(one is not None for one in found) <= 3, "of sound evaluations one in a thousand is warned of"
    assert disagreement(["p"], [[1.0, 1.0]]) is None, "one prompt shows nothing"


def test_tokens_that_the_policy_made_rare():
    policy, baseline = [1 - 1e-9, 1e-9], [0.5, 0.5]
    rows = rows_of(np.random.default_rng(3), policy, policy, baseline)
    rows[0][0] -= 1e-6  # not all alike: else there is no interval
    assert "read k1" in disagreement(range(200), rows)


def test_completions_of_another_distribution():
    rows = rows_of(np.random.default_rng(4), Q, P, Q)  # drawn from the baseline
    assert "neither estimate is the KL" in disagreement(range(200), rows)
    assert "infinite" in disagreement(["p", "q"], [[-1000.0], [1.0]])
