"""What libraries add so that their modules run under a strategy, without the strategy knowing them."""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

Adapter = Callable[[nn.Module], AbstractContextManager[None]]
"""Within the context that it returns, a module is shown whole sequences that are split."""

ADAPTERS: list[Adapter] = []
"""Those of every run that shows its module whole sequences; a library's integration adds its own."""


class Adapted:
    """Enters the contexts of ``adapters``, and leaves them for a while where a module is to be as its user made it."""

    def __init__(self, adapters: Iterable[Adapter], module: nn.Module | None = None) -> None:
        self._adapters, self._module, self._stack = list(adapters), module, ExitStack()

    def __enter__(self) -> "Adapted":
        for adapter in self._adapters:
            assert self._module is not None
            self._stack.enter_context(adapter(self._module))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def away(self) -> Generator[None, None, None]:
        """Be outside of the contexts within the ``with`` statement."""
        self._stack.close()
        try:
            yield
        finally:
            self.__enter__()
