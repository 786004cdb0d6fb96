"""Losses of a reward model on ranked completions: all pairs of a group, or the likelihood of the whole order.

Completions lie flat, N of them, each with the number of its group (its prompt), so groups may differ in size and
nothing is padded. Every function gives one loss per group: the mean over the groups of an optimizer step is then the
same however the step was split into micro-batches.

Labels are known on the host. With `levels`, `groups` and `margins` on the CPU and rewards on a GPU, the pairwise loss
does not wait for the GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_ranking_loss(rewards: Tensor, levels: Tensor, groups: Tensor, margins: Tensor | None = None) -> Tensor:
    """-1/C(K,2) sum over pairs of log sigmoid(r_w - r_l) of each group (Ouyang et al. 2022, InstructGPT, eq. 1).

    A tie has no better completion; its loss is the cross-entropy of sigmoid(r_i - r_j) with 1/2, as a draw counts in
    Elo ratings: -(log sigmoid(d) + log sigmoid(-d)) / 2, least where the rewards are equal. Ties count among the
    C(K,2).

    Args:
        rewards: (N,) carries gradient.
        levels: (N,) tier of each completion within its group, 0 the best; equal levels are a tie.
        groups: (N,) group of each completion, 0 to G - 1; every group has at least two completions.
        margins: (G,) how much better the best tier is than the rest; subtracted inside the sigmoid (Touvron et al.
            2023, Llama 2, eq. 2) in the pairs that a best completion wins. None means no margin.

    Returns:
        (G,) loss of each group, in nats.
    """
    first, second = pairs_of(groups)
    better = torch.where(levels[first] <= levels[second], first, second)
    worse = first + second - better
    is_tie = levels[first] == levels[second]
    count = int(groups.max()) + 1
    group = groups[first]
    pairs = torch.bincount(group, minlength=count)
    device = rewards.device
    difference = rewards[better.to(device)] - rewards[worse.to(device)]
    if margins is not None:
        has_margin = (levels[better] == 0) & ~is_tie
        difference = difference - torch.where(has_margin, margins[groups[better]], 0.0).to(device)
    won, lost = F.logsigmoid(difference), F.logsigmoid(-difference)
    losses = torch.where(is_tie.to(device), -(won + lost) / 2, -won)
    sums = torch.zeros(count, dtype=losses.dtype, device=device).index_add(0, group.to(device), losses)
    return sums / pairs.to(device)


def centering_penalty(rewards: Tensor, groups: Tensor) -> Tensor:
    """Mean over the pairs of each group of (r_i + r_j)^2, least where rewards are around 0.

    Eisenstein et al. 2023 (arXiv:2312.09244), eq. 2; TRL's `center_rewards_coefficient`. Ranking losses do not change
    when all rewards of a prompt move together: this fixes where they are.

    Args:
        rewards: (N,) carries gradient.
        groups: (N,) group of each completion, see `pairwise_ranking_loss`.

    Returns:
        (G,) squared rewards.
    """
    first, second = pairs_of(groups)
    group, device = groups[first], rewards.device
    pairs = torch.bincount(group, minlength=int(groups.max()) + 1)
    squares = (rewards[first.to(device)] + rewards[second.to(device)]).square()
    sums = torch.zeros(len(pairs), dtype=squares.dtype, device=device).index_add(0, group.to(device), squares)
    return sums / pairs.to(device)


def batch_mean_penalty(rewards: Tensor, groups: Tensor, *, mean: float, completions: int, count: int) -> Tensor:
    """Squared mean of all rewards of an optimizer step, as one share for each group of a part of it.

    Batch-wise sum-to-zero regularization (Hong et al. 2025, arXiv:2505.07271): lambda B (mean of the 2 B rewards of B
    pairs)^2 in the authors' code. A square of a sum does not split into micro-batches, but its tangent does: with the
    mean m known, m^2 = 2 m sum(r) / N - m^2, with the same value and gradient. The mean of the shares over the groups
    of the step is m^2.

    Args:
        rewards: (N,) of a part of the step; carries gradient.
        groups: (N,) group of each completion, 0 to G - 1.
        mean: m, the mean of the rewards of the whole step.
        completions: number of those rewards.
        count: number of groups of the whole step.

    Returns:
        (G,) squared rewards.
    """
    device = rewards.device
    sums = torch.zeros(int(groups.max()) + 1, dtype=rewards.dtype, device=device)
    sums = sums.index_add(0, groups.to(device), rewards)
    return 2 * mean * count / completions * sums - mean**2


def pairs_of(groups: Tensor) -> tuple[Tensor, Tensor]:
    """All unordered pairs of completions that share a group.

    Args:
        groups: (N,).

    Returns:
        Two (P,) index tensors, the first index below the second.
    """
    is_pair = (groups.unsqueeze(1) == groups.unsqueeze(0)).triu(diagonal=1)
    first, second = is_pair.nonzero(as_tuple=True)
    return first, second


def plackett_luce_loss(rewards: Tensor, levels: Tensor, groups: Tensor) -> Tensor:
    """-log P(the tiers in this order) of each group under Plackett-Luce (Plackett 1975; Luce 1959).

    Rewards are log-strengths: a full order is drawn one completion at a time, each with probability exp(r_i) over the
    sum of exp(r_j) of what remains. The probability of tiers is exact: the sum over all full orders that keep the tiers
    apart, any order within a tier ("average" or Breslow-type formulas only approximate it). A group whose completions
    are all tied has probability 1 and loss 0: such a label says nothing here, where the pairwise loss pulls the rewards
    together. With two completions and no tie this is the pairwise loss. It is not divided by K, so it grows with K.

    Args:
        rewards: (N,) carries gradient.
        levels: (N,) tier of each completion within its group, 0 the best.
        groups: (N,) group of each completion, 0 to G - 1. A tier holds at most 16 completions; its cost grows as
            2^size.

    Returns:
        (G,) loss of each group, in nats.
    """
    return torch.stack(
        [
            -_order_log_likelihood(rewards[groups == group], levels[groups == group])
            for group in range(int(groups.max()) + 1)
        ]
    )


def _order_log_likelihood(rewards: Tensor, levels: Tensor) -> Tensor:
    total = rewards[:0].sum()  # 0, and still part of the graph where all completions are tied
    for level in levels.unique(sorted=True)[:-1]:  # the last tier is what is left, with certainty
        total = total + _tier_log_likelihood(rewards[levels == level], rewards[levels > level])
    return total


def _tier_log_likelihood(tier: Tensor, rest: Tensor) -> Tensor:
    """log P(all of `tier` is drawn before any of `rest`), by dynamic programming over the subsets drawn so far.

    f(A) = log P(the first |A| draws are A) = logsumexp over i in A of f(A - i) + r_i - logsumexp(all but A - i).

    Args:
        tier: (m,) log-strengths.
        rest: (n,) log-strengths, n at least 1.
    """
    size = len(tier)
    rest_mass = torch.logsumexp(rest, dim=0)
    subsets = torch.arange(2**size, device=tier.device)
    is_drawn = (subsets.unsqueeze(1) >> torch.arange(size, device=tier.device)) & 1 == 1
    # Log of the strength still in the urn once a subset is drawn: (2^m,). The rest keeps every row finite.
    undrawn = tier.expand_as(is_drawn).masked_fill(is_drawn, -torch.inf)
    in_urn = torch.cat([undrawn, rest_mass.expand(2**size, 1)], dim=1).logsumexp(dim=1)
    sizes = is_drawn.sum(dim=1)
    ways = tier.new_zeros(1)  # f of the subsets of the current size, in the order of their numbers
    before = subsets[sizes == 0]
    for drawn in range(1, size + 1):
        current = subsets[sizes == drawn]
        # Every subset of this size comes from `drawn` smaller ones, by whichever member was drawn last: (S, drawn).
        members = is_drawn[current].nonzero()[:, 1].view(len(current), drawn)
        smaller = current.unsqueeze(1) - (1 << members)
        position = torch.searchsorted(before, smaller)
        ways = (ways[position] + tier[members] - in_urn[smaller]).logsumexp(dim=1)
        before = current
    return ways[0]
