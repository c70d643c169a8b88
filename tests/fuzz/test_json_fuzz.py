"""The fast reader changes no value and no message of Python's own. FUZZ_EXAMPLES=10000 searches for longer."""

import json
import os
import struct
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from phasewatch.monitor import strict_json
from phasewatch.monitor.emergence.lines import LeftOut, parse_line
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.strict_json import MOST_DIGITS, loads, parse_json

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

DIGITS = st.text("0123456789", min_size=1, max_size=40)
NUMBERS = st.one_of(
    st.sampled_from(
        ["NaN", "-Infinity", "-0", "-0.0", "1e999", "-1e-999", "01", "1.", ".5", "+1", "1e", "2.2250738585072011e-308"]
    ),
    st.sampled_from(["1" * MOST_DIGITS, "1" * (MOST_DIGITS + 1), "1" * 5000, "0." + "7" * 400, "18446744073709551616"]),
    st.integers().map(str),
    DIGITS,
    st.builds("{}{}.{}e{}".format, st.sampled_from(["", "-"]), DIGITS, DIGITS, st.integers(-400, 400)),
    st.integers(0, 2**64 - 1).map(lambda bits: repr(struct.unpack("d", struct.pack("Q", bits))[0])),
)
STRINGS = st.one_of(
    st.sampled_from(
        [
            '""',
            '"a"',
            '"a:"',
            '"\\ud800"',
            '"\\ud83d\\ude00"',
            '"\\u0061"',
            '"\\u0000"',
            '"\t"',
            '"\x7f"',
            '"\\x"',
            "'a'",
        ]
    ),
    st.sampled_from(['"step"', '"doc_id"', '"resps"', '"target"', '"arguments"', '"acc"']),
    st.text(max_size=5).map(json.dumps),
    st.text(max_size=5).map(lambda text: json.dumps(text, ensure_ascii=False)),
)
SPACES = st.sampled_from(["", "", "", " ", "\n", "\r\t", "\v", "\ufeff"])


def listed(inner):
    return st.builds(lambda items, space: f"[{space}{f',{space}'.join(items)}]", st.lists(inner, max_size=4), SPACES)


def named(inner):
    pairs = st.lists(st.builds("{}{}:{}{}".format, STRINGS, SPACES, SPACES, inner), max_size=4)
    return st.builds(lambda items, space: f"{{{f'{space},'.join(items)}{space}}}", pairs, SPACES)


TEXTS = st.recursive(
    st.one_of(NUMBERS, STRINGS, st.sampled_from(["true", "false", "null", "tru", ""])),
    lambda inner: st.one_of(listed(inner), named(inner)),
    max_leaves=12,
)
CUTS = st.tuples(st.integers(0, 60), st.integers(0, 3), st.text('[]{}:,"\\0e-u \ud800', max_size=2))


@st.composite
def texts(draw):
    text = draw(TEXTS)
    for at, count, put in draw(st.lists(CUTS, max_size=2)):
        text = text[:at] + put + text[at + count :]
    return text


def answer(read):
    """What reading gives, types and the last bit included, or the error in words."""
    try:
        return repr(read())
    except (PhasewatchError, ValueError, RecursionError, LeftOut) as error:
        return type(error).__name__, str(error)


@fuzz
@given(texts(), st.booleans())
@example('{"a": 1' + "0" * MOST_DIGITS + "}", True)
@example('{"a": {"a": 1}, "a": 2}', True)
@example('{"a": "\ud800"}', False)
def test_values_and_messages_are_those_of_pythons_own_reader(text, allow_nan):
    with mock.patch.object(strict_json, "_quickly", return_value=None):
        slow = answer(lambda: parse_json(text, "Line 3", allow_nan=allow_nan))
    assert answer(lambda: parse_json(text, "Line 3", allow_nan=allow_nan)) == slow
    assert answer(lambda: loads(text)) == answer(lambda: json.loads(text))


LINE = {"doc_id": 3, "target": "1", "resps": [[["-1.5", "False"]], [["-0.5", "True"]]], "acc": 1.0}
LINE["arguments"] = {f"gen_args_{c}": {"arg_0": "a: é", "arg_1": f" {c}"} for c in range(2)}


@fuzz
@given(st.lists(CUTS, max_size=2), st.text(max_size=3), texts())
def test_a_line_of_samples_is_read_as_by_pythons_own_reader(cuts, key, value):
    text = json.dumps({key: 0} | LINE, ensure_ascii=False).replace(": 0", f": {value}", 1)
    for at, count, put in cuts:
        text = text[: 7 * at] + put + text[7 * at + count :]
    line = text.encode("utf-8", "surrogatepass")
    with mock.patch("phasewatch.monitor.emergence.lines.loads", json.loads):
        slow = answer(lambda: parse_line(line))
    assert answer(lambda: parse_line(line)) == slow


@pytest.mark.parametrize("depth", [10, 500, 900, 5000, 100_000])
def test_depth_is_refused_or_read_as_by_pythons_own_reader(depth):
    for text in ("[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth):
        assert answer(lambda text=text: loads(text)) == answer(lambda text=text: json.loads(text))
