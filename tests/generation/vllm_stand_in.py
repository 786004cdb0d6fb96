"""A stand-in for the part of vLLM that we call, with its names and parameters, on tiny models of transformers.

docs/generation.md lists that part, read in the source of vLLM 0.32.0. Every parameter is named here, so another name in
our calls is an error, and every call is written down.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import zlib
from collections.abc import Callable
from datetime import timedelta
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as distributed
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_cli.generation import vllm_engine, vllm_generator

VERSION = "0.32.0"


@dataclasses.dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


class ModelRegistry:
    @staticmethod
    def get_supported_archs() -> set[str]:
        return {"LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"}


class Ranks:
    """The processes of one engine, which vLLM finds by the environment of an external launcher.

    In reality they wait for each other in the middle of every step. They wait here too, and what they were given is
    compared, so that a difference is an error at once.
    """

    def __init__(self, size: int, backend: str | None, heads: int) -> None:
        self.size, self.index, self.group = size, 0, None
        if heads % size:
            raise ValueError(f"Total number of attention heads ({heads}) must be divisible by tensor parallel size.")
        if backend != "external_launcher":
            assert size == 1
            return
        assert {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        if size == 1:
            return
        rank, count = int(os.environ["RANK"]), distributed.get_world_size()
        assert count % size == 0
        self.index = rank % size
        # Every process of the run takes part in making every group.
        groups = [
            distributed.new_group([*range(first, first + size)], backend="gloo", timeout=timedelta(seconds=60))
            for first in range(0, count, size)
        ]
        self.group = groups[rank // size]

    def compare(self, given: object) -> None:
        """Wait for the others; raise if they were given something else."""
        if self.size > 1:
            own = torch.tensor([zlib.crc32(repr(given).encode())])
            found = [torch.zeros_like(own) for _ in range(self.size)]
            distributed.all_gather(found, own, group=self.group)
            if any(int(one) != int(own) for one in found):
                raise AssertionError("the processes of an engine were given different things")


class LLM:
    """Holds a model of its own. What ours needs of `LLM` and `LLMEngine` in one class."""

    made: ClassVar[list[LLM]] = []
    before_step: Callable[[], None] = staticmethod(lambda: None)
    finish_reason: str | None = None
    off_by = 0.0
    """Added to every logit of token 5: an engine whose probabilities differ."""
    further_steps = 0
    """Steps that the scheduler takes after the last completion, as one that does not know of an end token."""

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        load_format: str = "auto",
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool | None = None,
        enable_sleep_mode: bool = False,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
        model_impl: str = "auto",
        distributed_executor_backend: str | None = None,
        tensor_parallel_size: int = 1,
    ) -> None:
        self.arguments = {name: value for name, value in locals().items() if name != "self"}
        torch.manual_seed(seed)
        self.config = AutoConfig.from_pretrained(model)
        self.ranks = Ranks(tensor_parallel_size, distributed_executor_backend, self.config.num_attention_heads)
        self.ranks.compare({**self.arguments, "model": self.config.to_json_string()})
        with torch.random.fork_rng():
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, dtype)).eval()
        self.calls: list[str] = []
        self.awake = {"weights", "kv_cache"}
        self.names: list[str] = []
        self.parameters: list[SamplingParams] = []
        self.aborted: list[str] = []
        self.llm_engine = self
        self._waiting: list[tuple[str, list[int], SamplingParams]] = []
        self._count = self._further = 0
        self._parts: dict[int, torch.nn.Parameter] = {}  # weights of which this process has its part
        LLM.made.append(self)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        assert tags
        assert not self.awake & {*tags}, "what is awake is not woken"
        self.calls.append(f"wake {tags[0]}")
        self.awake |= {*tags}
        return self.awake == {"weights", "kv_cache"}

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.calls.append(f"sleep {level}")
        self.awake.clear()
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.fill_(torch.nan)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.calls.append("reset")
        return True

    def collective_rpc(self, method: str, timeout: Any = None, args: tuple = (), kwargs: Any = None) -> list[None]:
        return [getattr(self, method)(*args, **(kwargs or {}))]

    def reload_weights(self, weights_iterator: Any = None, weights_path: Any = None, is_checkpoint_format: bool = True):
        assert "weights" in self.awake
        self.calls.append("load")
        own = self.model.state_dict(keep_vars=True)
        self.names = []
        with torch.no_grad():
            for name, value in weights_iterator:
                if name not in own:
                    raise ValueError(f"There is no module or parameter named '{name}' in the model")
                own[name].copy_(value)
                self.names.append(name)
                if self.ranks.size > 1:
                    is_other = torch.arange(len(value)) % self.ranks.size != self.ranks.index
                    own[name][is_other] = 0.0
                    self._parts[id(own[name])] = own[name]

    def enqueue(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> list[str]:
        assert self.awake == {"weights", "kv_cache"}
        identifiers = []
        for prompt, parameters in zip(prompts, sampling_params, strict=True):
            assert len(prompt["prompt_token_ids"]) + parameters.max_tokens <= self.arguments["max_model_len"]
            self._waiting.append((str(self._count), prompt["prompt_token_ids"], parameters))
            self.parameters.append(parameters)
            identifiers.append(f"{self._count}-random")
            self._count += 1
        return identifiers

    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting or self._further)

    @torch.no_grad()
    def step(self) -> list[Any]:
        """The last request first: completions end in no order."""
        LLM.before_step()
        if not self._waiting:
            self._further -= 1
            return []
        self.ranks.compare([(prompt, parameters) for _, prompt, parameters in self._waiting])
        for part in self._parts.values():  # in reality, the parts of products are summed
            distributed.all_reduce(part, group=self.ranks.group)
        self._parts = {}
        identifier, prompt, parameters = self._waiting.pop()
        self._further = LLM.further_steps
        output = self.complete(prompt, parameters)
        unfinished = SimpleNamespace(request_id=identifier, finished=False, outputs=[])
        return [unfinished, SimpleNamespace(request_id=identifier, finished=True, outputs=[output])]

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        assert internal
        self.aborted += request_ids
        self._waiting.clear()
        self._further = 0

    @torch.no_grad()
    def complete(self, prompt: list[int], parameters: SamplingParams) -> Any:
        generator = torch.Generator().manual_seed(parameters.seed)
        ids, rows, reason = list(prompt), [], "length"
        for _ in range(parameters.max_tokens):
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            logits[5] += LLM.off_by
            logprobs = (logits / parameters.temperature).log_softmax(-1)
            token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
            ids.append(token)
            rows.append({token: SimpleNamespace(logprob=float(logprobs[token]), rank=1)})
            if token in parameters.stop_token_ids or (not parameters.ignore_eos and token == self.config.eos_token_id):
                reason = "stop"
                break
        return SimpleNamespace(
            token_ids=ids[len(prompt) :], logprobs=rows, finish_reason=LLM.finish_reason or reason, text=""
        )


@pytest.fixture
def vllm(monkeypatch):
    """Installs the stand-in; yields its class `LLM`."""
    return install(monkeypatch)


def install(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Install the stand-in."""
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams, module.ModelRegistry = LLM, SamplingParams, ModelRegistry
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    monkeypatch.setattr(vllm_generator, "installed_version", lambda: VERSION)
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: VERSION)
    monkeypatch.setattr(vllm_generator, "engines", [])
    for name, value in (("made", []), ("before_step", staticmethod(lambda: None)), ("finish_reason", None)):
        monkeypatch.setattr(LLM, name, value)
    monkeypatch.setattr(LLM, "off_by", 0.0)
    monkeypatch.setattr(LLM, "further_steps", 0)
    return LLM
