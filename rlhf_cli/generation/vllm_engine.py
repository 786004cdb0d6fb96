"""vLLM's engine in this process: the only module that calls vLLM. docs/generation.md lists what it relies on.

vLLM is an optional dependency: nothing of it is imported before `Engine` is made.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_cli.distributed.process_group import join
from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.memory import free_memory
from rlhf_cli.models.sharding import class_of
from rlhf_cli.settings.shared import GenerationSettings

SUPPORTED = "0.32"
"""The series of vLLM whose interface this module knows; vLLM changes it between series."""

_PREFILL_TOKENS = 4096
"""Most tokens per forward pass. vLLM's default of up to 16,384 reserves memory for as many rows of logits."""
_KEPT_LENGTH = 8192
"""Longest sequence that an engine is made for unless more is needed, so that the next stage can use it too."""

_NOT_OF_THE_SHAPE = (
    {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "quantization_config"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
)  # fmt: skip
"""What may differ in the configurations of models that one engine can serve."""


def installed_version() -> str | None:
    """Return the version of vLLM that is installed; None if none is."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


def has_architecture(name: str) -> bool:
    """Whether vLLM has an implementation of its own of a class of transformers, such as `LlamaForCausalLM`."""
    _prepare_environment()
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    return name in ModelRegistry.get_supported_archs()


class Engine:
    """One vLLM engine on this process's GPU, with weights of ours.

    It is made without weights: `load` comes before the first `run` and after every `sleep`.
    In a run of several processes each makes its own, and all of them at the same time: vLLM then forms groups of
    processes. With `tensor_parallel_size` each of a group holds a part of one engine. All of a group then make the same
    calls of all methods, with the same requests.

    Args:
        model: whose architecture it has.
        settings: its share of the GPU, and the processes that share it.
        shape: `shape_of` the policy.
        dtype: of its weights and products.
        length: longest sequence, in tokens, that it has to hold.
        longest: longest sequence that the model supports.

    Attributes:
        shape: as given.
        length: longest sequence, in tokens.
        is_asleep: whether it has no weights, because of `sleep`.
        holds: returns whose weights it has, if that still exists; for its user.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: GenerationSettings,
        *,
        shape: str,
        dtype: torch.dtype,
        length: int,
        longest: int,
    ) -> None:
        _prepare_environment()
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self.shape = shape
        self.length = min(longest, max(length, _KEPT_LENGTH))
        self.is_asleep = False
        self.holds: Callable[[], object] = lambda: None
        self._folder = tempfile.TemporaryDirectory(prefix="rlhf-vllm-")
        _write_config(model, Path(self._folder.name))
        is_alone = world_size() == 1
        if not is_alone:
            join()  # vLLM uses the process group that it finds
        with _random_states_kept():
            self._llm: Any = LLM(
                model=self._folder.name,
                skip_tokenizer_init=True,  # requests are token ids
                load_format="dummy",  # `load` brings the weights
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=self.length,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                tensor_parallel_size=settings.tensor_parallel_size,
                max_num_batched_tokens=_PREFILL_TOKENS,
                enable_prefix_caching=True,  # completions of one prompt share its prefill
                enable_sleep_mode=True,
                logprobs_mode="processed_logprobs",  # of the distribution that is drawn from, not of temperature 1
                generation_config="vllm",  # not the model's own top-k and penalties
                model_impl="vllm",
                seed=0,  # of requests without a seed; ours have one
                distributed_executor_backend="uni" if is_alone else "external_launcher",
            )

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take weights, named as in a checkpoint of the model; wakes the engine.

        What the old weights left in the prefix cache is forgotten.
        """
        if self.is_asleep:
            free_memory()  # what torch keeps of the update's memory is lost to vLLM's pool
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.reset_prefix_cache()
        if self.is_asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self.is_asleep = False
        if torch.cuda.is_available():
            # Messages that gathered weights must not be under way on this GPU when those of a shared engine begin.
            torch.cuda.synchronize()

    def sleep(self) -> None:
        """Free the memory of weights and key-value cache; what they held is lost."""
        if not self.is_asleep:
            self._llm.sleep(level=2)
            self.is_asleep = True

    def run(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        stop_ids: Iterable[int],
        after_step: Callable[[Sequence[Any]], object],
    ) -> list[Any]:
        """Draw one completion per request; returns vLLM's `CompletionOutput` of each, in their order.

        Args:
            requests: N requests.
            sampling: temperature, nucleus and longest completion.
            stop_ids: tokens that end a completion, and no others do.
            after_step: called after every step of the engine with vLLM's `RequestOutput` of each completion that ended
                in it; may raise, and then all requests are dropped.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        parameters = [
            SamplingParams(
                n=1,
                seed=request.seed,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0,
                min_p=0.0,
                max_tokens=sampling.max_new_tokens,
                ignore_eos=True,  # what ends a completion is in `stop_ids`, all of it
                stop_token_ids=sorted(stop_ids),
                logprobs=0,  # of the drawn token alone
                detokenize=False,
            )
            for request in requests
        ]
        identifiers = self._llm.enqueue(prompts, parameters, use_tqdm=False)
        finished: list[Any] = []
        try:
            while self._llm.llm_engine.has_unfinished_requests():
                ended = [one for one in self._llm.llm_engine.step() if one.finished]
                finished += ended
                after_step(ended)
        except BaseException:
            self._llm.llm_engine.abort_request(identifiers, internal=True)
            raise
        # Requests are numbered in the order in which they were added.
        return [one.outputs[0] for one in sorted(finished, key=lambda one: int(one.request_id))]


def shape_of(config: PretrainedConfig, dtype: torch.dtype) -> str:
    """Return what an engine is made for: models of equal shape, as their own files have it, can use the same one."""
    kept = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_SHAPE}
    return f"{dtype} {json.dumps(kept, sort_keys=True, default=str)}"


def _write_config(model: PreTrainedModel, folder: Path) -> None:
    """Write `config.json`: all that vLLM has to read from a folder."""
    config = copy.deepcopy(model.config)
    config.architectures = [class_of(model).__name__]
    vars(config).pop("quantization_config", None)  # of the checkpoint; it was undone when the model was loaded
    config.save_pretrained(folder)


def _prepare_environment() -> None:
    # The engine runs in this process, where it can read the policy's weights.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """vLLM seeds the global random number generators of the process."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
