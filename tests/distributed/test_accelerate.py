"""Every configuration of accelerate's launcher runs as it says, or is refused by name before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import launch as accelerate

from rlhf_cli.distributed.accelerate_settings import check_accelerate_config, check_accelerate_environment
from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.models.device import resolve_device
from rlhf_cli.stages.registry import REGISTRY

pytestmark = pytest.mark.slow  # accelerate looks for devices, for which it may start programs

# Set by accelerate for every launch, and obeyed by accelerate, torch or rlhf, or meant for no process of a run.
OBEYED = {
    "ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
    "MASTER_ADDR", "MASTER_PORT", "KMP_AFFINITY", "KMP_BLOCKTIME", "PYTHONPATH",
}  # fmt: skip
# How models are compiled, which accelerate sets to its defaults where nothing is compiled.
DETAILS = {
    "ACCELERATE_DYNAMO_MODE", "ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
}  # fmt: skip
TWO = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "machine_rank": 0}
MULTI_GPU = TWO | {"distributed_type": "MULTI_GPU"}
FSDP_1 = {
    "fsdp_version": 1, "fsdp_sharding_strategy": "FULL_SHARD", "fsdp_offload_params": True,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_state_dict_type": "SHARDED_STATE_DICT",
}  # fmt: skip
FSDP_2 = {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_cpu_ram_efficient_loading": True}
DEEPSPEED_2 = {
    "zero_stage": 2, "gradient_accumulation_steps": 4, "gradient_clipping": 1.0, "offload_optimizer_device": "cpu",
}  # fmt: skip
DEEPSPEED_3 = {"zero_stage": 3, "zero3_init_flag": True, "offload_param_device": "cpu"}
PARALLEL = {"parallelism_config_tp_size": 2, "parallelism_config_cp_size": 1, "parallelism_config_sp_size": 1}
SHARING = "the recipe's settings decide how the processes share models and work"
# Configuration, the variable that refuses it, what decides instead. A variable of None: it runs.
TABLE = {
    "one process": (TWO | {"distributed_type": "NO", "num_processes": 1}, None, ""),
    "one process on the CPU": (TWO | {"distributed_type": "NO", "num_processes": 1, "use_cpu": True}, None, ""),
    "MULTI_GPU": (MULTI_GPU | {"enable_cpu_affinity": True, "debug": True, "gpu_ids": "0,1"}, None, ""),
    "FSDP1": (TWO | {"distributed_type": "FSDP", "fsdp_config": FSDP_1}, "ACCELERATE_USE_FSDP", SHARING),
    "FSDP2": (TWO | {"distributed_type": "FSDP", "fsdp_config": FSDP_2}, "ACCELERATE_USE_FSDP", SHARING),
    "DeepSpeed 2": (
        TWO | {"distributed_type": "DEEPSPEED", "deepspeed_config": DEEPSPEED_2},
        "ACCELERATE_USE_DEEPSPEED",
        SHARING,
    ),
    "DeepSpeed 3": (
        TWO | {"distributed_type": "DEEPSPEED", "deepspeed_config": DEEPSPEED_3},
        "ACCELERATE_USE_DEEPSPEED",
        SHARING,
    ),
    "Megatron": (
        TWO | {"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 2}},
        "ACCELERATE_USE_MEGATRON_LM",
        SHARING,
    ),
    "tensor parallel": (MULTI_GPU | {"parallelism_config": PARALLEL}, "ACCELERATE_USE_PARALLELISM_CONFIG", SHARING),
    "bf16": (MULTI_GPU | {"mixed_precision": "bf16"}, "ACCELERATE_MIXED_PRECISION", "`model.precision` sets"),
    "fp16": (MULTI_GPU | {"mixed_precision": "fp16"}, "ACCELERATE_MIXED_PRECISION", "`model.precision` sets"),
    "compiled": (
        MULTI_GPU | {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default"}},
        "ACCELERATE_DYNAMO_BACKEND",
        "models are not compiled",
    ),
}  # fmt: skip
REFUSED = [name for name, (_, variable, _) in TABLE.items() if variable is not None]
COMMANDS = ["run", *REGISTRY]
ALONE = [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "`batch_size` and `micro_batch_size`"),
    ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "`max_grad_norm`"),
    ("ACCELERATE_TORCH_DEVICE", "cpu", "`model.device`"),
    ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", SHARING),
    ("FSDP_OFFLOAD_PARAMS", "true", SHARING),
    ("MEGATRON_LM_TP_DEGREE", "2", SHARING),
    ("PARALLELISM_CONFIG_CP_SIZE", "2", SHARING),
]


def variables(configuration: dict, folder: Path) -> dict[str, str]:
    """Return what `accelerate launch` adds to the environment of the processes that it starts."""
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump({"mixed_precision": "no", "use_cpu": False, **configuration}))
    with mock.patch.dict(os.environ, {"PATH": os.environ["PATH"]}, clear=True):
        arguments, *_ = _validate_launch_command(
            launch_command_parser().parse_args(["--config_file", str(file), "--main_process_port", "0", "script.py"])
        )
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = "zero_stage"
            found = accelerate.prepare_deepspeed_cmd_env(arguments)[1]
        elif arguments.multi_gpu or arguments.use_fsdp or arguments.use_megatron_lm:
            found = accelerate.prepare_multi_gpu_env(arguments)
        else:
            found = accelerate.prepare_simple_launcher_cmd_env(arguments)[1]
        return {name: value for name, value in found.items() if os.environ.get(name) != value}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_obeyed_is_refused_by_name_in_every_command(name, command, toy):
    configuration, variable, decides = TABLE[name]
    refused = toy.rlhf(command, "recipe.yaml", **variables(configuration, toy.folder))
    assert refused.code == 2, refused.stderr
    assert f"error: the environment sets {variable}=" in refused.stderr
    assert f"which has no effect: {decides}" in refused.stderr
    assert f"hint: unset {variable}, or change it in the configuration or the options" in refused.stderr
    assert toy.ran() == []


@pytest.mark.parametrize("name", TABLE)
def test_every_variable_that_accelerate_sets_is_obeyed_or_refused(name, tmp_path):
    """So a variable that a later version of accelerate adds is not ignored in silence."""
    for variable, value in variables(TABLE[name][0], tmp_path).items():
        if variable not in OBEYED | DETAILS and value.lower() not in ("no", "none"):
            with pytest.raises(UsageError, match=f"sets {variable}="):
                check_accelerate_environment({variable: value})


@pytest.mark.parametrize(("name", "value", "decides"), ALONE)
def test_a_setting_is_refused_without_the_switch_it_belongs_to_too(name, value, decides, toy):
    refused = toy.run(**{name: value})
    assert (refused.code, toy.ran()) == (2, [])
    assert f"sets {name}={value}, which has no effect: " in refused.stderr
    assert decides in refused.stderr


@pytest.mark.parametrize("name", [name for name in TABLE if name not in REFUSED])
def test_what_is_obeyed_runs(name, toy):
    found = variables(TABLE[name][0], toy.folder)
    known = {key: value for key, value in found.items() if not key.startswith("MASTER_")}
    assert toy.run("--to", "sft", **known).code == 0
    assert toy.ran() == ["sft nothing"]


@pytest.mark.parametrize("name", TABLE)
def test_a_file_is_refused_where_its_launch_would_be(name, tmp_path):
    configuration, variable, _ = TABLE[name]
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(configuration))
    if variable is None:
        check_accelerate_config(file)
    else:
        with pytest.raises(UsageError):
            check_accelerate_config(file)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("fsdp_config: {fsdp_version: 2}", "`fsdp_config` has no effect here: the recipe's settings decide"),
        ("gradient_accumulation_steps: 4", "`gradient_accumulation_steps: 4` has no effect here: `batch_size`"),
        ("gradient_clipping: 0.5", "`gradient_clipping: 0.5` has no effect here: `max_grad_norm`"),
        ("fp8_config: {backend: TE}", "`fp8_config` has no effect here: `model.precision`"),
    ],
)
def test_an_entry_that_the_kind_of_launch_does_not_use_is_refused(entry, said, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(f"distributed_type: MULTI_GPU\nnum_processes: 2\n{entry}\n")
    with pytest.raises(UsageError, match=said):
        check_accelerate_config(file)


def test_a_launch_on_the_cpu_is_obeyed_on_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ModelError, match="accelerate's launcher was told to use the CPU"):
        resolve_device("cuda")
