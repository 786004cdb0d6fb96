"""What GPUs can do, by their data sheets, and machines that have them. Imports no torch.

Sources: NVIDIA's data sheets of each product. Operations are without sparsity, bfloat16 with float32 accumulation.
Memory is in decimal gigabytes, as it is sold. The link is one direction of what a GPU exchanges with the others of its
machine: NVLink with a switch where the product has it, else PCI Express, also where a bridge joins two or four GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.errors import UsageError

_GB = 1e9
_PER_NODE = 8
"""GPUs of a machine, unless the number of machines is given."""


@dataclass(frozen=True)
class GPU:
    """A product.

    Attributes:
        bfloat16: operations per second.
        tf32: the same.
        float32: the same.
        memory: gigabytes.
        bandwidth: gigabytes per second between the GPU and its memory.
        link: gigabytes per second to other GPUs of its machine, in one direction.
    """

    bfloat16: float
    tf32: float
    float32: float
    memory: float
    bandwidth: float
    link: float


GPUS: dict[str, GPU] = {
    # Part of the device's name -> data sheet. The first that fits counts: longer names come first.
    "B200": GPU(2250e12, 1125e12, 75e12, 180, 8000, 900),
    "GH200": GPU(989e12, 494e12, 67e12, 96, 4000, 450),
    "H200 NVL": GPU(835e12, 417e12, 60e12, 141, 4800, 64),
    "H200": GPU(989e12, 494e12, 67e12, 141, 4800, 450),
    "H100 NVL": GPU(835e12, 417e12, 60e12, 94, 3900, 64),
    "H100 PCIe": GPU(756e12, 378e12, 51e12, 80, 2000, 64),
    "H100": GPU(989e12, 494e12, 67e12, 80, 3350, 450),
    "A100 40GB": GPU(312e12, 156e12, 19.5e12, 40, 1555, 300),
    "A100": GPU(312e12, 156e12, 19.5e12, 80, 2039, 300),
    "A800": GPU(312e12, 156e12, 19.5e12, 80, 2039, 200),
    "L40S": GPU(362e12, 183e12, 91.6e12, 48, 864, 32),
    "L4": GPU(121e12, 60e12, 30.3e12, 24, 300, 32),
    "A40": GPU(149.7e12, 74.8e12, 37.4e12, 48, 696, 32),
    "A30": GPU(165e12, 82e12, 10.3e12, 24, 933, 32),
    "A10": GPU(125e12, 62.5e12, 31.2e12, 24, 600, 32),
    "RTX A6000": GPU(154.8e12, 77.4e12, 38.7e12, 48, 768, 32),
    "RTX 4090": GPU(165.2e12, 82.6e12, 82.6e12, 24, 1008, 32),
    "RTX 3090": GPU(71e12, 35.6e12, 35.6e12, 24, 936, 32),
}


def find_gpu(name: str) -> tuple[str, GPU] | None:
    """Return the product that torch or a user calls `name`, with its name here; None for one that is not listed."""
    words = f" {name} ".replace("-", " ").casefold()
    return next(((part, gpu) for part, gpu in GPUS.items() if f" {part} ".casefold() in words), None)


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs, with a process on each.

    Attributes:
        name: of the product, or the memory of a GPU.
        memory: bytes of a GPU.
        gpu: what it can do; None where its memory alone is known.
        count: GPUs of all nodes.
        nodes: machines.
        network: bytes per second between nodes, for each GPU in one direction.
    """

    name: str
    memory: float
    gpu: GPU | None
    count: int = 1
    nodes: int = 1
    network: float = 50e9

    @staticmethod
    def of(name: str, count: int = 1, nodes: int | None = None, gigabits: float = 400.0) -> Cluster:
        """Return GPUs as a command line describes them.

        Args:
            name: of a product, such as "h100", or gigabytes of memory.
            count: GPUs of all nodes.
            nodes: machines; None puts up to eight GPUs in each.
            gigabits: per second between nodes, for each GPU.

        Raises:
            UsageError: no such product, or a number of GPUs that the nodes cannot share.
        """
        nodes = nodes or -(-count // _PER_NODE)
        if count % nodes:
            raise UsageError(
                f"{count} GPUs cannot be divided among {nodes} nodes equally",
                hint=f"give `--gpus` as a multiple of {nodes}, or another number of `--nodes`",
            )
        network = gigabits / 8 * _GB
        if (found := find_gpu(name)) is not None:
            return Cluster(found[0], found[1].memory * _GB, found[1], count, nodes, network)
        try:
            memory = float(name)
        except ValueError:
            memory = 0.0
        if not 0.0 < memory < float("inf"):
            known = ", ".join(part.lower().replace(" ", "-") for part in GPUS)
            raise UsageError(f"unknown GPU `{name}`", hint=f"give one of {known}, or gigabytes of memory, such as 48")
        return Cluster(f"GPU with {memory:g} GB", memory * _GB, None, count, nodes, network)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a collective in a ring through all GPUs: of the link, or of the nodes' networks.

        Each node sends with the networks of all its GPUs at once, and receives what one GPU of the ring passes on.
        """
        return self.ring(self.count)

    def ring(self, count: int) -> float:
        """Bytes per second of a collective in a ring through `count` GPUs, those of a node first."""
        assert self.gpu is not None
        link, of_node = self.gpu.link * _GB, self.count // self.nodes
        return link if count <= of_node else min(link, self.network * of_node)

    @property
    def between(self) -> float:
        """Bytes per second from one GPU to another, of another node if there are several."""
        assert self.gpu is not None
        link = self.gpu.link * _GB
        return link if self.nodes == 1 else min(link, self.network)

    def __str__(self) -> str:
        nodes = "" if self.nodes == 1 else f" on {self.nodes} nodes, {self.network * 8 / _GB:g} Gbit/s per GPU between"
        return f"{self.count} x {self.name}{nodes}"
