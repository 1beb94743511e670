"""Describes values of configs in texts that are the same in every process.

Addresses of objects, the order of sets, paths of files, names and seeds are
not; other unknown objects are described by their class alone.
"""

import re
import types
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from keras_allreduce.compat import keras_config

_Builtin = types.BuiltinFunctionType
_MOST_VALUES, _MOST_LEVELS = 64, 20
_LIBRARIES = frozenset({"builtins", "keras", "tensorflow"})
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")

# Names are counted in each process, initial values come from the chief, XLA
# computes the same, and numbers that are variables are compared as such.
_SKIPPED = frozenset(
    {
        "name",
        "seed",
        "shared_object_id",
        "build_config",
        "compile_config",
        "jit_compile",
    }
)


@dataclass(frozen=True)
class Described:
    """A value in words.

    Attributes:
        text: The same in all processes that have the same value.
        is_known: Whether all of it is Keras's or Python's own. What the
            script defines may differ for a good reason.
        head: The name of its class, if it has a config.
        config: The values of its config.
    """

    text: str
    is_known: bool = True
    head: str = ""
    config: Mapping[str, "Described"] = field(default_factory=dict)


def described(value: Any, level: int = 0) -> Described:
    """Describes a value; calls nothing of it but `get_config`.

    Args:
        value: Anything that `compile` or a layer may be given.
        level: How deep in another value it is.
    """
    if level > _MOST_LEVELS:
        return Described("...")
    try:
        return _described(value, level)
    except Exception:  # noqa: BLE001 (raised by code of the script)
        return Described(type(value).__name__, is_known=False)


def _described(value: Any, level: int) -> Described:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return Described(repr(value))
    if isinstance(value, str):
        return Described(_text(value))
    if isinstance(value, Mapping):
        return _mapping(value, level + 1)
    if isinstance(value, list | tuple | set | frozenset):
        return _collection(value, level + 1)
    if isinstance(value, type | types.FunctionType | _Builtin):
        return _code(value)
    if isinstance(value, tf.DType | np.dtype):
        return Described(value.name)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return Described("an array")
    if hasattr(value, "get_config"):
        is_known = keras_config.is_of_keras(value)
        config = keras_config.config_of(value)
        return _with_config(
            type(value).__name__, config, is_known, level + 1, _code(value)
        )
    return Described(type(value).__qualname__, is_known=False)


def _text(value: str) -> str:
    # Paths and devices are each worker's own.
    if "/" in value or "\\" in value:
        return "a path"
    return repr(_ADDRESS.sub("0x", value))


def _mapping(value: Mapping[Any, Any], level: int) -> Described:
    if "class_name" in value and "config" in value:
        return _serialized(value, level)
    parts = [
        (re.sub(r"_\d+$", "", _ADDRESS.sub("0x", str(key))), each)
        for key, each in value.items()
    ]
    inner = [(key, described(each, level)) for key, each in parts]
    texts = sorted(f"{key}: {each.text}" for key, each in inner)
    return Described(
        f"{{{', '.join(texts)}}}", all(each.is_known for _, each in inner)
    )


def _serialized(value: Mapping[Any, Any], level: int) -> Described:
    """An object of a config, as Keras writes it."""
    head, config = str(value["class_name"]), value["config"]
    if head == "__lambda__":
        return Described("a lambda", is_known=False)
    if head in ("__tensor__", "__numpy__"):
        return Described("an array")
    module = str(value.get("module") or "")
    is_known = module.split(".")[0] == "keras"
    if not isinstance(config, Mapping):
        return Described(f"{config}", is_known)
    return _with_config(head, config, is_known, level)


def _with_config(
    head: str,
    config: Mapping[Any, Any],
    is_known: bool,
    level: int,
    code: Described | None = None,
) -> Described:
    # The name of a policy says everything about it.
    skipped = _SKIPPED - ({"name"} if head.endswith("Policy") else set())
    values = {
        str(key): described(each, level)
        for key, each in config.items()
        if key not in skipped and not str(key).endswith("initializer")
    }
    if isinstance(config.get("learning_rate"), float):
        # A variable, which is compared as such.
        del values["learning_rate"]
    if not is_known:
        values = {k: Described(v.text, False) for k, v in values.items()}
    inner = ", ".join(f"{k}={v.text}" for k, v in sorted(values.items()))
    head = head if is_known or code is None else code.text
    all_known = is_known and all(each.is_known for each in values.values())
    return Described(f"{head}({inner})", all_known, head, values)


def _collection(value: Any, level: int) -> Described:
    if len(value) > _MOST_VALUES:
        shown = [repr(each) for each in value if isinstance(each, str | int)]
        if isinstance(value, set | frozenset):
            shown.sort()
        digits = _checksum(shown)
        return Described(f"{len(value)} values (checksum {digits})")
    parts = [described(each, level) for each in value]
    texts = [part.text for part in parts]
    if isinstance(value, set | frozenset):
        texts.sort()
    return Described(
        f"[{', '.join(texts)}]", all(part.is_known for part in parts)
    )


def _code(value: Any) -> Described:
    """A function or class by its name; one of the script's by its code too."""
    is_named = isinstance(value, type | types.FunctionType | _Builtin)
    owner = value if is_named else type(value)
    name = str(owner.__qualname__).split("<locals>.")[-1]
    if keras_config.is_of_keras(owner):
        return Described(name)
    functions = [owner]
    if isinstance(owner, type):
        functions = [
            function
            for each in owner.__mro__
            if each.__module__.split(".")[0] not in _LIBRARIES
            for _, function in sorted(vars(each).items())
        ]
    codes = [
        _constants(each.__code__)
        for each in functions
        if isinstance(each, types.FunctionType)
    ]
    return Described(f"{name} (code {_checksum(codes)})", is_known=False)


def _checksum(value: Any) -> str:
    digits = zlib.crc32(repr(value).encode("utf-8", "backslashreplace"))
    return f"{digits:08x}"


def _constants(code: types.CodeType) -> list[Any]:
    """The code of a function: its instructions, names and numbers."""
    inner = [
        _constants(each) if isinstance(each, types.CodeType) else each
        for each in code.co_consts
        # Texts are for people, and a `-OO` leaves out some.
        if isinstance(each, types.CodeType | int | float)
    ]
    return [code.co_code.hex(), code.co_names, inner]
