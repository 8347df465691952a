"""The numbers that people and callbacks see of a step are those of the whole sequence.

A rank computes the loss of its segment. What it logs, a plateau scheduler, a progress bar, a monitor and the learning-rate
finder would take for the loss; so the loss that a step returns, and the numbers that it logs, are averaged over the ranks
at its end, in one small collective.
"""

import hashlib
import inspect
import numbers
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from copy import copy
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.connectors.logger_connector.result import _get_default_dtype
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

_ROWS = 42
"""The loss and 41 logged values, with three numbers each: 1 KiB in float64."""

_SIGNATURE = inspect.signature(pl.LightningModule.log)
_IS_SUM = {"mean": False, "avg": False, torch.mean: False, "sum": True, torch.sum: True}


class _Entry(NamedTuple):
    """A number of a step, and how to log it."""

    key: str
    """Equal on all ranks, or else it stays what it is on each."""
    value: Tensor
    is_sum: bool
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})
    """As they were given to ``log``, whose signature a user may have changed."""

    def log(self, log: Callable[..., Any], value: Tensor) -> None:
        """Log another value in place of the own one."""
        if len(self.args) > 1:
            log(self.args[0], value, *self.args[2:], **self.kwargs)
        else:
            log(*self.args, **{**self.kwargs, "value": value})


class LoggedValues:
    """Collect what the steps of a module log, and log the values of the whole instead.

    Collected are numbers and tensors of one element that ``log`` and ``log_dict`` are to average (the default) or sum.
    Others are logged at once: metrics, which synchronize themselves, ``sync_dist=True``, ``rank_zero_only=True``, other
    reductions.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._log: Callable[..., Any] | None = None
        self._module: pl.LightningModule | None = None
        self._step, self._copies = "", 1
        self._same: Tensor | None = None

    @contextmanager
    def collect(self, module: pl.LightningModule, step: str, copies: int = 1) -> Generator[None, None, None]:
        """Collect what is logged in ``step``; :meth:`show` must follow. ``copies`` ranks log the same values."""
        before, self._copies = vars(module).get("log"), copies
        self._entries, self._log, self._module, self._step = [], module.log, module, step
        vars(module)["log"] = self._collect
        try:
            yield
        finally:
            del vars(module)["log"]
            if before is not None:
                vars(module)["log"] = before
            self._module = None

    @torch.compiler.disable
    def _collect(self, *args: Any, **kwargs: Any) -> None:
        """Stand in for ``LightningModule.log``."""
        assert self._module is not None
        assert self._log is not None
        entry = self._entry(*args, **kwargs) if self._module._current_fx_name == self._step else None
        if entry is None:
            self._log(*args, **kwargs)
        elif entry.kwargs.get("sync_dist"):  # Lightning adds up all ranks
            entry.log(self._log, entry.value / self._copies)
        else:
            self._entries.append(entry)

    def _entry(self, *args: Any, **kwargs: Any) -> _Entry | None:
        try:
            bound = _SIGNATURE.bind(None, *args, **kwargs)
        except TypeError:  # a user's own ``log`` may take other arguments
            return None
        bound.apply_defaults()
        name, value, reduce_fx = (bound.arguments[x] for x in ("name", "value", "reduce_fx"))
        alone = bound.arguments["rank_zero_only"] or reduce_fx not in _IS_SUM
        is_counted_again = self._copies > 1 and reduce_fx in _IS_SUM and _IS_SUM[reduce_fx]
        if alone or not _is_number(value) or (bound.arguments["sync_dist"] and not is_counted_again):
            return None
        if len(self._entries) == _ROWS - 1:
            rank_zero_warn(
                f"A step logs more than {_ROWS - 1} values. Those after {name!r} are of one segment: use sync_dist=True."
            )
        if len(self._entries) >= _ROWS - 1:
            return None
        if not (isinstance(value, Tensor) and value.is_floating_point()):  # as Lightning converts it
            value = torch.as_tensor(value, dtype=_get_default_dtype())
        return _Entry(f"{name} {_IS_SUM[reduce_fx]}", value.detach().clone(), _IS_SUM[reduce_fx], args, kwargs)

    def show(self, output: Any, group: dist.ProcessGroup, device: torch.device) -> Any:
        """Log what was collected, with the values of all ranks of ``group``, and return the step's ``output`` with its loss
        as theirs; every rank of the group must call it.

        The loss keeps its own gradient. A value stays as it is on ranks that do not agree on what it is, which takes no
        second collective, and no wait for the device.
        """
        loss = output.get("loss") if isinstance(output, Mapping) else output
        has_loss = isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()
        shown = loss.detach() if has_loss else torch.zeros(())  # type: ignore[union-attr]
        entries = [_Entry("loss", shown, False), *self._entries]
        keys = [_hash(entry.key) for entry in entries]
        keys[0] *= has_loss
        rows = torch.zeros(_ROWS, 3, dtype=torch.float64)
        rows[: len(keys), 0] = torch.tensor(keys, dtype=torch.float64)
        rows[:, 1] = rows[:, 0] ** 2
        rows = rows.to(device, non_blocking=True)  # as all copies here: the host never waits for the device
        own = torch.stack([x.value.to(device, torch.float64, non_blocking=True).reshape(()) for x in entries])
        rows[: len(keys), 2] = own
        dist.all_reduce(rows, group=group)
        count = dist.get_world_size(group)
        first, second = rows[:, 0].long(), rows[:, 1].long()
        same = first * first == count * second  # modulo 2^64; the numbers are equal if and only if their variance is 0
        self._same = same.all() if self._same is None else self._same & same.all()
        scale = torch.tensor([1.0 / self._copies if x.is_sum else 1.0 / count for x in entries], dtype=torch.float64)
        scale = scale.to(device, non_blocking=True)
        values = torch.where(same[: len(keys)], rows[: len(keys), 2] * scale, own)
        assert self._log is not None
        for entry, value in zip(entries[1:], values[1:]):
            entry.log(self._log, value.to(entry.value.dtype))
        self._entries, self._log = [], None
        return _with_loss(output, _Shown.apply(loss, values[0])) if has_loss else output

    def warn(self) -> None:
        """Warn at the end of a run if ranks have logged different things."""
        same, self._same = self._same, None
        if same is not None and not same.item():
            rank_zero_warn(
                "Ranks logged different values, or in a different order, in the same step. From the first that differs on, the"
                " values of that step are those of one segment. Log the same names on all ranks, or use rank_zero_only=True."
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, numbers.Real)


def _hash(key: str) -> int:
    """Return a number from 1 to 2^20, so that squares of sums over 4,096 ranks are exact."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % 2**20 + 1


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Tensor):
        return loss
    output = copy(output)
    output["loss"] = loss
    return output


class _Shown(torch.autograd.Function):
    """Give a tensor another value.

    ======== ======================== =========
    forward  x [...], value scalar    -> value [...]
    backward grad [...]               -> grad [...]
    ======== ======================== =========
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.to(x.dtype).reshape(x.shape).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
