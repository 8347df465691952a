"""Functions of masks that read something in every way that there is, each with what changes it."""

import functools
import threading
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import and_masks

from lightning_lss import AttentionMask, lss_attention

LENGTH = 16
Visible = Callable[..., Tensor]
Case = tuple[Visible, Callable[[], Any]]  # a function, and what changes something that it reads


def ids(width: int = 4) -> Tensor:
    return torch.arange(LENGTH) // width


def change(x: Tensor) -> Callable[[], Any]:
    return lambda: x.copy_(ids(2))


def same_id(table: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return table[q] == table[k]


def closure() -> Case:
    table = ids()
    return lambda b, h, q, k: table[q] == table[k], change(table)


def through_data() -> Case:
    table = ids()
    return lambda b, h, q, k: table[q] == table[k], lambda: table.data.copy_(ids(2))


def shared_with_numpy() -> Case:
    array = ids().numpy()
    table = torch.from_numpy(array)
    return lambda b, h, q, k: table[q] == table[k], lambda: array.__setitem__(0, 5)


def inference_tensor() -> Case:
    with torch.inference_mode():
        table = ids()
    return lambda b, h, q, k: table[q] == table[k], torch.inference_mode()(change(table))


def rebound() -> Case:
    table = ids()

    def put_another_in_its_place() -> None:
        nonlocal table
        del table  # the next may get its place in memory, and its id
        table = ids(2)  # noqa: F841

    return lambda b, h, q, k: table[q] == table[k], put_another_in_its_place


def partial() -> Case:
    table = ids()
    return functools.partial(same_id, table), change(table)


def keyword_default() -> Case:
    table = ids()

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, of: Tensor = table) -> Tensor:
        return of[q] == of[k]

    return visible, change(table)


def nested() -> Case:
    table = ids()

    def same(q: Tensor, k: Tensor) -> Tensor:
        return table[q] == table[k]

    return lambda b, h, q, k: same(q, k), change(table)


def wrapped() -> Case:
    table = ids()

    @functools.wraps(same_id)
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return table[q] == k

    return visible, change(table)


def of_flex_attention() -> Case:
    function, changes = closure()
    return and_masks(lambda b, h, q, k: q >= k, function), changes


class Holder:
    least = 1

    def __init__(self) -> None:
        self.table, self.bias, self.lock = ids(), 0, threading.Lock()

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.table[q] == self.table[k]

    @property
    def limit(self) -> int:
        return self.bias + 2

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self(b, h, q, k) & (q >= self.limit)


def called_object() -> Case:
    holder = Holder()
    return holder, change(holder.table)


def bound_method() -> Case:
    holder = Holder()
    return holder.visible, change(holder.table)


def behind_a_property() -> Case:
    holder = Holder()
    return holder.visible, lambda: setattr(holder, "bias", 3)


def attribute_of_a_class() -> Case:
    class Own(Holder):
        pass

    return lambda b, h, q, k: q >= Own.least, lambda: setattr(Own, "least", 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.window, self.norm = 4, nn.BatchNorm1d(3)
        self.register_buffer("table", ids())
        self.scores = nn.Sequential(nn.Embedding.from_pretrained(ids().double()[:, None]), nn.Flatten(0))

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (self.table[q] == self.table[k]) & (q - k < self.window)

    def by_scores(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (self.scores(q) > self.scores(k)).squeeze(-1)


def buffer() -> Case:
    net = Net()
    return net.visible, change(net.table)


def number_of_a_module() -> Case:
    net = Net()
    return net.visible, lambda: setattr(net, "window", 2)


def parameter_of_a_called_module() -> Case:
    net = Net()
    return net.by_scores, lambda: net.scores[0].weight.data.mul_(-1)


def in_a_list() -> Case:
    tables = [ids()]
    return lambda b, h, q, k: tables[0][q] == tables[0][k], lambda: tables.__setitem__(0, ids(2))


def in_a_batch() -> Case:
    batch = {"ids": ids(), "names": ["a"]}
    return lambda b, h, q, k: batch["ids"][q] == batch["ids"][k], lambda: batch.update(ids=ids(2))


def in_a_namespace() -> Case:
    config = SimpleNamespace(window=3, Point=namedtuple("Point", "x")(1), device=torch.device("cpu"))
    return lambda b, h, q, k: q - k < config.window + config.Point.x, lambda: setattr(config, "window", 2)


def in_a_set() -> Case:
    hidden = {"three": 3, "four": 4}
    chosen = {"three", "four", "five"}

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # the set of names is a constant, in another order in every process
        return k != sum(hidden[name] for name in chosen if name in hidden and name in {"three", "four"})

    return visible, lambda: chosen.remove("three")


def in_an_array() -> Case:
    array = np.arange(3)
    return lambda b, h, q, k: q >= int(array[1]), lambda: array.__setitem__(1, 2)


CASES = [
    *(closure, through_data, shared_with_numpy, inference_tensor, rebound, partial, keyword_default, nested, wrapped),
    *(of_flex_attention, called_object, bound_method, behind_a_property, attribute_of_a_class, buffer, in_a_list),
    *(number_of_a_module, parameter_of_a_called_module, in_a_batch, in_a_namespace, in_a_set, in_an_array),
]
QUERIES = torch.randn(1, 1, LENGTH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CHANGED = r"reads something that has changed.* make a new one with AttentionMask.from_function"


def attend(mask: AttentionMask) -> Tensor:
    return lss_attention(QUERIES, QUERIES, QUERIES, mask=mask)
