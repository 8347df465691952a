"""Packages that only some data need."""

from importlib import import_module
from typing import Any


class MissingPackageError(ModuleNotFoundError):
    """A package that is optional is not installed; the message says how to install it."""


def require(name: str, what: str) -> Any:
    """Import the package ``name``, which ``what`` needs.

    Raises ``MissingPackageError`` with the command that installs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingPackageError(
            f'{what} needs the package {name!r}: pip install {name}, or pip install "lightning-lss[hf]".', name=name
        ) from error
