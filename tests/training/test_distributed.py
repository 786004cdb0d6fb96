"""What several processes share: stops, gradients, random states, work; in threads, without torch's process group."""

from __future__ import annotations

import importlib.util
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import Interrupted
from rlhf_cli.generation.generator import Completion
from rlhf_cli.labeling.completions import CompletionFile
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.reward_model.data import encode_group
from rlhf_cli.stages.reward_model.settings import RewardModelSettings
from rlhf_cli.stages.reward_model.trainer import RewardTrainer
from rlhf_cli.stages.sft.loss import TokenCounts
from rlhf_cli.training.distributed import DistributedStop, all_reduce_gradients
from rlhf_cli.training.monitoring.run_logger import RunLogger
from rlhf_cli.training.random_state import random_states, restore_random_states

_specification = importlib.util.spec_from_file_location("training_threads", Path(__file__).parent / "threads.py")
assert _specification is not None
assert _specification.loader is not None
_threads = importlib.util.module_from_spec(_specification)
sys.modules[_specification.name] = _threads
_specification.loader.exec_module(_threads)
in_threads = _threads.in_threads


class Signal:
    """A signal that came, or did not."""

    def __init__(self, signum: int | None) -> None:
        self._signum = signum

    @property
    def requested(self) -> bool:
        return self._signum is not None

    def check(self) -> None:
        if self._signum is not None:
            raise Interrupted(self._signum)


def test_a_signal_to_one_process_stops_all():
    def work(processes: ProcessGroup) -> tuple[bool, int]:
        stop = DistributedStop(Signal(signal.SIGINT if processes.index == 1 else None), processes)
        requested = stop.requested
        with pytest.raises(Interrupted) as caught:
            stop.check()
        return requested, caught.value.exit_code

    assert in_threads(3, work) == [(True, 130)] * 3


def test_no_process_leaves_before_all_know():
    def work(processes: ProcessGroup) -> bool:
        stop = DistributedStop(Signal(signal.SIGTERM if processes.index == 1 else None), processes)
        stop.check()  # between two askings: the others would wait for it
        return True

    assert in_threads(2, work) == [True, True]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_divided_work_comes_back_in_order(count):
    def work(processes: ProcessGroup) -> list[int]:
        return processes.map([1, 2, 3], lambda own: [10 * number for number in own])

    assert in_threads(count, work) == [[10, 20, 30]] * count


def test_gradients_are_summed_where_anyone_has_one_and_stay_none_where_nobody_has():
    def work(processes: ProcessGroup) -> list[float | None]:
        weights = [torch.nn.Parameter(torch.ones(())) for _ in range(3)]
        if processes.index == 0:
            weights[0].grad = torch.tensor(2.0)
        weights[1].grad = torch.tensor(float(processes.index + 1))
        all_reduce_gradients(weights, processes)
        return [None if weight.grad is None else float(weight.grad) for weight in weights]

    assert in_threads(2, work) == [[2.0, 3.0, None]] * 2


def test_a_logger_without_a_folder_writes_nothing(tmp_path):
    for work in (tmp_path, None):
        log = RunLogger(work, after_step=0)
        log.write(1, {"loss": 1.0})
        assert (log.position() is None) == (work is None)
        log.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_every_process_gets_its_own_random_state_back():
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append((random_states(ProcessGroup())[0], float(torch.rand(())), random.random()))
        random.random()
    states = [state for state, *_ in drawn]
    for index, (_, of_torch, of_python) in enumerate(drawn):
        processes = ProcessGroup()
        processes.index = index
        restore_random_states(states, processes, seed=0)
        assert (float(torch.rand(())), random.random()) == (of_torch, of_python)


def test_a_process_that_the_checkpoint_does_not_know_is_seeded():
    torch.manual_seed(7)
    known = random_states(ProcessGroup())
    drawn = float(torch.rand(()))
    second = ProcessGroup()
    second.index = 1
    restore_random_states(known, second, seed=1)
    again = float(torch.rand(()))
    assert again != drawn
    restore_random_states(known, second, seed=1)
    assert float(torch.rand(())) == again


