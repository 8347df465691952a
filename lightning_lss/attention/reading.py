"""What a function computes from: its code, and the content of all that it reads, as one digest.

A function of a mask is run once while Python tells which code runs (:func:`watch`). Which code that is cannot depend on
the pair: ``torch.vmap`` sees to it. So it is known which functions and methods matter and which attributes they name, and
a walk over these (:class:`_Walk`) finds the same digest for equal content, in every process, and another one for other
content. What the walk cannot know is refused.
"""

import dis
import enum
import gc
import hashlib
import sys
from collections import deque, namedtuple
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    SimpleNamespace,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightning_lss.sequence.batch import BatchMask, bytes_of

# What belongs to them is known by name, since it does not change ...
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy"}
_CHANGING = {"os", "sys", "random", "time", "secrets", "uuid"}  # ... but for these
# Values of these types are known by what they print.
_PLAIN = (
    *(type(None), type(...), bool, int, float, complex, str, bytes, range),
    *(torch.dtype, torch.layout, torch.memory_format, torch.finfo, torch.iinfo),
)
_DESCRIPTORS = MethodDescriptorType, WrapperDescriptorType, GetSetDescriptorType, MemberDescriptorType
_FIELD = type(vars(namedtuple("_Pair", "x"))["x"])
_OPERATORS = torch._ops.OpOverload, torch._ops.OpOverloadPacket

Watched = dict[CodeType, bool]
"""The code that ran; whether it is a library's."""


def watch(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Watched]:
    """Call a function; return what it returns, and which code ran."""
    ran: Watched = {}

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            ran[frame.f_code] = _is_library(str(frame.f_globals.get("__name__")))

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # what runs when garbage is collected is not the function's
    sys.setprofile(note)
    try:
        return function(*arguments), ran
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


def _is_library(module: str) -> bool:
    return module.split(".")[0] in _LIBRARIES or module.startswith("namedtuple_")


class Reading:
    """Knows what a ``function`` reads, from the code that ``ran`` in it."""

    def __init__(self, function: Callable[..., Any], ran: Watched) -> None:
        self.function = function
        self.ran = ran.keys() - {nn.Module.__getattr__.__code__}  # it names all parameters, buffers and modules
        self.own = [code for code, is_library in ran.items() if not is_library]  # in the order in which it ran
        self.names = frozenset().union(*map(_names, self.own))
        self.everything = not self.names.isdisjoint(("getattr", "vars", "__dict__"))

    @_disable_current_modes()
    def digest(self) -> str:
        """Return the digest of the content as it is now.

        Raises ``ValueError`` for something whose content cannot be known.
        """
        return _Walk(self).digest().hex()


