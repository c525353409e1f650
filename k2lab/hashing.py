"""A hash of a value that is the same in every process, the key of the run cache.

It covers configs, arrays, tensors and functions of the notebook: for a function its source, its
defaults and whatever it reads.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import sys
import textwrap
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def stable_hash(value: Any) -> str:
    """Return a hash of value that is the same in every process; ValueError where none exists."""
    return hashlib.sha256("\0".join(_parts(value, ())).encode()).hexdigest()


def _parts(value: Any, seen: tuple) -> Iterable[str]:
    """Yield strings that determine value, each with its type and length so none run together."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield f"{kind}:{value!r}"
    elif isinstance(value, (torch.dtype, torch.device, np.dtype, Path)):
        yield f"{kind}:{value}"
    elif isinstance(value, enum.Enum):
        yield f"{kind}:{value.name}"
    elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        home = getattr(value, "__module__", "")
        yield f"{kind}:{home}.{value.__name__}"
        if home == "__main__":  # a class of the notebook is its methods
            for member in [m for m in vars(value).values() if isinstance(m, types.FunctionType)]:
                yield from _parts(member, (*seen, id(value)))
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        data = np.ascontiguousarray(value).tobytes()
        yield f"{kind}:{value.dtype}:{value.shape}:{hashlib.sha256(data).hexdigest()}"
    elif isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield f"{kind}:{value.dtype}:{tuple(value.shape)}:{hashlib.sha256(data).hexdigest()}"
    else:
        children = _children(value, kind, seen)
        yield f"{kind}:{len(children)}"
        for child in children:
            yield from _parts(child, (*seen, id(value)))


def _children(value: Any, kind: str, seen: tuple) -> list:
    """Return what determines a compound value; a value met again on the way down has none."""
    if id(value) in seen:
        return []
    if isinstance(getattr(value, "fingerprint", None), str):  # a corpus knows its own hash
        return [value.fingerprint]
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, types.SimpleNamespace):
        return sorted(vars(value).items())
    if isinstance(value, Mapping):
        return sorted(([k, v] for k, v in value.items()), key=lambda pair: repr(pair[0]))
    if isinstance(value, (list, tuple, range)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.FunctionType):
        return _function(value)
    raise ValueError(
        f"a value of type {kind} has no stable hash, so its run cannot be cached; "
        "allowed: dataclasses, mappings, sequences, numbers, strings, arrays, tensors, functions. "
        "Put what it depends on into the config and build it inside the function."
    )


def _function(fn: types.FunctionType) -> list:
    """Return what determines a function of the notebook: source, defaults, closure, globals."""
    home = fn.__module__.split(".")[0]
    installed = home in sys.stdlib_module_names or "site-packages" in fn.__code__.co_filename
    if home == "k2lab" or (installed and home != "__main__"):
        return [fn.__module__, fn.__qualname__]  # code_version() covers ours; others do not change
    try:
        source = textwrap.dedent(inspect.getsource(fn))
    except OSError as error:
        raise ValueError(f"{fn.__name__} has no source to hash; define it in a cell") from error
    cells = [cell.cell_contents for cell in fn.__closure__ or ()]
    names, codes = set(), [fn.__code__]
    while codes:
        code = codes.pop()
        names |= {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    read = {n: fn.__globals__[n] for n in sorted(names) if n in fn.__globals__}
    return [source, fn.__defaults__, fn.__kwdefaults__, cells, read]
