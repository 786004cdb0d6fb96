"""Settings of accelerate's launcher: obeyed, or refused by name before anything is loaded. Imports no torch.

`accelerate launch` hands its settings to the processes that it starts in environment variables, which accelerate's own
`Accelerator` reads. Only some stages use it, so a setting would hold for a part of a run, or for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UsageError

USE_CPU = "ACCELERATE_USE_CPU"
"""Variable that `accelerate launch --cpu` sets; `model.device: auto` then is the CPU."""

_OFF = ("", "0", "false", "f", "no", "n", "off", "none")
_SHARING = "the recipe's settings decide how the processes share models and work (`model.sharding`)"
_PRECISION = "`model.precision` sets the precision"
_COMPILED = "models are not compiled"
_STEPS = "`batch_size` and `micro_batch_size` of a stage set how many passes make a step"
_CLIPPING = "`max_grad_norm` of a stage limits the gradient"
_DEVICE = "`model.device` sets the device"

# Variable -> (the values that ask for nothing, what decides instead).
_VARIABLES = {
    "ACCELERATE_USE_DEEPSPEED": (_OFF, _SHARING),
    "ACCELERATE_USE_FSDP": (_OFF, _SHARING),
    "ACCELERATE_USE_MEGATRON_LM": (_OFF, _SHARING),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_OFF, _SHARING),
    "ACCELERATE_USE_SAGEMAKER": (_OFF, _SHARING),
    "ACCELERATE_MIXED_PRECISION": (_OFF, _PRECISION),
    "ACCELERATE_DYNAMO_BACKEND": (_OFF, _COMPILED),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("", "1"), _STEPS),
    "ACCELERATE_GRADIENT_CLIPPING": (_OFF, _CLIPPING),
    "ACCELERATE_TORCH_DEVICE": (_OFF, _DEVICE),
}
# Details of these; accelerate sets them only together with what they belong to.
_FAMILIES = {
    "FSDP_": _SHARING,
    "ACCELERATE_DEEPSPEED_": _SHARING,
    "ACCELERATE_CONFIG_DS_": _SHARING,
    "MEGATRON_LM_": _SHARING,
    "PARALLELISM_CONFIG_": _SHARING,
    "ACCELERATE_FP8_": _PRECISION,
}
_SUPPORTED_TYPES = ("NO", "MULTI_GPU")
# Entry of a configuration -> what decides instead. Those of these that are mappings are empty where they are not used.
_ENTRIES = {
    "fsdp_config": _SHARING,
    "deepspeed_config": _SHARING,
    "megatron_lm_config": _SHARING,
    "parallelism_config": _SHARING,
    "fp8_config": _PRECISION,
    "mixed_precision": f"{_PRECISION}: `--set model.precision=bfloat16`",
    "gradient_accumulation_steps": _STEPS,
    "gradient_clipping": _CLIPPING,
}
_NO_ACCUMULATION = "gradient_accumulation_steps"
"""Of these entries the one whose 1 asks for nothing."""
_MAX_CONFIG_BYTES = 1 << 20


def check_accelerate_environment(environment: Mapping[str, str]) -> None:
    """Raise `UsageError` for the first variable of accelerate that asks for something without effect here."""
    known = {name: given for name, given in _VARIABLES.items() if name in environment}
    for prefix, decides in _FAMILIES.items():
        known |= {name: (("",), decides) for name in sorted(environment) if name.startswith(prefix)}
    for name, (off, decides) in known.items():
        if environment[name].strip().lower() not in off:
            raise UsageError(
                f"the environment sets {name}={environment[name]}, which has no effect: {decides}",
                hint=f"unset {name}, or change it in the configuration or the options of accelerate's launcher",
            )


def wants_cpu(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher was told to use the CPU alone."""
    return environment.get(USE_CPU, "").strip().lower() not in _OFF


def check_accelerate_config(config: Path) -> None:
    """Raise `UsageError` if a file of `accelerate config` cannot be read or asks for what is not supported."""
    found = _read_config(config)
    kind = str(found.get("distributed_type", "NO"))
    count = found.get("num_processes", 1)
    if kind == "MULTI_CPU" or (count != 1 and (kind == "NO" or found.get("use_cpu"))):
        raise UsageError(
            f"{config}: with `distributed_type: {kind}`, accelerate silently starts one process, not {count}",
            hint="use `--processes N` on one machine, or torchrun on several",
        )
    if kind not in _SUPPORTED_TYPES:
        raise UsageError(
            f"{config}: `distributed_type` must be {' or '.join(_SUPPORTED_TYPES)}, got `{kind}`: {_SHARING}",
            hint="run `accelerate config` again and choose multi-GPU",
        )
    where = str(found.get("compute_environment", "LOCAL_MACHINE"))
    if where != "LOCAL_MACHINE":
        raise UsageError(f"{config}: `compute_environment` must be LOCAL_MACHINE, got `{where}`")
    for name, decides in _ENTRIES.items():
        value = found.get(name)
        if value and str(value).lower() not in ("no", "none") and not (value == 1 and name == _NO_ACCUMULATION):
            shown = name if isinstance(value, dict) else f"{name}: {value}"
            raise UsageError(
                f"{config}: `{shown}` has no effect here: {decides}",
                hint=f"remove `{name}` from {config}" if name != "mixed_precision" else f"set it to 'no' in {config}",
            )
    dynamo = found.get("dynamo_config") or {}
    backend = str(dynamo.get("dynamo_backend", "no")) if isinstance(dynamo, dict) else str(dynamo)
    if backend.lower() not in ("no", "false"):
        raise UsageError(
            f"{config}: `dynamo_backend: {backend}` has no effect here: {_COMPILED}",
            hint=f"remove `dynamo_config` from {config}",
        )


def _read_config(config: Path) -> dict[str, Any]:
    """Read a configuration with PyYAML, as accelerate does, so that both see the same values."""
    import yaml

    try:
        with config.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{config}: no such file", hint="`accelerate config` writes one") from None
    except OSError as error:
        raise UsageError(f"{config}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    if len(content) > _MAX_CONFIG_BYTES:
        raise UsageError(f"{config}: larger than 1 MiB; a configuration of accelerate has a few lines")
    try:
        value = yaml.safe_load(content.decode("utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise UsageError(f"{config}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a character, a depth or a date that YAML refuses
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise UsageError(f"{config}: not valid YAML: {reason}") from None
    if not isinstance(value, dict):
        raise UsageError(
            f"{config}: a configuration of accelerate must be a mapping, got {type(value).__name__}",
            hint="`accelerate config` writes one",
        )
    # YAML 1.1 reads a bare `no` as false.
    for name, no in (("distributed_type", "NO"), ("mixed_precision", "no")):
        if value.get(name) is False:
            value[name] = no
    return value
