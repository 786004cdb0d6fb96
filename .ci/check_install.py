"""Check that the pinned set resolves from published packages, and that the built wheel works where nothing else is.

    .venv/bin/python .ci/check_install.py [resolve] [wheel]

`resolve` asks the package registry, by `uv pip compile`, whether `constraints.txt` has a solution for all extras but
those of `APART` and `BESIDE`: with torch as published for GPUs and with its CPU wheel, for each Python of `PYTHONS`.
Every package of a solution must be pinned, and every pin must be in a solution. Only metadata is read. An installed
environment says less: torch's CPU wheel asks for no Triton, so any fits beside it. An extra of `APART` must have a
solution of its own, and one of `BESIDE` one with the pinned set.

`wheel` builds the wheel and installs it into a fresh environment, which sees what the wheel requires and nothing that
only the extras bring, and runs commands from there outside of the checkout.

Where no registry answers, a check is skipped and says so. Exit status: 1 if one failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from itertools import product
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
UV = Path(sys.executable).with_name("uv")
PYTHONS = ("3.11", "3.13")
PLATFORM = "x86_64-manylinux_2_28"
CONSTRAINTS = ROOT / "constraints.txt"
APART = ("vllm",)
"""Extras for an environment of their own: what they require excludes the tested set."""
BESIDE = ("tasks",)
"""Extras that install beside the tested set, which does not pin the many packages that they bring."""


class FailedError(Exception):
    """A check did not hold."""


class UnreachableError(Exception):
    """No registry answered."""


def uv(*arguments: str | Path) -> str:
    """What uv prints.

    Raises:
        UnreachableError: uv could not reach the registry.
        FailedError: it said no.
    """
    done = subprocess.run([UV, *arguments], capture_output=True, text=True, cwd=ROOT)  # noqa: S603
    if done.returncode == 0:
        return done.stdout
    no_answer = ("error sending request", "dns error", "timed out", "network was disabled")
    raise (UnreachableError if any(words in done.stderr for words in no_answer) else FailedError)(done.stderr.strip())


def pins(text: str) -> set[str]:
    """The lines `name==version`, names in their canonical form."""
    found = (re.match(r"([\w.-]+)==(\S+)", line) for line in text.splitlines())
    return {f"{canonicalize_name(line[1])}=={line[2]}" for line in found if line}


def tested_extras() -> list[str]:
    """Extras that the tested set holds for."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["optional-dependencies"]
    return [name for name in declared if name not in (*APART, *BESIDE)]


def resolved(python: str, extras: list[str], *more: str | Path) -> set[str]:
    """The solution for some extras."""
    how = ("--quiet", "--no-header", "--no-annotate", "--python-platform", PLATFORM, "--python-version", python)
    what = [argument for name in extras for argument in ("--extra", name)]
    return pins(uv("pip", "compile", *how, *more, *what, "pyproject.toml"))


def of_the_cpu_wheel(folder: Path) -> tuple[str | Path, ...]:
    """Options that give torch the requirements of its CPU wheel.

    Read from the wheel where that one is installed; elsewhere uv asks PyTorch's own index.
    """
    version = metadata.version("torch")
    if not version.endswith("+cpu"):
        return ("--no-config", "--torch-backend", "cpu")
    rows = {"name": "torch", "version": version.removesuffix("+cpu"), "requires-dist": metadata.requires("torch")}
    lines = [f"{key} = {json.dumps(value)}" for key, value in rows.items()]
    (path := folder / "uv.toml").write_text("\n".join(["[[dependency-metadata]]", *lines]) + "\n")
    return ("--config-file", path)


