"""Mutation testing of the equations: five deliberate mistakes per function of `rlhf_cli/objectives/`.

    python benchmarks/mutations.py

Each mutation changes one piece of source in a copy of the package and runs `tests/objectives/` there. A mutation that
passes all tests is a gap in the tests: it is printed, and the exit code is 1. Takes two minutes on one core. Function
names as arguments, such as `kl.kl_per_token`, restrict the run to these functions.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "advantages.token_rewards": [
        ("(-kl_coef * kl)", "(kl_coef * kl)"),
        ("(-kl_coef * kl)", "(-kl)"),
        (
            "is_completion.sum(dim=1, keepdim=True) - 1",
            "is_completion.sum(dim=1, keepdim=True).clamp(max=kl.shape[1] - 1)",
        ),
        ("rewards.scatter_add(1, last", "rewards.scatter(1, last"),
        (".masked_fill(~is_completion, 0.0)\n    last", "\n    last"),
    ],
    "advantages.generalized_advantages": [
        ("gamma * following_value - values[:, t]", "following_value - values[:, t]"),
        ("gamma * gae_lambda * following_advantage", "gamma * following_advantage"),
        ("gamma * gae_lambda * following_advantage", "gae_lambda * following_advantage"),
        ("following_value = values[:, t]\n", "following_value = rewards[:, t]\n"),
        ("return advantages, advantages + values", "return advantages, advantages"),
    ],
    "kl.kl_per_token": [
        ("logprobs - reference_logprobs\n", "reference_logprobs - logprobs\n"),
        ("return log_ratio\n", "return log_ratio.abs()\n"),
        ("0.5 * log_ratio**2", "log_ratio**2"),
        ("(-log_ratio).expm1() + log_ratio", "log_ratio.expm1() + log_ratio"),
        ("(-log_ratio).expm1() + log_ratio", "(-log_ratio).expm1() - log_ratio"),
    ],
    "kl.adapted_kl_coef": [
        ("kl / target - 1.0, -0.2), 0.2)", "kl / target - 1.0, -0.2), 0.5)"),
        ("kl / target - 1.0, -0.2), 0.2)", "kl / target - 1.0, 0.0), 0.2)"),
        ("kl / target - 1.0", "target / kl - 1.0 if kl else -1.0"),
        ("1.0 + error * episodes / horizon", "1.0 + error"),
        ("1.0 + error * episodes / horizon", "1.0 - error * episodes / horizon"),
    ],
    "masking.masked_sum": [
        ("values.masked_fill(~is_real, 0.0).sum()", "values.sum()"),
        ("values.masked_fill(~is_real, 0.0).sum()", "(values * is_real).sum()"),
        ("values.masked_fill(~is_real, 0.0).sum()", "values.masked_fill(is_real, 0.0).sum()"),
        ("values.masked_fill(~is_real, 0.0).sum()", "values.masked_fill(~is_real, 1.0).sum()"),
        ("values.masked_fill(~is_real, 0.0).sum()", "values.masked_fill(~is_real, 0.0).mean()"),
    ],
    "masking.masked_mean": [
        ("/ is_real.sum()", "/ values.numel()"),
        ("/ is_real.sum()", "/ (is_real.sum() - 1).clamp(min=1)"),
        ("/ is_real.sum()", "/ is_real.sum(dim=-1).max()"),
        ("/ is_real.sum()", "* is_real.sum()"),
        ("return masked_sum(values, is_real) / is_real.sum()", "return values.mean()"),
    ],
    "masking.masked_variance": [
        ("(values - masked_mean(values, is_real)) ** 2", "values ** 2"),
        ("(values - masked_mean(values, is_real)) ** 2", "(values - values.mean()) ** 2"),
        ("(values - masked_mean(values, is_real)) ** 2", "(values - masked_mean(values, is_real)).abs()"),
        ("return masked_mean((values", "return masked_sum((values"),
        (
            "return masked_mean((values - masked_mean(values, is_real)) ** 2, is_real)",
            "return masked_mean((values - masked_mean(values, is_real)) ** 2, is_real) ** 0.5",
        ),
    ],
    "masking.whiten": [
        ("(values - mean) * torch.rsqrt", "values * torch.rsqrt"),
        ("torch.rsqrt(masked_variance(values, is_real) + epsilon)", "1.0"),
        ("torch.rsqrt(masked_variance", "torch.sqrt(masked_variance"),
        ("    if keep_mean:\n        whitened = whitened + mean\n", ""),
        ("return whitened.masked_fill(~is_real, 0.0)", "return whitened"),
    ],
    "policy.policy_loss": [
        ("ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio"),
        ("torch.minimum(unclipped, clipped)", "torch.maximum(unclipped, clipped)"),
        ("loss = -masked_sum", "loss = masked_sum"),
        ("0.5 * log_ratio**2", "log_ratio**2"),
        ("(logprobs - old_logprobs.detach()).masked_fill(~is_completion, 0.0)", "(logprobs - old_logprobs.detach())"),
    ],
    "policy.value_loss": [
        ("torch.maximum(error, clipped_error)", "error"),
        ("torch.maximum(error, clipped_error)", "torch.minimum(error, clipped_error)"),
        ("loss = 0.5 * masked_sum", "loss = masked_sum"),
        ("old_values - clip_range)\n", "old_values)\n"),
        ("if clip_range is None:\n        return ValueLoss(0.5 *", "if clip_range is None:\n        return ValueLoss("),
    ],
    "shaping.RunningMoments.including": [
        ("shift**2 * self.count * len(rewards) / count", "0.0"),
        ("self.mean + shift * len(rewards) / count", "mean"),
        ("self.squares + squares + shift", "squares + shift"),
        ("count = self.count + len(rewards)", "count = self.count + 1"),
        ("shift = mean - self.mean", "shift = mean"),
    ],
    "shaping.RunningMoments.std": [
        ("(self.squares / self.count) ** 0.5", "self.squares / self.count"),
        ("(self.squares / self.count) ** 0.5", "(self.squares / (self.count - 1)) ** 0.5"),
        ("if self.count else 0.0", "if self.count else 1e-8"),
        ("spread if spread > 0.0 else 1.0", "spread"),
        ("(self.squares / self.count) ** 0.5", "self.squares**0.5"),
    ],
    "shaping.RewardShape.apply": [
        ("rewards = scores * scale", "rewards = scores"),
        ("rewards.clamp(-self.clip, self.clip)", "rewards.clamp(max=self.clip)"),
        ("where(ended, rewards, self.missing_eos_reward)", "where(~ended, rewards, self.missing_eos_reward)"),
        ("rewards - self.missing_eos_penalty", "rewards + self.missing_eos_penalty"),
        ("return rewards - self.length_penalty * lengths", "return rewards - self.length_penalty"),
    ],
    "ranking.pairwise_ranking_loss": [
        ("levels[first] <= levels[second], first, second", "levels[first] >= levels[second], first, second"),
        ("-(won + lost) / 2, -won)", "-won, -won)"),
        ("(levels[better] == 0) & ~is_tie", "(levels[better] == 0)"),
        ("difference - torch.where(has_margin", "difference + torch.where(has_margin"),
        ("return sums / pairs.to(device)", "return sums"),
    ],
    "ranking.centering_penalty": [
        ("rewards[first.to(device)] + rewards[second", "rewards[first.to(device)] - rewards[second"),
        (".square()", ".abs()"),
        ("return sums / pairs.to(device)", "return sums"),
        ("return sums / pairs.to(device)", "return sums / pairs.to(device).sum()"),
        ("int(groups.max()) + 1", "len(groups)"),
    ],
    "ranking.batch_mean_penalty": [
        ("2 * mean * count", "mean * count"),
        ("2 * mean * count", "2 * count"),
        ("mean * count / completions", "mean / completions"),
        ("- mean**2", "+ mean**2"),
        ("sums - mean**2", "sums"),
    ],
    "policy.truncated_importance_weights": [
        ("logprobs - sampler_logprobs", "sampler_logprobs - logprobs"),
        ("sampler_logprobs).detach()", "sampler_logprobs)"),
        ("sampler_logprobs).detach().masked_fill(~is_completion, 0.0)", "sampler_logprobs).detach()"),
        (".clamp(max=cap)", ""),
        (".exp()", ""),
    ],
    "ranking.pairs_of": [
        ("triu(diagonal=1)", "triu(diagonal=0)"),
        ("triu(diagonal=1)", "triu(diagonal=2)"),
        (".triu(diagonal=1)", ""),
        ("groups.unsqueeze(1) == groups.unsqueeze(0)", "groups.unsqueeze(1) <= groups.unsqueeze(0)"),
        ("return first, second", "return first, first"),
    ],
    "ranking.plackett_luce_loss": [
        ("-_order_log_likelihood(rewards[groups == group]", "_order_log_likelihood(rewards[groups == group]"),
        ("levels.unique(sorted=True)[:-1]", "levels.unique(sorted=True)[:-2]"),
        ("rewards[levels > level]", "rewards[levels >= level]"),
        ("tier[members] - in_urn[smaller]", "tier[members] - in_urn[current].unsqueeze(1)"),
        ("return ways[0]", "return ways[0] - torch.lgamma(torch.tensor(size + 1.0))"),
    ],
}  # fmt: skip


def passes(folder: Path) -> bool:
    """Return whether all tests pass in a copy of the package. Forks, since a process imports a module only once."""
    child = os.fork()
    if child == 0:
        import pytest

        sys.path.insert(0, str(folder))
        os.chdir(folder)
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "tests/objectives"])
        os._exit(int(code))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def mutated(folder: Path, function: str, old: str, new: str) -> bool:
    """Return whether the tests pass after replacing `old` with `new`."""
    path = folder / "rlhf_cli" / "objectives" / f"{function.split('.')[0]}.py"
    source = path.read_text(encoding="utf-8")
    if source.count(old) < 1:
        raise SystemExit(f"{function}: {old!r} is not in its source; update this script")
    # Replace the last occurrence, since helper functions come first in a file.
    head, tail = source.rsplit(old, 1) if function.split(".")[1] != "policy_loss" else source.split(old, 1)
    path.write_text(head + new + tail, encoding="utf-8")
    try:
        return passes(folder)
    finally:
        path.write_text(source, encoding="utf-8")


def main() -> int:
    """Run all mutations. Returns 1 if any was not detected."""
    import torch  # noqa: F401  (loaded once, before the children)

    survivors = total = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("rlhf_cli", "tests/objectives"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n", encoding="utf-8")
        sys.dont_write_bytecode = True
        if not passes(folder):
            raise SystemExit("the tests fail without any mutation")
        chosen = set(sys.argv[1:]) or set(MUTATIONS)
        if unknown := sorted(chosen - set(MUTATIONS)):
            raise SystemExit(f"unknown function: {', '.join(unknown)}; use one of {', '.join(MUTATIONS)}")
        for function, mutations in MUTATIONS.items():
            if function not in chosen:
                continue
            found = [(old, new) for old, new in mutations if mutated(folder, function, old, new)]
            total, survivors = total + len(mutations), survivors + len(found)
            print(f"{function}: {len(mutations) - len(found)} of {len(mutations)} detected", flush=True)
            for old, new in found:
                print(f"    not detected: {old!r} -> {new!r}", flush=True)
    print(f"{total - survivors} of {total} mutations detected")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
