"""What a generator needs of a sharded policy: all of its weights, or none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from rlhf_cli.generation.generator import Generator
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.server_draw import DrawsAhead
from rlhf_cli.generation.vllm_generator import VLLMGenerator


def weights_to_draw(policy: Policy, generator: Generator) -> AbstractContextManager[object]:
    """Context in which a generator can draw from a policy: a sharded one is whole, unless vLLM has its weights."""
    return nullcontext() if isinstance(generator, DrawsAhead | VLLMGenerator) else policy.whole()