def check_resolution(folder: Path) -> None:
    """The pinned set has a solution for every Python and both kinds of torch, and is that solution."""
    wanted = pins(CONSTRAINTS.read_text())
    reached: set[str] = set()
    for kind, options in (("GPU", ("--no-config",)), ("CPU", of_the_cpu_wheel(folder))):
        for python in PYTHONS:
            pinned = ("--constraints", CONSTRAINTS, "--only-binary", ":all:", *options)
            found = {pin.replace("+cpu", "") for pin in resolved(python, tested_extras(), *pinned)}
            if free := sorted(found - wanted):
                raise FailedError(f"not pinned (Python {python}, {kind} wheel of torch): {', '.join(free)}")
            brings_cuda = any(pin.startswith("nvidia-") for pin in found)
            if brings_cuda != (kind == "GPU"):
                raise FailedError(f"the {kind} wheel of torch {'brings' if brings_cuda else 'lacks'} CUDA's libraries")
            reached |= found
            triton = next(pin for pin in found if pin.startswith("triton=="))
            print(f"resolves: Python {python}, {kind} wheel of torch: {len(found)} packages, {triton}", flush=True)
    for extra, python in product(APART, PYTHONS):
        found = resolved(python, [extra], "--no-config")
        if torch := {pin for pin in found - wanted if pin.startswith("torch==")}:
            raise FailedError(f"the extra `{extra}` brings another torch than the tested one: {', '.join(torch)}")
        print(f"resolves apart: Python {python}, extra `{extra}`: {len(found)} packages", flush=True)
    for extra, python in product(BESIDE, PYTHONS):
        found = resolved(python, [extra], "--constraints", CONSTRAINTS, "--no-config")
        print(f"resolves beside: Python {python}, extra `{extra}`: {len(found)} packages", flush=True)
    if unused := sorted(wanted - reached):
        raise FailedError(f"pinned in constraints.txt, and nothing asks for it: {', '.join(unused)}")


def required(name: str, extras: frozenset[str] = frozenset()) -> set[tuple[str, frozenset[str]]]:
    """A package and all that it requires on this machine, with the extras asked for."""
    found, left = set(), [(canonicalize_name(name), extras)]
    while left:
        if (item := left.pop()) in found:
            continue
        found.add(item)
        for text in metadata.requires(item[0]) or ():
            requirement = Requirement(text)
            if any(not requirement.marker or requirement.marker.evaluate({"extra": e}) for e in ("", *item[1])):
                left.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def link(name: str, folder: Path) -> None:
    """Let a folder of packages hold one of this environment's."""
    package = metadata.distribution(name)
    tops = {path.parts[0] for path in package.files or () if path.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        if top.endswith(".dist-info"):  # uv follows no links to these
            shutil.copytree(str(package.locate_file(top)), folder / top)
        elif not (folder / top).exists():
            (folder / top).symlink_to(str(package.locate_file(top)))


def check_wheel(folder: Path) -> None:
    """The wheel holds all that its commands need."""
    uv("--no-config", "build", "--quiet", "--wheel", "--python", sys.executable, "--out-dir", folder / "dist", ".")
    (wheel,) = (folder / "dist").glob("*.whl")
    python, home = folder / "fresh" / "bin" / "python", folder / "elsewhere"
    home.mkdir()
    uv("--no-config", "venv", "--quiet", "--python", sys.executable, folder / "fresh")
    uv("--no-config", "pip", "install", "--quiet", "--no-deps", "--python", python, wheel)
    (packages,) = (folder / "fresh" / "lib").glob("python*/site-packages")
    for name in {name for name, _ in required("rlhf-cli")} - {"rlhf-cli"}:
        link(name, packages)
    uv("--no-config", "pip", "check", "--python", python)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def call(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)  # noqa: S603
        if done.returncode != 0:
            words = " ".join(map(str, command))
            raise FailedError(f"{words} ended with status {done.returncode}\n{done.stdout}{done.stderr}".strip())
        return done.stdout

    if not Path(call(python, "-c", "import rlhf_cli; print(rlhf_cli.__file__)").strip()).is_relative_to(packages):
        raise FailedError("the fresh environment imports the checkout, not the wheel")
    rlhf = folder / "fresh" / "bin" / "rlhf"
    for command in (
        ("--help",),
        ("init", "mine"),
        ("recipe", "validate", "mine/recipes/quickstart.yaml"),
        ("quickstart", "--dry-run"),
    ):
        call(rlhf, *command)
        print(f"from {wheel.name}: rlhf {' '.join(command)}", flush=True)


CHECKS = {"resolve": check_resolution, "wheel": check_wheel}


def main() -> int:
    """Run the checks named, or all."""
    has_failed = False
    for name in sys.argv[1:] or CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                CHECKS[name](Path(folder).resolve())
            except UnreachableError as error:
                print(f"SKIPPED {name}: no package registry could be reached\n{error}", file=sys.stderr)
            except FailedError as error:
                print(f"FAILED {name}: {error}", file=sys.stderr)
                has_failed = True
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
