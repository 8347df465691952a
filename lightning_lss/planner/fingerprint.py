"""Hash modules and code, to tell whether two modules, or two versions of one, run the same step."""

import hashlib
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

import lightning_lss
from lightning_lss.nn.positions import DeferredTable

_PLAIN = (bool, int, float, str, tuple, list, torch.dtype, type(None))


def structure(module: nn.Module) -> str:
    """Hash the classes, settings and shapes of a module and all below it."""
    return hashlib.sha256(repr(list(_facts(module))).encode()).hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Hash a module's structure and the source of its classes."""
    names = {type(part).__module__ for part in module.modules()}
    sources = [_source_of(name) for name in sorted(names) if not name.startswith(("torch", "lightning."))]
    return hashlib.sha256("".join([structure(module), *sources]).encode()).hexdigest()


@cache
def code_version() -> str:
    """Hash the versions of torch and Lightning, and the package's own code."""
    digest = hashlib.sha256(f"{torch.__version__} {pl.__version__}".encode())
    for path in sorted(Path(lightning_lss.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _facts(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    for name, part in module.named_modules():
        settings = sorted((key, repr(x)) for key, x in vars(part).items() if isinstance(x, _PLAIN) and key != "seed")
        yield name, type(part).__module__, type(part).__qualname__, settings
    for name, x in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        shape = (x.spec.num_positions, x.spec.dim) if isinstance(x, DeferredTable) else tuple(x.shape)
        yield name, shape, str(x.dtype), x.requires_grad


def _source_of(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):  # the class was typed into an interpreter
        return name
