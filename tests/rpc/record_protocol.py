"""Writes down what the code that it runs with speaks: every method, message and field, with example frames.

Run it once, before PROTOCOL grows, with the last commit of the protocol that ends:

    git worktree add --detach DIR COMMIT
    PYTHONPATH=DIR python tests/rpc/record_protocol.py > tests/rpc/protocol_N.json

`describe` gives a type as JSON, which holds for the plain values that msgpack carries:

    "int" "float" "bool" "str" "bytes" "none"
    {"message": NAME}  {"enum": [WORD, ...]}  {"list": ITEM}  {"row": [ITEM, ...]}  {"map": [KEY, VALUE]}
    {"either": [TYPE, ...]}
"""

import json
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from itertools import count
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from core.errors import Overloaded
from rpc import methods
from rpc.codec import encode, encode_error
from rpc.methods import ServerStream, Unary
from rpc.server import ERROR_KEY, SECRET_KEY, SERVICE

SCALARS = {int: "int", float: "float", bool: "bool", str: "str", bytes: "bytes", NoneType: "none"}
ERROR = Overloaded("the queue is full", field="queue_limit", retry_after_s=1.5)

Method = Unary[Any, Any] | ServerStream[Any, Any]


def all_methods() -> dict[str, Method]:
    """By the name on the wire."""
    return {method.name: method for method in vars(methods).values() if isinstance(method, Unary | ServerStream)}


def describe(kind: Any) -> Any:
    """A type annotation as JSON."""
    origin, parameters = get_origin(kind), get_args(kind)
    if kind in SCALARS:
        return SCALARS[kind]
    if is_dataclass(kind):
        return {"message": kind.__name__}
    if origin in (Union, UnionType):
        return {"either": [describe(choice) for choice in parameters]}
    if origin is dict:
        return {"map": [describe(parameter) for parameter in parameters]}
    if origin is frozenset or (origin is tuple and parameters[-1] is ...):
        return {"list": describe(parameters[0])}
    if origin is tuple:
        return {"row": [describe(parameter) for parameter in parameters]}
    assert issubclass(kind, Enum), f"{kind} has no form on the wire yet"
    return {"enum": [member.value for member in kind]}


def tables(kinds: list[Any]) -> dict[str, dict[str, Any]]:
    """The fields of the messages among `kinds` and of all that they are made of, by the message's name."""
    found: dict[str, dict[str, Any]] = {}
    pending = list(kinds)
    while pending:
        kind = pending.pop()
        if is_dataclass(kind) and kind.__name__ not in found:
            hints = get_type_hints(kind)
            found[kind.__name__] = {
                field.name: {
                    "type": describe(hints[field.name]),
                    "required": field.default is MISSING and field.default_factory is MISSING,
                }
                for field in fields(kind)
            }
            pending += hints.values()
        pending += get_args(kind)
    return found


def full(kind: Any, numbers: Iterator[int]) -> Any:
    """An example with every field set and, as far as the type has them, no two values alike.

    Integers are powers of two, because a layout asks that its heads and ranks divide one another.
    """
    origin, parameters = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: full(hints[field.name], numbers) for field in fields(kind)})
    if origin in (Union, UnionType):
        return full(parameters[0], numbers)
    if origin is dict:
        return {full(parameters[0], numbers): full(parameters[1], numbers) for _ in range(2)}
    if origin is frozenset or (origin is tuple and parameters[-1] is ...):
        return origin(full(parameters[0], numbers) for _ in range(2))
    if origin is tuple:
        return tuple(full(parameter, numbers) for parameter in parameters)
    if issubclass(kind, Enum):
        return list(kind)[-1]
    number = next(numbers)
    values = {
        int: 2 ** (number % 62),
        float: number + 0.5,
        bool: True,
        str: f"é{number}",
        bytes: bytes((0, 255, number)),
    }
    return values[kind]


def sparse(kind: Any) -> Any:
    """An example with as little in it as its type allows: None, nothing in collections, False, 1 (heads divide)."""
    origin, parameters = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: sparse(hints[field.name]) for field in fields(kind)})
    if origin in (Union, UnionType):
        return None if NoneType in parameters else sparse(parameters[0])
    if origin is tuple and parameters[-1] is not ...:
        return tuple(sparse(parameter) for parameter in parameters)
    if origin is not None:
        return origin()
    if issubclass(kind, Enum):
        return next(iter(kind))
    return 1 if kind is int else kind()


def examples(kind: Any) -> list[Any]:
    """The same ones whenever the type is the same."""
    return [full(kind, count(1)), sparse(kind)]


def record() -> dict[str, Any]:
    """Everything, frames in base64."""
    recorded = {}
    for name, method in sorted(all_methods().items()):
        recorded[name] = {
            "kind": type(method).__name__,
            "request": method.request.__name__,
            "response": method.response.__name__,
            "request_frames": [b64encode(encode(example)).decode() for example in examples(method.request)],
            "response_frames": [b64encode(encode(example)).decode() for example in examples(method.response)],
        }
    kinds = [kind for method in all_methods().values() for kind in (method.request, method.response)]
    return {
        "names": {"service": SERVICE, "secret": SECRET_KEY, "error": ERROR_KEY},
        "errors": {"Overloaded": b64encode(encode_error(ERROR)).decode()},
        "methods": recorded,
        "messages": dict(sorted(tables(kinds).items())),
    }


def main() -> None:
    """Prints the record as JSON, one method or message a line."""
    sections = []
    for name, section in record().items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in section.items()]
        sections.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    print("{\n" + ",\n".join(sections) + "\n}")


if __name__ == "__main__":
    main()
