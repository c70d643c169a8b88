"""What phasewatch says when something can't be done, or was done without."""

import operator
import sys
import warnings


class PhasewatchError(ValueError):
    """Something was asked for that can't be done; the message is a sentence for the person who asked.

    It names what was typed, what came, and what to do. The command line prints it and exits with status 2.
    """


class PhasewatchWarning(UserWarning):
    """Something went wrong that training or a replay goes on without."""


def warn(message: str) -> None:
    """Warn at the line of the user that led here, and never interrupt training, even where warnings are errors."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("phasewatch."):
        frame, level = frame.f_back, level + 1
    try:
        warnings.warn(message, PhasewatchWarning, stacklevel=level)
    except Exception:
        say(message)


def say(message: str) -> None:
    """Print to the terminal, if there still is one: a run outlives the one that started it."""
    try:
        print(f"phasewatch: {message}", file=sys.stderr)
    except (OSError, ValueError):
        pass


def in_words(error: Exception) -> str:
    """Our own sentences as they are, somebody else's exception with its type."""
    return str(error) if isinstance(error, PhasewatchError) else f"{type(error).__name__}: {error}"


def whole_number(call: str, value: object, *, least: int, most: int | None = None) -> int:
    """A whole number of any library as an int.

    Args:
        call: the call as it is typed, with `...` for the value, such as "every(n=...)".
        value: what came.
        least: the smallest that makes sense.
        most: the largest; None for no bound.

    Returns:
        The number.

    Raises:
        PhasewatchError: if it is none, or out of bounds.
    """
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise PhasewatchError(f"{call.replace('...', repr(value))} must be a whole number {bounds}.")
    return number
