"""Today's code against what older protocols were seen to say: frames and field tables of `record_protocol.py`."""

import json
from base64 import b64decode
from pathlib import Path
from typing import Any

import msgpack
import pytest

from core.version import OLDEST_PROTOCOL, PROTOCOL
from rpc.codec import decode, decode_error, encode, encode_error
from rpc.server import ERROR_KEY, SECRET_KEY, SERVICE
from tests.rpc.record_protocol import ERROR, SCALARS, all_methods, examples

OLD = {
    number: json.loads((Path(__file__).parent / f"protocol_{number}.json").read_text())
    for number in range(OLDEST_PROTOCOL, PROTOCOL)
}
OLD_METHODS = [pytest.param(old, name, id=f"{number}-{name}") for number, old in OLD.items() for name in old["methods"]]
SCALAR_TYPES = {word: kind for kind, word in SCALARS.items()}
TODAY = all_methods()


def plain(frame: bytes) -> Any:
    return msgpack.unpackb(frame, strict_map_key=False)


def holds(new: Any, old: Any) -> bool:
    """Whether `new` says all that `old` says; messages may say more."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(key in new and holds(new[key], old[key]) for key in old)
    if isinstance(old, list):
        return isinstance(new, list) and len(new) == len(old) and all(map(holds, new, old))
    return type(new) is type(old) and new == old


def misfit(value: Any, kind: Any, old: dict[str, Any], where: str) -> str:
    """Where a plain value is not of an old type; empty when it is. Fields that the old table lacks do not count."""
    if isinstance(kind, str):
        accepted: tuple[type, ...] = (int, float) if kind == "float" else (SCALAR_TYPES[kind],)
        return "" if type(value) in accepted else f"{where}: {value!r} is no {kind}"
    [(form, inner)] = kind.items()
    if form == "either":
        return min((misfit(value, choice, old, where) for choice in inner), key=len)
    if form == "enum":
        return "" if value in inner else f"{where}: {value!r} is none of {inner}"
    if type(value) is not (dict if form in ("message", "map") else list):
        return f"{where}: {value!r} is no {form}"
    if form == "message":
        table = old["messages"][inner]
        missing = [f"{where}.{name} is missing" for name in table if table[name]["required"] and name not in value]
        parts = [(value[name], table[name]["type"], f"{where}.{name}") for name in table if name in value]
        return next(filter(None, missing + [misfit(part, type_, old, place) for part, type_, place in parts]), "")
    if form == "row" and len(value) != len(inner):
        return f"{where}: {len(value)} values in place of {len(inner)}"
    if form == "map":
        items = [(part, kind, where) for item in value.items() for part, kind in zip(item, inner, strict=True)]
    else:
        kinds = inner if form == "row" else [inner] * len(value)
        items = [(part, kind, f"{where}[]") for part, kind in zip(value, kinds, strict=True)]
    return next(filter(None, (misfit(part, type_, old, place) for part, type_, place in items)), "")


def test_there_is_a_record_of_every_protocol_that_is_spoken_beside_todays():
    assert OLDEST_PROTOCOL == 1 and PROTOCOL == 3 and list(OLD) == [1, 2]
    assert len(OLD[1]["methods"]) == 23, "Fleet and SetTraffic came later"
    assert TODAY.keys() - OLD[2]["methods"].keys() == {"Holds", "MakeRoom", "TakeOver", "Why"}


@pytest.mark.parametrize(("old", "name"), OLD_METHODS)
def test_an_old_method_still_exists_and_its_frames_are_understood(old, name):
    method, recorded = TODAY[name], old["methods"][name]
    assert type(method).__name__ == recorded["kind"]
    for kind, frames in ((method.request, "request_frames"), (method.response, "response_frames")):
        assert len(recorded[frames]) == 2
        for frame in map(b64decode, recorded[frames]):
            assert holds(plain(encode(decode(kind, frame))), plain(frame))


@pytest.mark.parametrize(("old", "name"), OLD_METHODS)
def test_an_old_peer_finds_all_that_it_requires_in_todays_frames(old, name):
    method, recorded = TODAY[name], old["methods"][name]
    for kind, old_kind in ((method.request, recorded["request"]), (method.response, recorded["response"])):
        for example in examples(kind):
            assert misfit(plain(encode(example)), {"message": old_kind}, old, old_kind) == ""


@pytest.mark.parametrize("old", OLD.values(), ids=OLD)
def test_names_and_error_frames_are_those_of_old(old):
    assert old["names"] == {"service": SERVICE, "secret": SECRET_KEY, "error": ERROR_KEY}
    frame = b64decode(old["errors"]["Overloaded"])
    error = decode_error(frame)
    assert type(error) is type(ERROR) and vars(error) == vars(ERROR)
    assert encode_error(ERROR) == frame


def test_a_registered_supervisor_of_protocol_1_reads_known():
    table = OLD[1]["messages"][OLD[1]["methods"]["Register"]["response"]]
    assert table == {"known": {"type": "bool", "required": False}}
    assert [plain(encode(example))["known"] for example in examples(TODAY["Register"].response)] == [True, False]


def test_a_replica_of_protocol_1_is_shown_as_such():
    frames = OLD[1]["methods"]["Register"]["request_frames"]
    infos = [decode(TODAY["Register"].request, b64decode(frame)).info for frame in frames]
    assert [(info.protocol, info.software, info.generation) for info in infos] == [(1, "", "")] * 2
    assert infos[0].compatibility.protocol_version == 2**16, "what KV transfer compares is what the replica said"
