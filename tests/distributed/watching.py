"""Run as a script: one process of several that does what its argument says, without torch.

`watching.py FOLDER MODE`, with the environment of a launcher. FOLDER takes the place of torch's store. MODE is what
this process does once all are connected: `wait` as in a collective that never ends, `lose` as in one that fails because
another process has ended, or end in order (`succeed`), with an error (`fail`) or because of a signal (`stop`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rlhf_cli.distributed import peers
from rlhf_cli.distributed.ranks import rank


class FolderStore:
    """What `peers` uses of a store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def set(self, key: str, value: str) -> None:
        part = self._folder / f"{key}.part"
        part.write_text(value)
        part.rename(self._folder / key)

    def get(self, key: str) -> str:
        while not (self._folder / key).exists():
            time.sleep(0.02)
        return (self._folder / key).read_text()


def main() -> int:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    peers.watch(FolderStore(folder))  # type: ignore[arg-type]
    (folder / f"{rank()}.watching").touch()
    if mode == "wait":
        time.sleep(60)
    while not (folder / "go").exists():
        time.sleep(0.02)
    if mode == "lose":
        error = peers.explain()
        print(f"main thread: {error.message}" if error else "main thread: nobody", file=sys.stderr)
        return 1 if error is None else error.exit_code
    code, why = {
        "succeed": (0, ""),
        "fail": (70, "loss was nan in 3 steps in a row"),
        "stop": (143, "stopped by SIGTERM"),
    }[mode]
    peers.say_goodbye(code, why)
    return code


if __name__ == "__main__":
    sys.exit(main())
