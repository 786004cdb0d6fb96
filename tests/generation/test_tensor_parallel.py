"""Which models can be divided among the GPUs of an engine."""

from __future__ import annotations

import pytest

from rlhf_cli.generation.tensor_parallel import indivisible

LLAMA_70B = {"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28_672}


@pytest.mark.parametrize(
    ("config", "size", "reason"),
    [
        pytest.param(LLAMA_70B, 8, None, id="a key head on each"),
        pytest.param(LLAMA_70B, 16, None, id="two GPUs have the same key head"),
        pytest.param(LLAMA_70B, 3, "its 64 attention heads cannot be divided among 3 GPUs", id="heads"),
        pytest.param({"text_config": LLAMA_70B}, 3, "its 64 attention heads", id="of the part that writes"),
        pytest.param(
            {**LLAMA_70B, "num_key_value_heads": 6}, 4, "its 6 key-value heads cannot be divided among 4", id="keys"
        ),
        pytest.param({**LLAMA_70B, "num_key_value_heads": 3}, 4, "its 3 key-value heads", id="fewer keys than GPUs"),
        pytest.param({**LLAMA_70B, "num_key_value_heads": 1}, 4, None, id="one key head is on all GPUs"),
        pytest.param({**LLAMA_70B, "intermediate_size": 1_001}, 2, "feed-forward size of 1001", id="columns"),
        pytest.param({"n_head": 12, "n_inner": None}, 5, "its 12 attention heads", id="GPT-2"),
        pytest.param({"n_head": 12, "n_inner": None}, 4, None, id="GPT-2 divided"),
        pytest.param({}, 4, None, id="not known"),
        pytest.param({"num_attention_heads": 7}, 1, None, id="one GPU takes everything"),
    ],
)
def test_a_model_is_divided_into_equal_parts(config: dict, size: int, reason: str | None):
    found = indivisible(config, size)
    assert (found is None) if reason is None else (reason in found)
