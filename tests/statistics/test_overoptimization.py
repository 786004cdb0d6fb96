"""Fits of gold reward against sqrt(KL), on curves and on simulated data with known alpha and beta."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_cli.statistics.overoptimization import Method, fit, least_squares

PEAKS = {"best-of-n": lambda a, b: a / (2 * b), "rl": lambda a, b: math.exp(a / b - 1)}


def curve(method: Method, alpha: float, beta: float, distance: np.ndarray) -> np.ndarray:
    return distance * (alpha - beta * (distance if method == "best-of-n" else np.log(distance)))


def simulated(method: Method, alpha: float, beta: float, *, seed: int, noise: float = 0.5, farthest: float = 5.0):
    """Three seeds, 60 prompts, 12 points; gold of a prompt varies around the curve, with an effect of the prompt."""
    draws = np.random.default_rng(seed)
    distance = np.linspace(1.1, farthest, 12)
    kl = np.broadcast_to(distance**2, (3, 60, 12)) + draws.normal(0, 1.0, (3, 60, 12))
    gold = curve(method, alpha, beta, distance) + draws.normal(0, noise, (1, 60, 1)) * distance / farthest
    return kl, gold + draws.normal(0, noise, (3, 60, 12))


@pytest.mark.parametrize("method", ["best-of-n", "rl"])
def test_points_on_the_curve_give_its_parameters(method: Method):
    distance = np.array([1.0, 1.5, 2.0, 4.0])
    alpha, beta = least_squares(method, distance[None], curve(method, 1.5, 0.25, distance)[None])
    assert (alpha[0], beta[0]) == pytest.approx((1.5, 0.25))


@pytest.mark.parametrize("method", ["best-of-n", "rl"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.2), (1.2, 0.6)])
def test_known_parameters_and_peak_are_found(method: Method, alpha: float, beta: float):
    found = fit(method, *simulated(method, alpha, beta, seed=0))
    assert found is not None
    peak = PEAKS[method](alpha, beta)
    assert found.alpha.value == pytest.approx(alpha, abs=0.15)
    assert found.beta.value == pytest.approx(beta, abs=0.1)
    assert found.peak.low <= found.peak.value <= found.peak.high
    assert found.turns_over is (found.peak.value < 5.0)
    if peak < 4.5:
        assert found.peak.value == pytest.approx(peak, rel=0.15)
        assert found.turned > 0.95
        assert "gold is highest at" in found.said()


def test_intervals_contain_the_truth_about_as_often_as_they_say():
    inside = 0
    for seed in range(60):
        found = fit("rl", *simulated("rl", 1.0, 0.5, seed=seed))
        assert found is not None
        inside += found.alpha.low <= 1.0 <= found.alpha.high
    assert inside >= 50


def test_a_curve_that_only_rises_has_no_turnover():
    found = fit("best-of-n", *simulated("best-of-n", 1.0, -0.1, seed=1))
    assert found is not None
    assert found.peak.value == math.inf
    assert not found.turns_over
    assert found.turned < 0.05
    assert "no peak up to 2" in found.said()
    assert found.to_json()["peak_sqrt_kl"]["value"] is None


def test_a_peak_beyond_the_points_is_not_a_turnover():
    found = fit("best-of-n", *simulated("best-of-n", 2.0, 0.1, seed=1))
    assert found is not None
    assert found.peak.value == pytest.approx(10, rel=0.3)
    assert not found.turns_over
    assert "no peak up to" in found.said()


def test_gold_that_falls_from_the_start_is_said():
    found = fit("best-of-n", *simulated("best-of-n", -0.5, 0.1, seed=1))
    assert found is not None
    assert found.peak.value == 0.0
    assert found.said() == "gold falls from the start (in 100% of resamples)"
    rl = fit("rl", *simulated("rl", -0.2, 0.5, seed=1))
    assert rl is not None
    assert 0 < rl.peak.value < 1
    assert rl.said().startswith("gold falls from the start")


@pytest.mark.parametrize("method", ["best-of-n", "rl"])
def test_a_curve_that_falls_and_then_rises_has_no_turnover(method: Method):
    found = fit(method, *simulated(method, -0.3, -0.5, seed=1))
    assert found is not None
    assert found.peak.value == math.inf
    assert "no peak up to" in found.said()
    falls = fit(method, *simulated(method, -1.0, -0.01, seed=1, noise=0.1))
    assert falls is not None
    assert falls.peak.value < 1
    assert falls.said().startswith("gold falls from the start")


def test_rl_uses_points_from_1_nat_alone():
    distance = np.array([0.1, 0.5, 0.9, 1.0, 2.0, 3.0])
    reward = curve("rl", 1.0, 0.4, distance)
    reward[:3] = 100.0
    alpha, beta = least_squares("rl", distance[None], reward[None])
    assert (alpha[0], beta[0]) == pytest.approx((1.0, 0.4))
    found = fit("rl", np.broadcast_to(distance**2, (1, 4, 6)), np.broadcast_to(reward, (1, 4, 6)))
    assert found is not None
    assert found.points == 3
    assert found.residual == pytest.approx(0.0, abs=1e-9)


def test_too_few_points_are_not_fitted():
    kl, gold = simulated("rl", 1.0, 0.2, seed=0)
    assert fit("rl", kl[:, :, :2], gold[:, :, :2]) is None
    assert fit("rl", kl * 0.01, gold) is None


def test_more_seeds_that_disagree_widen_the_interval():
    kl, gold = simulated("best-of-n", 1.0, 0.1, seed=0)
    apart = gold + np.array([-1.0, 0.0, 1.0])[:, None, None] * np.sqrt(np.maximum(kl.mean(axis=(0, 1)), 0))
    narrow, wide = fit("best-of-n", kl, gold), fit("best-of-n", kl, apart)
    assert narrow is not None
    assert wide is not None
    assert wide.alpha.high - wide.alpha.low > 5 * (narrow.alpha.high - narrow.alpha.low)
