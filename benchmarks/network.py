"""Slow down the links between ranks: every rank is in its own network namespace, behind a link of limited rate.

This needs root and iproute2 (``ip`` and ``tc``). The links are full duplex: a token bucket filter (tbf) limits both of
their ends. They meet in a bridge, as in a switch that is never the bottleneck.
"""

import ctypes
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

_CLONE_NEWNET = 0x40000000
_PREFIX = f"lss{os.getpid() % 100_000}"  # names of interfaces have at most 15 characters
_SUBNET = "10.213.77"


def obstacle() -> str | None:
    """Return why links cannot be limited here, as a sentence, or None."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2."
    if os.geteuid() != 0:
        return "Network namespaces need root."
    probe = _try("ip", "netns", "add", f"{_PREFIX}p")
    _try("ip", "netns", "del", f"{_PREFIX}p")
    return None if probe.returncode == 0 else f"No network namespace can be made here: {probe.stderr.strip()}"


@dataclass(frozen=True)
class Network:
    """Links of ``megabits`` per second to ``size`` ranks; made and removed by a ``with`` statement.

    Raises:
        RuntimeError: on entering, with the message of ``ip`` or ``tc``; all links are removed again.
    """

    size: int
    megabits: int
    prefix: str = _PREFIX

    def __enter__(self) -> "Network":
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def enter(self, rank: int) -> None:
        """Move this process into the namespace of ``rank``: only for a process that still has one thread."""
        with open(f"/run/netns/{self.prefix}n{rank}") as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns into the namespace of rank {rank}")
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"

    def _make(self) -> None:
        bridge = f"{self.prefix}b"
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for rank in range(self.size):
            namespace, link = f"{self.prefix}n{rank}", f"{self.prefix}v{rank}"
            _run("ip", "netns", "add", namespace)
            _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _run("ip", "link", "set", link, "master", bridge, "up")
            _run("ip", "-n", namespace, "addr", "add", f"{_SUBNET}.{rank + 1}/24", "dev", "eth0")
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _run("ip", "-n", namespace, "link", "set", "eth0", "up")
            _run("tc", "qdisc", "add", "dev", link, *self._limit())
            _run("tc", "-n", namespace, "qdisc", "add", "dev", "eth0", *self._limit())

    def _limit(self) -> list[str]:
        bucket = max(2**16, self.megabits * 125_000 // 250)  # bytes; at least what a timer tick at 250 Hz lets through
        return ["root", "tbf", "rate", f"{self.megabits}mbit", "burst", str(bucket), "latency", "50ms"]

    def _remove(self) -> None:
        for rank in range(self.size):
            _try("ip", "link", "del", f"{self.prefix}v{rank}")
            _try("ip", "netns", "del", f"{self.prefix}n{rank}")
        _try("ip", "link", "del", f"{self.prefix}b")


def bytes_received() -> int:
    """Read the bytes that the kernel counted on this rank's link so far, headers included."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[0])
    return 0


def measured_megabits(rank: int, megabits: int) -> float:
    """Measure the real rate from rank 0 to rank 1, in megabits per second, over about a quarter of a second."""
    message = torch.zeros(megabits * 125_000 // 16)
    dist.barrier()
    start = time.perf_counter()
    if rank == 0:
        dist.send(message, 1)
    elif rank == 1:
        dist.recv(message, 0)
    dist.barrier()
    return message.nbytes * 8 / 1e6 / (time.perf_counter() - start)


def _path() -> str:
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def _try(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": _path()})


def _run(*command: str) -> None:
    done = _try(*command)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
