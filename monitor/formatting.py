"""Numbers as a person reads them: thousands apart, as many digits as the error allows, never "nan"."""

import math

MISSING = "–"


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
