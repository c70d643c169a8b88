import json
import math
import time

import pytest

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.strict_json import MOST_DIGITS, parse_json

NAME = "Line 3 of points.jsonl"


@pytest.mark.parametrize(
    "value",
    [
        {"step": 10, "loss": 2.5, "llc": {"value": 31.0, "per_chain": [1, -2.5e-300], "health": "OK"}, "parts": {}},
        ["é", "\U0001f600", 'brackets [[[{{{ and "quotes" \\', "", True, False, None],
        [10 ** (MOST_DIGITS - 1), -(2**64), 0, 1.7976931348623157e308, 5e-324],
        "text",
        7,
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_what_python_writes_comes_back(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text, NAME) == parse_json(text, NAME, allow_nan=True) == value


def test_brackets_in_strings_are_no_depth():
    text = json.dumps({"[" * 1000: '\\"{' * 1000})
    assert parse_json(text, NAME, 1) == json.loads(text)


@pytest.mark.parametrize("depth", [1, 5, 64, 65, 400, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"a":', '["\\"]",[', '[{"]":'])
def test_depth_is_bounded_before_parsing(opening, depth):
    levels = sum(opening.count(bracket) for bracket in "[{") * depth
    if levels > 64:
        with pytest.raises(PhasewatchError, match=rf"^{NAME} nests deeper than 64 levels; mend or delete it\.$"):
            parse_json(opening * depth, NAME)
    else:
        with pytest.raises(PhasewatchError, match="is not JSON"):
            parse_json(opening * depth, NAME)


def test_the_bound_of_depth_is_exact():
    assert parse_json("[[[]],[[]]]", NAME, 3) == [[[]], [[]]]
    with pytest.raises(PhasewatchError, match="deeper than 2 levels"):
        parse_json("[[[]],[[]]]", NAME, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"is not JSON \(Expecting value, line 1, column 1\)"),
        ("{'a': 1}", "is not JSON"),
        ("[1,]", "is not JSON"),
        ('"\n"', "is not JSON"),
        ("[}" * 500, "is not JSON"),
        ("9" * 100_000, "holds an integer of 100 000 digits"),
        ("-" + "9" * 400, "holds an integer of 401 digits"),
        ("NaN", "holds NaN, which is no JSON"),
        ("[-Infinity]", "holds -Infinity, which is no JSON"),
        ("[1e999]", "holds 1e999, which is beyond a float's range"),
        ("[-1" + "0" * 100_000 + ".5]", r"holds -1000.*\.\.\.\[100 004 characters\]\.\.\..*, which is beyond"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "holds the key 'c' twice"),
        ('{"\\u001b[31m": 1, "\\u001b[31m": 2}', r"holds the key '\\x1b\[31m' twice"),
        ('["\\ud800"]', "holds a character that is no text, half of a surrogate pair"),
        ('{"\\udc00\\ud800": 1}', "holds a character that is no text, half of a surrogate pair"),
        ('"\ud800"', "holds a character that is no text, half of a surrogate pair"),
    ],
)
def test_what_is_no_json_is_a_sentence(text, reason):
    with pytest.raises(PhasewatchError, match=rf"^{NAME} {reason}.*; mend or delete it\.$") as caught:
        parse_json(text, NAME)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_numbers_that_are_not_finite_are_read_where_that_is_allowed():
    nan, infinite, large = parse_json("[NaN, -Infinity, 1e999]", NAME, allow_nan=True)
    assert math.isnan(nan)
    assert (infinite, large) == (-math.inf, math.inf)
    with pytest.raises(PhasewatchError, match="holds an integer of 400 digits"):
        parse_json("9" * 400, NAME, allow_nan=True)


def test_the_name_is_shown_without_its_escape_sequences():
    with pytest.raises(PhasewatchError, match=r"^a\\x1b\[2J\\n is not JSON"):
        parse_json("?", "a\x1b[2J\n")


@pytest.mark.parametrize(
    "hostile",
    [
        "[" * 65 + '"' + '\\"' * 1_000_000,
        '"' * 2_000_001 + "[" * 100,
        "[" * 65 + "\\" * 2_000_000,
        "[]," * 700_000,
        "{" + ",".join(f'"{i}":0' for i in range(200_000)) + ',"199999":0}',
    ],
    ids=["open string", "quotes", "backslashes", "lists", "keys"],
)
def test_the_time_is_proportional_to_the_length(hostile):
    start = time.process_time()
    with pytest.raises(PhasewatchError):
        parse_json(hostile, NAME)
    assert time.process_time() - start < 5  # a square of the length takes hours


@pytest.mark.parametrize("allow_nan", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 1}',
        '{"a" : 1, "b": {"c":{"a"\n: 1, "\\u0061": 2}}}',
        '{"a": [{"b": 1, "b": 2}]}',
        '[{"a": 1, "a": 1}]',
        '{"a": {"b": 1}, "a": 2}',
        '{"a": {}, "a": ":"}',
    ],
)
def test_a_key_that_comes_twice_is_found_wherever_it_is(text, allow_nan):
    with pytest.raises(PhasewatchError, match="twice"):
        parse_json(text, NAME, allow_nan=allow_nan)


@pytest.mark.parametrize(
    "text", ['{"a:": ":", "b": {"a:": {}}}', '{"a": [{"a": 1}, {"a": 2}]}', ' {"a" :1} ', '{"": {}}']
)
def test_keys_that_come_once_in_each_object_are_read(text):
    assert parse_json(text, NAME) == parse_json(text, NAME, allow_nan=True) == json.loads(text)
