"""What processes say to each other: frozen dataclasses, one module per receiver, carried as msgpack by `rpc`.

Wires carry durations, never timestamps. New fields need defaults: a peer of the previous version leaves them out.
"""
