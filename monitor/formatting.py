"""Numbers as a person reads them: thousands apart, as many digits as the error allows, never "nan"."""

import math
import unicodedata

MISSING = "–"

_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # Persian words and composed emoji need them


def integer(value: int) -> str:
    """A count or a step with a space between thousands: `40 404`."""
    return f"{value:,}".replace(",", " ")


def count(value: float) -> str:
    """A count that may be a fraction or unknown, such as an effective number of draws: `412`, or `–`."""
    return integer(round(value)) if math.isfinite(value) else MISSING


def number(value: float, *, sign: bool = False) -> str:
    """A quantity without an error: three decimals from 0.1 to 100 000, else three digits; `–` if it isn't finite."""
    if not math.isfinite(value):
        return MISSING
    plus = "+" if sign else ""
    if value == 0 or 0.1 <= abs(value) < 1e5:
        return f"{value:{plus},.3f}".replace(",", " ")
    return f"{value:{plus}.3g}"


def measured(value: float, error: float, *, sign: bool = False) -> tuple[str, str]:
    """A value and its standard error to the error's first digit, at least one decimal; `–` for what isn't finite."""
    if not math.isfinite(value):
        return MISSING, MISSING
    known = math.isfinite(error)
    scale = error if known and error > 0 else abs(value) / 100
    decimals = min(max(1, -math.floor(math.log10(scale))), 6) if scale > 0 else 1
    plus = "+" if sign else ""

    def fixed(x: float, plus: str = "") -> str:
        return f"{x:{plus},.{decimals}f}".replace(",", " ") if abs(x) < 1e7 else f"{x:{plus}.3g}"

    return fixed(value, plus), fixed(error) if known else MISSING


def value_and_error(value: float, error: float, *, sign: bool = False) -> str:
    """`142.5 ± 0.8`, or the value alone when its error isn't known."""
    text, spread = measured(value, error, sign=sign)
    return text if spread == MISSING else f"{text} ± {spread}"


def percent(probability: float) -> str:
    """A probability in percent, rounded down: nothing measured is certain. `–` for what isn't finite."""
    if not math.isfinite(probability):
        return MISSING
    return "> 99.9 %" if probability > 0.999 else f"{math.floor(probability * 1000) / 10:.1f} %"


def printable(text: object, most: int = 200) -> str:
    r"""Text from others as one line that does nothing but show itself, for terminals, logs and messages.

    Control characters, line ends, bidirectional overrides, other invisible characters and half surrogates become
    escapes such as `\x1b`, `\n` and `\u202e`. Letters of every script, blanks and joiners stay, so that what is
    printable already stays as it is.

    Args:
        text: a string, or what `str` makes one of, such as a path.
        most: characters of the result; longer text is cut in its middle, where its length is noted.

    Returns:
        The text to print.

    >>> printable("step10\x1b[31m\n.pt")
    'step10\\x1b[31m\\n.pt'
    >>> printable("a" * 1000, most=30)
    'aaa...[1 000 characters]...aaa'
    """
    text = str(text)
    if len(text) <= most:
        shown = _escaped(text)
        if len(shown) <= most:
            return shown
    note = f"...[{integer(len(text))} characters]..."
    kept = max(most - len(note), 0)
    head, tail = _escaped(text[:kept])[: kept - kept // 2], _escaped(text[max(len(text) - kept, 0) :])
    return head + note + (tail[-(kept // 2) :] if kept // 2 else "")


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in _JOINERS or unicodedata.category(char) == "Zs"
        else char.encode("unicode_escape").decode()
        for char in text
    )