class _Walk:
    """Goes once through all that a function reads."""

    def __init__(self, reading: Reading) -> None:
        self._reading, self._names, self._ran = reading, reading.names, reading.ran
        self._known: dict[int, tuple[Any, bytes]] = {}  # by id, with the value itself, so that the id is not used again
        self._reached: set[CodeType] = set()
        self._depth = 0

    def digest(self) -> bytes:
        found = self._content(self._reading.function)
        for code in (x for x in self._reading.own if x not in self._reached):
            raise self._unknown(f"what {code.co_name} (line {code.co_firstlineno} of {code.co_filename}) reads")
        return found

    def _unknown(self, what: str) -> ValueError:
        name = name_of(self._reading.function)
        return ValueError(
            f"The function {name} of a mask reads something of which it cannot be known whether it changes: {what}; let it read"
            " tensors and numbers (or lists, dicts, objects and functions of these), or use AttentionMask.from_dense."
        )

    def _content(self, x: Any) -> bytes:
        if type(x) in _PLAIN:
            return _hash(type(x).__name__, repr(x))
        if id(x) not in self._known:
            self._known[id(x)] = x, _hash("cycle", str(self._depth))
            self._depth += 1
            self._known[id(x)] = x, _hash(*self._parts(x))
            self._depth -= 1
        return self._known[id(x)][1]

    def _contents(self, *values: Any) -> Iterator[bytes]:
        return map(self._content, values)

    def _parts(self, x: Any) -> Iterator[str | bytes]:
        """Everything that tells ``x`` from other values."""
        name = _name_in_library(x)
        if name is not None and (isinstance(x, type) or name.split(".")[0] not in _CHANGING):
            yield name
        elif name is not None:
            raise self._unknown(f"{name} of the standard library")
        elif isinstance(x, (Tensor, np.ndarray, np.generic)):
            yield from self._array(x)
        elif isinstance(x, CodeType):
            self._reached.add(x)
            yield from (x.co_code, repr((x.co_names, x.co_varnames, x.co_freevars, x.co_cellvars, x.co_flags)))
            yield from self._contents(x.co_argcount, x.co_kwonlyargcount, *x.co_consts)
        elif isinstance(x, FunctionType):
            yield from self._function(x)
        elif isinstance(x, MethodType):
            yield from self._contents(x.__func__, x.__self__)
        elif isinstance(x, partial):
            yield from self._contents("partial", x.func, x.args, x.keywords)
        elif isinstance(x, (BuiltinFunctionType, MethodWrapperType)):
            yield from self._contents(x.__name__, x.__self__)
        elif isinstance(x, _DESCRIPTORS):
            yield from self._contents(x.__name__, x.__objclass__)
        elif isinstance(x, (*_OPERATORS, torch.device)):  # ranks have devices of other indices
            yield from (type(x).__name__, x.type if isinstance(x, torch.device) else str(x))
        elif isinstance(x, slice):
            yield from self._contents("slice", x.start, x.stop, x.step)
        elif isinstance(x, BatchMask):
            yield str(x.content_digest)
        elif isinstance(x, ModuleType):
            yield from self._attributes(x, self._names)
        elif isinstance(x, type):
            yield from self._class(x)
        else:
            yield self._content(type(x))
            yield from self._held(x)
            yield from self._attributes(x, self._names_of(type(x)), self._reading.everything)

    def _array(self, x: Any) -> Iterator[str | bytes]:
        yield from (str(x.dtype), repr(tuple(x.shape)))
        if isinstance(x, Tensor):
            try:
                yield bytes_of(x)
            except Exception as error:  # sparse, without storage, and what subclasses may raise
                raise self._unknown(f"a tensor {type(x).__name__} whose values cannot be read") from error
            yield from self._attributes(x, self._names)
        elif not (type(x) in (np.ndarray, np.memmap) or isinstance(x, np.generic)) or x.dtype.hasobject:
            raise self._unknown(f"an array {type(x).__name__} of {x.dtype}")
        else:
            yield x.tobytes()

    def _function(self, function: FunctionType) -> Iterator[str | bytes]:
        code = function.__code__
        yield self._content(code)
        if code not in self._ran:  # what it would read does not matter
            return
        yield from self._contents(function.__defaults__, function.__kwdefaults__)
        yield from self._contents(*map(_inside, function.__closure__ or ()))
        named, imported = _globals(code)
        for name in sorted(named):
            if name in function.__globals__:
                yield from (name, self._content(function.__globals__[name]))
            elif name in ("eval", "exec", "globals", "locals"):
                raise self._unknown(f"the result of {name}()")
        for name in imported:
            if not _is_library(name):
                raise self._unknown(f"the module {name!r} that it imports itself (import it at the top of the file)")
        yield from self._attributes(function, self._names)

    def _class(self, cls: type) -> Iterator[str | bytes]:
        yield cls.__qualname__
        names = self._names_of(cls)
        for base in cls.__mro__:
            library = _name_in_library(base)
            if library is not None:
                yield library
                continue
            for name, value in sorted(vars(base).items()):
                function = _function_in(value)
                if function is not None and function.__code__ in self._ran:
                    yield from (name, self._content(function))
                elif function is None and name in names and not isinstance(value, (*_DESCRIPTORS, _FIELD)):
                    yield from (name, self._content(value))

    def _held(self, x: Any) -> Iterator[str | bytes]:
        """What an object holds other than in attributes."""
        if isinstance(x, (dict, MappingProxyType)):  # the mask itself is often put beside what its function reads
            entries = [(key, value) for key, value in x.items() if not isinstance(value, BatchMask)]
            yield from self._contents(*(part for entry in entries for part in entry))
        elif isinstance(x, (list, tuple, deque)):
            yield from self._contents(*x)
        elif isinstance(x, (set, frozenset)):
            yield from sorted(self._contents(*x))
        elif isinstance(x, enum.Enum):
            yield from self._contents(x.name, x.value)
        elif type(x) not in (object, SimpleNamespace) and _is_opaque(type(x)):
            raise self._unknown(f"{x!r:.80}")

    def _attributes(self, x: Any, names: Set[str], everything: bool = False) -> Iterator[str | bytes]:
        held: dict[str, Any] = dict(getattr(x, "__dict__", {}))
        for name in {name for base in type(x).__mro__ for name in _slots(base)}:
            with suppress(AttributeError):  # of a slot that is empty
                held[name] = getattr(x, name)
        if isinstance(x, nn.Module):
            for inner in (x._parameters, x._buffers, x._modules):
                held.update(inner)
        for name in sorted(held if everything else held.keys() & names):
            yield from (name, self._content(held[name]))

    def _names_of(self, cls: type) -> Set[str]:
        """The attributes that are read of an object: those that the function names, and the methods that ran."""
        functions = [f for base in cls.__mro__ for x in vars(base).values() if (f := _function_in(x)) is not None]
        return self._names.union(*(_names(f.__code__) for f in functions if f.__code__ in self._ran))


