"""Labels of proxies: pairs in gold order, nested sizes, nested noise."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.data.records import Ranking
from rlhf_cli.data.splits import Split
from rlhf_cli.errors import DataError
from rlhf_cli.overopt.labels import LabelPool

RANKINGS = [
    Ranking(f"Question {n}?", ("best", "good", "also good", "good", "", "bad"), ((0,), (1, 2, 3), (5,), (4,)))
    for n in range(60)
]
GOLD = {"best": 3, "good": 2, "also good": 2, "bad": 1}


@pytest.fixture
def pool() -> LabelPool:
    return LabelPool.of(RANKINGS, Split(0.3, 0))


def test_pairs_have_no_ties_equal_or_blank_completions(pool):
    assert len(pool.training) == sum(not Split(0.3, 0).holds_out(ranking.prompt) for ranking in RANKINGS)
    for pairs in pool.training:
        assert {(pair.chosen, pair.rejected) for pair in pairs} == {
            ("best", "good"), ("best", "also good"), ("best", "bad"), ("good", "bad"), ("also good", "bad"),
        }  # fmt: skip
    assert pool.held_out
    assert all(Split(0.3, 0).holds_out(pair.prompt) for pair in pool.held_out)


def test_smaller_sets_are_part_of_larger_ones_and_first_of_different_prompts(pool):
    small, large = (pool.draw(count, noise=0.2, seed=1) for count in (20, 80))
    assert large[:20] == small
    assert len({pair.prompt for pair in small}) == 20
    assert pool.draw(20, noise=0.2, seed=2) != small


def test_noise_swaps_its_share_and_more_noise_swaps_more(pool):
    clean, little, much = (pool.draw(200, noise=noise, seed=0) for noise in (0.0, 0.1, 0.4))
    assert all(GOLD[pair.chosen] > GOLD[pair.rejected] for pair in clean)

    def swapped(labels) -> set[int]:
        return {row for row, (one, pair) in enumerate(zip(labels, clean, strict=True)) if one == pair.swapped()}

    assert swapped(little) < swapped(much)
    assert 60 <= len(swapped(much)) <= 100
    assert all(one in (pair, pair.swapped()) for one, pair in zip(much, clean, strict=True))


def test_too_few_pairs_are_said(pool):
    with pytest.raises(DataError, match=r"needs 9,999 labels; the training prompts have \d+ pairs"):
        pool.draw(9999, noise=0.0, seed=0)


def test_the_file_holds_labels_and_held_out_pairs_without_noise(pool, tmp_path):
    labels = pool.draw(10, noise=0.4, seed=0)
    pool.write(tmp_path / "labels" / "a.jsonl", labels)
    rows = [json.loads(line) for line in (tmp_path / "labels" / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 10 + len(pool.held_out)
    assert all(GOLD[row["chosen"]] > GOLD[row["rejected"]] for row in rows[10:])
