"""Protocol Buffers' wire format, as far as logs need it: numbered fields of integers, fixed numbers and bytes.

Both TensorBoard and W&B write it. Reading it takes less code than calling their packages would: TensorBoard's brings
eleven others, among them gRPC, and W&B's no longer has a reader for its own files.
"""

from collections.abc import Iterator

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
"""The kinds of a field's value."""


class DamagedError(ValueError):
    """Bytes that are no message."""


def fields(message: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    r"""The fields of a message, in order.

    Args:
        message: its bytes.

    Yields:
        The number of each field, the kind of its value, and the value: an integer from 0 to 2^64 - 1 for `VARINT`, and
        bytes for all others.

    Raises:
        DamagedError: if the bytes are no message.

    >>> list(fields(b"\x08\x96\x01\x12\x02hi"))
    [(1, 0, 150), (2, 2, b'hi')]
    """
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, kind, value
            continue
        if kind == BYTES:
            length, at = _varint(message, at)
        else:
            length = {EIGHT_BYTES: 8, FOUR_BYTES: 4}.get(kind, end)
        if number == 0 or length > end - at:
            raise DamagedError
        yield number, kind, message[at : at + length]
        at += length


def signed(value: int) -> int:
    """A varint as the signed integer of 64 bits that it stands for.

    >>> signed(2**64 - 1)
    -1
    """
    return value - 2**64 if value >= 2**63 else value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer of at most 64 bits and where it ends."""
    try:
        value = message[at]
        at += 1
        if value < 128:
            return value, at
        value, shift = value & 127, 7
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
            if shift > 63:
                raise DamagedError
    except IndexError:
        raise DamagedError from None
    return value & (2**64 - 1), at