def test_token_counts_are_of_all_processes():
    batches = [{"completions": torch.tensor([1, 2]), "texts": torch.tensor([4])}, {"completions": torch.tensor([3]),
               "texts": torch.tensor([6])}]  # fmt: skip

    def work(processes: ProcessGroup) -> TokenCounts:
        return TokenCounts.of(processes.shard(batches), processes)

    assert in_threads(3, work) == [TokenCounts(6, 10)] * 3, "the third has none"


RANKINGS = [(f"question {n}", [f"answer {n % 3}", "other", "e" * (n % 4 + 1)]) for n in range(7)]


@pytest.mark.parametrize("lora", [True, False])
def test_a_reward_model_of_several_processes_is_that_of_one(lora, tiny_llama, tmp_path):
    from rlhf_cli.data.records import Ranking

    settings = RewardModelSettings(
        learning_rate=1e-3, batch_size=3, micro_batch_size=1, weight_decay=0.1, warmup_share=0.0, schedule="constant",
        checkpoint_steps=2,
    )  # fmt: skip
    adapter = LoraSettings(rank=4, alpha=8.0) if lora else None
    # Not in the threads, which share torch's generator.
    scorers = [new_reward_model(ModelSource(str(tiny_llama)), template=None, lora=adapter, seed=1) for _ in range(3)]

    def work(processes: ProcessGroup) -> tuple[dict[str, torch.Tensor], list[float]]:
        scorer = scorers[processes.index + processes.count - 1]
        groups = [encode_group(scorer, Ranking(prompt, tuple(texts), ((0,), (1, 2)))) for prompt, texts in RANKINGS]
        folder = tmp_path / str(processes.count)
        folder.mkdir(exist_ok=True)
        trainer = RewardTrainer(
            scorer,
            groups,
            settings,
            seed=5,
            work=folder,
            stop=Signal(None),
            processes=processes,
        )
        trainer.accumulate(range(5))
        gradients = {name: weight.grad.clone() for name, weight in trainer.trained.items() if weight.grad is not None}
        trainer.optimizer.zero_grad(set_to_none=True)
        return gradients, [trainer.step(step).metrics["loss"] for step in range(trainer.batches.steps)]

    [(alone, losses)] = in_threads(1, work)
    for gradients, curve in in_threads(2, work):
        assert gradients.keys() == alone.keys()
        for name, gradient in alone.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)
        assert curve == pytest.approx(losses, rel=1e-4)


CHUNKS = [[2, 0], [1, 4], [3]]


def test_partial_answers_of_two_processes_are_completed_by_one(tmp_path):
    sampled: list[int] = []

    def sample(chunk):
        sampled.extend(chunk)
        return [Completion([number], f"{number}", True) for number in chunk for _ in range(2)]

    def work(processes: ProcessGroup) -> None:
        file = CompletionFile(tmp_path / "samples.jsonl", CHUNKS, 2, processes)
        chunks: list[object] = []

        def stopped(chunk):
            if chunks:
                raise Interrupted(signal.SIGTERM)
            return sample(chunk)

        # The first chunk of process 0 is safe, its second is not.
        file.fill(stopped if processes.index == 0 else sample, chunks.append)

    with pytest.raises((Interrupted, _threads.threading.BrokenBarrierError)):
        in_threads(2, work)
    assert sorted(sampled) == [0, 1, 2, 4]
    with (tmp_path / "samples-1.jsonl").open("ab") as torn:
        torn.write(b'{"prompt": 3, "te')
    file = CompletionFile(tmp_path / "samples.jsonl", CHUNKS, 2)
    assert (file.done, file.left) == (8, 2)
    sampled.clear()
    file.fill(sample)
    assert sampled == [3]
    assert [completion.ids[0] for group in file.read() for completion in group] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
