"""What processes say to each other: frozen dataclasses, one module per receiver, carried as msgpack by `rpc`.

Wires carry durations, never timestamps. Processes of two releases talk while a fleet is upgraded, so between
OLDEST_PROTOCOL and PROTOCOL (core/version.py) messages may only grow:

* a new field has a default, which means what its absence meant before;
* no field is removed, renamed or retyped, none becomes None that never was, no enum gains a member;
* a field that the receiver does not know is ignored;
* a method keeps its name; its new request and response hold all that the older ones did;
* the four parts of an error frame stay, and an error of an unknown class is read as BatonError.

What breaks a rule waits until OLDEST_PROTOCOL has left behind the peers that would misread it. What a protocol says is
frozen by `tests/rpc/record_protocol.py`, and a test holds today's messages to it.
"""
