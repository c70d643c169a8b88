"""JSON that others may have made: what Python's own reader lets through, or fails at, is a sentence instead."""

import json
import re
from functools import partial
from itertools import accumulate
from typing import Any

import msgspec

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.formatting import integer, printable

MOST_DEPTH = 64
"""JSON nested deeper is refused, long before Python's recursion limit; a run's settings are 6 deep."""

MOST_DIGITS = 300
"""JSON with an integer of more digits is refused, so that every integer that was read can become a float."""


def parse_json(text: str, name: str, most_depth: int = MOST_DEPTH, *, allow_nan: bool = False) -> Any:
    """The value of a JSON text, whatever the text is.

    Args:
        text: a document, or a line of a .jsonl.
        name: what the text is, for messages, such as "Line 3 of points.jsonl".
        most_depth: how deep lists and objects may nest; checked before anything is parsed.
        allow_nan: read `NaN`, `Infinity` and numbers beyond a float's range as floats, as other programs write them.

    Returns:
        Plain Python values. Every string can be encoded, every integer can become a float.

    Raises:
        PhasewatchError: if it is no JSON, too deep, holds an integer of more than `MOST_DIGITS` digits, a key twice in
            one object, half of a surrogate pair, or a number that isn't finite.

    >>> parse_json('{"step": 3, "loss": 0.5}', "Line 1 of points.jsonl")
    {'step': 3, 'loss': 0.5}
    >>> parse_json('{"step": 3, "step": 4}', "Line 1 of points.jsonl")
    Traceback (most recent call last):
    phasewatch.monitor.errors.PhasewatchError: Line 1 of points.jsonl holds the key 'step' twice; mend or delete it.
    """
    brackets = text.count("[") + text.count("{")
    if brackets <= most_depth and (quick := _quickly(text)) is not None:
        return quick
    reason = None
    try:
        if brackets > most_depth and _depth(text) > most_depth:
            raise _Refused(f"nests deeper than {most_depth} levels")
        value = (_LENIENT if allow_nan else _STRICT).decode(text)
        if not text.isascii() or ("\\u" in text and _HALF.search(text)):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except _Refused as refusal:
        reason = str(refusal)
    except json.JSONDecodeError as error:
        reason = f"is not JSON ({error.msg}, line {error.lineno}, column {error.colno})"
    except UnicodeEncodeError:
        reason = "holds a character that is no text, half of a surrogate pair"
    raise PhasewatchError(f"{printable(name)} {reason}; mend or delete it.")


def loads(text: str) -> Any:
    """As `json.loads`, in half the time: what msgspec refuses, Python's own reader decides.

    Args:
        text: a JSON text of any depth, keys that come twice and numbers beyond a float's range included.

    Returns:
        Plain Python values.

    Raises:
        ValueError, RecursionError: as `json.loads`.

    >>> loads('{"acc": NaN, "acc": 1.0}')
    {'acc': 1.0}
    """
    try:
        return _FAST.decode(text)
    except _REFUSED_BY_FAST:
        return json.loads(text)


class _Refused(Exception):
    """JSON that Python would read, or fail at, and that is turned away."""


_NO_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[^"\[\]{}]++', re.DOTALL)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _depth(text: str) -> int:
    """How deep a JSON text nests, as far as a parser would get, in time proportional to its length."""
    brackets = _NO_BRACKETS.sub("", text)
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise _Refused(f"holds an integer of {integer(len(digits))} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value - value != 0:
        raise _Refused(f"holds {printable(digits, most=40)}, which is beyond a float's range")
    return value


def _no_constant(constant: str) -> float:
    raise _Refused(f"holds {constant}, which is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f"holds the key '{printable(twice, most=40)}' twice")
    return value


def _quickly(text: str) -> dict[str, Any] | None:
    """The object that a line of points is, in half the time; None for what has to be looked at closely."""
    try:
        value = _FAST.decode(text)
    except _REFUSED_BY_FAST:
        return None
    # Each key has its colon: where there are no more colons than keys, none came twice.
    is_plain = type(value) is dict and text.count(":") == _keys(value)
    return value if is_plain and _TOO_MANY_DIGITS not in text.encode().translate(_DIGITS_AS_0) else None


def _keys(value: dict[str, Any]) -> int:
    """How many keys an object has, together with the objects that are its values."""
    count = len(value)
    for inner in value.values():
        if type(inner) is dict:
            count += _keys(inner)
    return count


_FAST = msgspec.json.Decoder()
_REFUSED_BY_FAST = (msgspec.MsgspecError, ValueError, RecursionError)
_TOO_MANY_DIGITS = b"0" * (MOST_DIGITS + 1)
_DIGITS_AS_0 = bytes.maketrans(b"123456789", b"000000000")
_decoder = partial(json.JSONDecoder, object_pairs_hook=_object, parse_int=_integer)
_LENIENT = _decoder()
_STRICT = _decoder(parse_float=_float, parse_constant=_no_constant)


def differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two JSON values differ: the dotted name of each place, with what was there and what is.

    Args:
        before: a value.
        now: another.
        name: of the place where they are.

    Example:
        >>> differences({"seed": 0, "sampler": {"draws": 4}}, {"seed": 0, "sampler": {"draws": 5}})
        [('sampler.draws', 4, 5)]
    """
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in sorted(before.keys() | now.keys())
            for difference in differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [(name, before, now)]
