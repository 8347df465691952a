"""Figures of devices and of the links between them; ``conf/hardware`` gives every figure with its source."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from lightning_lss.attention.kernels import KERNELS

_KINDS = {"64": "float64", "32": "float32", "bf16": "bfloat16", "16": "float16"}


@dataclass(frozen=True)
class Link:
    """A connection between devices."""

    bandwidth: float  # bytes a second in one direction
    latency: float  # seconds a message, whatever its size


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes of equal devices.

    Args:
        name: name in tables and pictures.
        memory: bytes of a device.
        bandwidth: bytes a second between a device and its memory.
        peak: floating-point operations a second by dtype, such as ``{"bfloat16": 989e12}``.
        inside: the link between two devices of a node.
        between: the link between two *nodes*; the devices of a node share it.
        devices_per_node: number of devices in a node.
        matmul: fraction of the peak that the matrix multiplications of a transformer reach.
        attention: fraction of the peak that attention reaches. It counts 4 operations forward and 8 backward for each
            visible query-key pair and channel, and none of what a kernel recomputes.
        overlap: fraction of a collective's time that can pass while the device computes.
        launch: seconds a kernel, whatever its size.
        usable: fraction of the memory left for tensors by the context, fragmentation and the communication library.
        precision: Lightning's name of the usual precision of training.
        kernel: the attention kernel of this hardware, a name in :data:`lightning_lss.attention.kernels.KERNELS`.
        source: origin of the figures.
    """

    name: str
    memory: float
    bandwidth: float
    peak: dict[str, float]
    inside: Link
    between: Link
    devices_per_node: int
    matmul: float
    attention: float
    overlap: float = 1.0
    launch: float = 0.0
    usable: float = 1.0
    precision: str = "32-true"
    kernel: str = "cuda_flash"
    source: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("inside", "between"):  # a configuration file gives mappings
            link = getattr(self, name)
            if not isinstance(link, Link):
                object.__setattr__(self, name, Link(**link))
        if self.kernel not in KERNELS:
            known = ", ".join(map(repr, KERNELS))
            raise ValueError(f"hardware {self.name}: kernel={self.kernel!r} is unknown: choose one of {known}.")
        for name in ("memory", "bandwidth", "devices_per_node", "matmul", "attention"):
            if getattr(self, name) <= 0:
                raise ValueError(f"hardware {self.name}: {name}={getattr(self, name)} must be positive.")

    def peak_of(self, precision: str) -> float:
        """Return the operations a second in ``precision``, Lightning's name; raise ``ValueError`` if there is no
        figure."""
        kind = _KINDS[precision.partition("-")[0]]
        if kind not in self.peak:
            known = ", ".join(self.peak)
            raise ValueError(f"hardware {self.name} has no peak for {kind} (precision={precision}): it has {known}.")
        return self.peak[kind]

    @property
    def usable_memory(self) -> float:
        """Bytes of a device that tensors can occupy."""
        return self.memory * self.usable


def load_hardware(path: str | Path) -> Hardware:
    """Read a file such as those in ``conf/hardware``; raise ``ValueError`` if it does not exist."""
    from omegaconf import OmegaConf

    if not Path(path).is_file():
        raise ValueError(f"{str(path)!r} is not a file: give the path of one such as conf/hardware/h100.yaml.")
    figures = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert isinstance(figures, dict)
    return Hardware(**{str(key): value for key, value in figures.items() if key != "_target_"})


_UNITS = {"B": 1}
_UNITS |= {f"{k}{b}": base**n for b, base in (("B", 1000), ("iB", 1024)) for n, k in enumerate("KMGT", 1)}


def bytes_of(size: str | float) -> float:
    """Convert a size such as ``80e9``, ``"80GB"`` or ``"24 GiB"`` to bytes; raise ``ValueError`` for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or (match[2] or "B") not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"memory={size!r} is not a size: give bytes, or a number with one of {', '.join(_UNITS)}.")
    return float(match[1]) * _UNITS[match[2] or "B"]
