"""Event files and .wandb files made by hand, a byte at a time, for what their libraries don't write."""

import json
import struct
import zlib

from phasewatch.monitor.trajectories.logs.event_files import _masked_checksum


def varint(value):
    out = b""
    while value >= 128:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number, value):
    """A field of an integer, a float (4 bytes), a list of one float (8 bytes), text or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value & 2**64 - 1)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, list):
        return varint(number << 3 | 1) + struct.pack("<d", *value)
    value = value.encode("utf-8", "replace") if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def event(step, scalars):
    summary = b"".join(field(1, field(1, tag) + field(2, float(value))) for tag, value in scalars.items())
    return field(1, [1e9 + step]) + (field(2, step) if step else b"") + field(5, summary)


def framed(record):
    head = struct.pack("<Q", len(record))
    tail = struct.pack("<I", _masked_checksum(record))
    return head + struct.pack("<I", _masked_checksum(head)) + record + tail


def event_file(events):
    """The bytes of an event file with (step, scalars)."""
    return b"".join(map(framed, [field(1, [1e9]) + field(3, "brain.Event:2"), *(event(*one) for one in events)]))


def history(step, row):
    items = b"".join(field(1, field(2, name) + field(16, json.dumps(value))) for name, value in row.items())
    return field(1, step) + field(2, items + field(2, field(1, step)))


def wandb_file(rows):
    """The bytes of a .wandb file with these rows of history."""
    return log_blocks([field(21, b""), *(history(i, row) for i, row in enumerate(rows))])


def log_blocks(records):
    """A .wandb file of these records, laid out in LevelDB's blocks."""
    content = bytearray(b":W&B\xe1\xbe\x00")
    for record in records:
        rest, first = record, True
        while rest or first:
            left = 32768 - len(content) % 32768
            if left < 7:
                content += bytes(left)
                left = 32768
            piece, rest = rest[: left - 7], rest[left - 7 :]
            kind = bytes([(1 if first else 4) if not rest else 2 if first else 3])
            content += struct.pack("<IH", zlib.crc32(piece, zlib.crc32(kind)), len(piece)) + kind + piece
            first = False
    return bytes(content)
