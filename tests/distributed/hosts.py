"""Several hosts on this machine: network namespaces with host names of their own, connected by a bridge.

Linux, root and `ip` (iproute2) are needed. All is in namespaces of its own; the network of this machine stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SWITCH = "switch"


@dataclass(frozen=True)
class Host:
    """One of the hosts.

    Attributes:
        name: its host name.
        address: its IP address.
        space: its namespace.
        switch: namespace of the bridge.
        folder: for what its processes write.
    """

    name: str
    address: str
    space: str
    switch: str
    folder: Path

    def start(
        self, command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], label: str
    ) -> subprocess.Popen[bytes]:
        """Start a program on this host; what it writes is in `output(label)`."""
        # `ip netns exec` gives the program a view of the mounts of its own.
        shell = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        own = ["sh", "-c", shell, self.name, str(self.folder / "hosts"), *command]
        inside = ["ip", "netns", "exec", self.space, "unshare", "--uts", *own]
        with self._log(label).open("wb") as log:
            return subprocess.Popen(
                inside,
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def output(self, label: str) -> str:
        """Return what a program has written so far."""
        return self._log(label).read_text(errors="replace")

    def _log(self, label: str) -> Path:
        return self.folder / f"{self.name}-{label}.txt"

    def kill(self) -> None:
        """End all processes of this host at once, with SIGKILL."""
        for pid in _ip("netns", "pids", self.space).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def unplug(self) -> None:
        """Cut its cable: nothing that it sends arrives, and nothing that is sent to it."""
        _ip("-n", self.switch, "link", "set", self.name, "down")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


def why_not() -> str | None:
    """Return why there cannot be such hosts here; None if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "`ip` (iproute2) or `unshare` (util-linux) is not installed"
    try:
        with hosts("probe") as found:
            probe = found[0].start(["true"], cwd=Path(), environment=os.environ, label="probe")
            return None if probe.wait(timeout=60) == 0 else f"no hosts here: {found[0].output('probe').strip()}"
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


@contextlib.contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Connect hosts with these names; at the end, kill their processes and remove them."""
    switch = f"rlhf{os.getpid()}-{_SWITCH}"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        _add_space(switch, undo)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        found = []
        for number, name in enumerate(names, 1):
            host = Host(name, f"10.213.0.{number}", f"rlhf{os.getpid()}-{name}", switch, Path(folder))
            _add_space(host.space, undo)
            _ip("-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", host.space)
            _ip("-n", switch, "link", "set", name, "master", "bridge", "up")
            _ip("-n", host.space, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.space, "link", "set", device, "up")
            undo.callback(host.kill)
            found.append(host)
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in found)]
        (Path(folder) / "hosts").write_text("".join(f"{line}\n" for line in lines))
        yield found


def _add_space(name: str, undo: contextlib.ExitStack) -> None:
    _ip("netns", "add", name)
    undo.callback(_ip, "netns", "delete", name)
