"""Messages to bytes and back: dataclass -> plain values -> msgpack. Unknown fields of newer peers are ignored."""

from typing import Any, TypeVar

import msgpack
from pydantic import TypeAdapter, ValidationError

from core.errors import BatonError, InvalidParameter, error_classes
from core.section import problems_in

Message = TypeVar("Message")

_adapters: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(message_type: type[Any]) -> TypeAdapter[Any]:
    adapter = _adapters.get(message_type)
    if adapter is None:
        adapter = _adapters[message_type] = TypeAdapter(message_type)
    return adapter


def encode(message: object) -> bytes:
    """One message as msgpack."""
    return bytes(msgpack.packb(_adapter(type(message)).dump_python(message), default=_encode_set))


def decode(message_type: type[Message], data: bytes) -> Message:
    """Raises InvalidParameter when `data` is no such message; the text names the field."""
    try:
        message: Message = _adapter(message_type).validate_python(msgpack.unpackb(data, strict_map_key=False))
    except ValidationError as error:
        raise InvalidParameter(f"malformed {message_type.__name__}: {problems_in(error, 'message')}") from error
    except ValueError as error:
        raise InvalidParameter(f"malformed {message_type.__name__}: {error}") from error
    return message


def encode_error(error: BatonError) -> bytes:
    """An error of the tree, to be raised again at the caller."""
    return bytes(msgpack.packb([type(error).__name__, error.message, error.field, error.retry_after_s]))


def decode_error(data: bytes) -> BatonError:
    """The error that `encode_error` saw; a class unknown here becomes its base."""
    name, message, field, retry_after_s = msgpack.unpackb(data)
    return error_classes().get(name, BatonError)(message, field=field, retry_after_s=retry_after_s)


def _encode_set(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"cannot encode {type(value).__name__}")
