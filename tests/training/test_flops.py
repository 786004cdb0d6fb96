"""Operations of a model and peaks of devices, by hand."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.models.lora import add_lora
from rlhf_cli.progress import detail, say_once
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.training.flops import ModelSize, device_peak, listed_peak, model_size, peak
from rlhf_cli.verbosity import Verbosity, set_verbosity

LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32
"""Weights of a layer of `tiny_llama`: queries, grouped keys and values, output, feed-forward, norms."""
BODY = 2 * LAYER + 32


@pytest.fixture
def llama(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def test_operations_are_those_of_palm():
    size = ModelSize(frozen=1000, trained=100, layers=2, width=8)
    # 2 N T + 4 L d T^2, for 3 and for 5 tokens
    assert size.forward([3, 5]) == 2 * 1100 * 8 + 4 * 2 * 8 * (9 + 25)
    # 6 N T + 12 L d T^2; frozen weights have no gradient of their own: 4 N
    assert size.training([3, 5]) == (4 * 1000 + 6 * 100) * 8 + 12 * 2 * 8 * (9 + 25)


def test_all_weights_are_trained(llama):
    vocabulary = llama.get_input_embeddings().weight.numel()
    everything = list(llama.parameters())
    assert model_size(llama, everything) == ModelSize(0, BODY + vocabulary, 2, 32), "tied: there once"
    assert model_size(llama, everything, has_vocabulary=False) == ModelSize(0, BODY, 2, 32)
    assert model_size(llama) == ModelSize(BODY + vocabulary, 0, 2, 32)


def test_under_an_adapter_the_base_is_frozen_and_other_adapters_do_not_count(llama):
    vocabulary = llama.get_input_embeddings().weight.numel()
    add_lora(llama, LoraSettings(rank=8), name="other")
    own = add_lora(llama, LoraSettings(rank=4), name="own")
    assert model_size(llama, own) == ModelSize(BODY + vocabulary, sum(weight.numel() for weight in own), 2, 32)


@pytest.mark.parametrize("change", [{"num_local_experts": 8}, {"is_encoder_decoder": True}])
def test_unknown_operations_are_none(llama, change):
    llama.config.update(change)
    assert model_size(llama) is None


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756e12),
        ("NVIDIA H200", torch.float32, False, 67e12),
        ("NVIDIA H200", torch.float32, True, 494e12),
        ("NVIDIA L4", torch.bfloat16, False, 121e12),
        ("NVIDIA L40S", torch.bfloat16, False, 362e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, False, 165.2e12),
    ],
)
def test_peaks_are_those_of_data_sheets(name, precision, tf32, expected):
    found = listed_peak(name, precision, tf32=tf32)
    assert found is not None
    assert found.flops == expected
    assert name in found.source


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA H1000", "Radeon"])
def test_other_devices_have_no_peak(name):
    assert listed_peak(name, torch.bfloat16, tf32=False) is None


def test_a_cpu_is_measured_once_and_draws_no_random_number():
    state = torch.get_rng_state()
    first = peak(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    began = time.process_time()
    assert peak(torch.device("cpu"), torch.float32) is first
    assert time.process_time() - began < 0.1
    assert first is not None
    assert 1e8 < first.flops < 1e15
    assert "measured" in first.source


def test_that_there_is_no_peak_is_said_once_and_what_it_is_a_detail(capsys):
    say_once.cache_clear()
    detail.cache_clear()
    for _ in range(2):
        assert device_peak(torch.device("meta"), torch.float32, ProcessGroup()) is None
        assert device_peak(torch.device("cpu"), torch.float32, ProcessGroup())
    (omitted,) = capsys.readouterr().err.splitlines()
    assert omitted == "`throughput/mfu` is omitted: the peak of the device `meta` is not known"
    set_verbosity(Verbosity.VERBOSE)
    try:
        detail.cache_clear()
        assert device_peak(torch.device("cpu"), torch.float32, ProcessGroup())
    finally:
        set_verbosity(Verbosity.NORMAL)
    assert "measured on this CPU in float32" in capsys.readouterr().err
