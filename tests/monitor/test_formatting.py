import math
from pathlib import Path

import pytest

from phasewatch.monitor.formatting import count, integer, measured, number, percent, printable, value_and_error


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999, "999"), (40404, "40 404"), (1234567, "1 234 567")])
def test_thousands_are_apart(value, text):
    assert integer(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.9449, "1.945"), (0.0, "0.000"), (0.0123456, "0.0123"), (1.234e-7, "1.23e-07"), (-2345.6, "-2 345.600")],
)
def test_quantities_keep_their_leading_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (142.53, 0.81, "142.5 ± 0.8"),
        (142.53, 3.6, "142.5 ± 3.6"),
        (0.5123, 0.0123, "0.51 ± 0.01"),
        (-12.345, 1.0, "-12.3 ± 1.0"),
        (142.53, math.nan, "142.5"),
        (12345.6, 2.0, "12 345.6 ± 2.0"),
        (0.0, 0.0, "0.0 ± 0.0"),
    ],
)
def test_the_error_decides_how_many_digits_are_worth_printing(value, error, text):
    assert value_and_error(value, error) == text


def test_signs_are_shown_for_changes():
    assert value_and_error(21.43, 0.3, sign=True) == "+21.4 ± 0.3"
    assert number(-0.299, sign=True) == "-0.299"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_dash(value):
    assert number(value) == count(value) == value_and_error(value, 1.0) == "–"
    assert measured(value, value) == ("–", "–")
    assert measured(1.0, value) == ("1.00", "–")


@pytest.mark.parametrize(
    ("probability", "text"),
    [(0.5, "50.0 %"), (0.99149, "99.1 %"), (0.999, "99.9 %"), (0.9991, "> 99.9 %"), (math.nan, "–")],
)
def test_no_confidence_is_rounded_up_or_certainty(probability, text):
    assert percent(probability) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step10.pt",
        "häufige Wörter",
        "日本語\u3000ファイル",
        "λ̂ ± 0.3 → 5\u202f%",
        "👩\u200d🔬",
        "می\u200cخواهم",
        "C:\\runs",
        "a b",
    ],
)
def test_ordinary_text_is_printed_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mRED\x1b]0;OWNED\x07", "a\\x1b[31mRED\\x1b]0;OWNED\\x07"),
        ("one\ntwo\r\n\tthree\x00", "one\\ntwo\\r\\n\\tthree\\x00"),
        ("\x7f\x85\x9b31m", "\\x7f\\x85\\x9b31m"),
        ("cod\u202etxt.exe\u2066\u200f", "cod\\u202etxt.exe\\u2066\\u200f"),
        ("line\u2028paragraph\u2029", "line\\u2028paragraph\\u2029"),
        ("invisible\u200b\ufeff\U000e0041", "invisible\\u200b\\ufeff\\U000e0041"),
        ("half \ud800, a byte \udcff", "half \\ud800, a byte \\udcff"),
    ],
)
def test_what_could_act_on_a_terminal_becomes_an_escape(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown
    shown.encode()


def test_paths_and_errors_are_printed_by_their_text():
    assert printable(Path("runs/a\nb")) == "runs/a\\nb"
    assert printable(ValueError("a\x1bb")) == "a\\x1bb"


def test_long_text_is_cut_in_its_middle():
    assert printable("a" * 200) == "a" * 200
    assert printable("a" * 500_000 + "b" * 289_000, most=40) == "a" * 7 + "...[789 000 characters]..." + "b" * 7
    assert printable("\x1b" * 100, most=50).startswith("\\x1b\\x1b\\x1b")
    assert printable("\x1b" * 100, most=50).endswith("\\x1b\\x1b\\x1b")
    assert printable("\x1b" * 20, most=77) == "\\x1b" * 7 + "...[20 characters]..." + "\\x1b" * 7
    assert len(printable("\n" * 10**6)) == len(printable("c" * 201)) == 200
    assert printable("a" * 1000, most=1) == "...[1 000 characters]..."
