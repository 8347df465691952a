"""A ledger of the bytes that a rank holds, tensor by tensor, and of the moment at which they are most."""

from __future__ import annotations

_WORK = ("activations", "kv_buffers", "logits")
PARTS = ("parameters", "gradients", "optimizer", *_WORK)


class Ledger:
    """Tensors come and go by name; the ledger remembers what was held when that was most, and how much was ever written."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[str, float]] = {}
        self.now = dict.fromkeys(PARTS, 0.0)
        self.peak = dict(self.now)  # at the moment at which all parts together are most
        self.most = dict(self.now)  # of each part, at a moment of its own
        self.moment = ""
        self.most_work = 0.0  # the most, at a moment of its own, beside parameters, gradients and optimizer state
        self.written = 0.0

    def hold(self, name: str, size: float, part: str = "activations") -> None:
        """A tensor of ``size`` bytes comes to be."""
        assert name not in self.held, name
        self.held[name] = (part, size)
        self.now[part] += size
        self.written += size
        self.most[part] = max(self.most[part], self.now[part])
        self.most_work = max(self.most_work, sum(self.now[part] for part in _WORK))
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak, self.moment = dict(self.now), name

    def free(self, *names: str) -> None:
        """Tensors are let go; those that are not held are passed over."""
        for name in names:
            part, size = self.held.pop(name, ("activations", 0.0))
            self.now[part] -= size

    def brief(self, name: str, size: float, part: str = "activations") -> None:
        """A tensor that exists for a moment only."""
        self.hold(name, size, part)
        self.free(name)

    def rename(self, name: str, to: str) -> None:
        """A tensor goes by another name."""
        self.held[to] = self.held.pop(name)