def name_of(function: Any) -> str:
    """What to call a function in a message."""
    return getattr(function, "__qualname__", None) or repr(function)


def _hash(*parts: str | bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        written = part.encode() if isinstance(part, str) else part
        digest.update(len(written).to_bytes(8, "big"))
        digest.update(written)
    return digest.digest()


def _name_in_library(x: Any) -> str | None:
    """The name under which a library has ``x`` itself."""
    if isinstance(x, ModuleType):
        return x.__name__ if _is_library(x.__name__) else None
    if not isinstance(x, (type, FunctionType)) and not _is_library(type(x).__module__):
        return None
    module, name = getattr(x, "__module__", None), getattr(x, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not _is_library(module):
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(x, type) and found is None and _defined_in_c(x):  # some have no place
        found = x
    return f"{module}.{name}" if found is x else None


def _defined_in_c(cls: type) -> bool:
    return not any(isinstance(value, FunctionType) for value in vars(cls).values())


def _is_opaque(cls: type) -> bool:
    """Whether objects hold something that is no attribute: those of classes that are written in C."""
    bases = [base for base in cls.__mro__ if base is not object]
    makers = (vars(base).get("__new__", None) for base in bases)
    has_attributes = any("__dict__" in vars(base) or "__slots__" in vars(base) for base in bases)
    return not has_attributes or any(isinstance(maker, BuiltinFunctionType) for maker in makers)


def _slots(base: type) -> tuple[str, ...]:
    slots = vars(base).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _function_in(value: Any) -> FunctionType | None:
    """The function of a method, in whatever way it is one."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, cached_property):
        value = value.func
    return value if isinstance(value, FunctionType) else None


def _inside(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return "empty"


@lru_cache(maxsize=1024)
def _names(code: CodeType) -> frozenset[str]:
    """The attributes that code names, in strings as well."""
    strings = (x for x in code.co_consts if isinstance(x, str))
    return frozenset(code.co_names).union(strings, *map(_names, _inner(code)))


@lru_cache(maxsize=1024)
def _globals(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals that code reads, and the modules that it imports."""
    found: Mapping[str, set[str]] = {"LOAD_GLOBAL": set(), "LOAD_NAME": set(), "IMPORT_NAME": set()}
    for step in dis.get_instructions(code):
        if step.opname in found:
            found[step.opname].add(step.argval)
    inner = [_globals(x) for x in _inner(code)]
    named = found["LOAD_GLOBAL"] | found["LOAD_NAME"]
    return frozenset(named).union(*(x for x, _ in inner)), frozenset(found["IMPORT_NAME"]).union(*(x for _, x in inner))


def _inner(code: CodeType) -> list[CodeType]:
    return [x for x in code.co_consts if isinstance(x, CodeType)]
