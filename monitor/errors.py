"""What phasewatch says when something can't be done, or was done without."""

import math
import operator
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

from phasewatch.monitor.formatting import printable

MOST_CHARACTERS = 2000
"""Longer messages are cut in their middle; the longest that we write ourselves have about a third of it."""

LARGEST_STEP = 2**63 - 1
"""No larger number counts as a training step: numpy's integers end there."""


class PhasewatchError(ValueError):
    """Something was asked for that can't be done; the message is a sentence for the person who asked.

    It names what was typed, what came, and what to do. The command line prints it and exits with status 2. What it
    quotes may come from a file of somebody else's, so it is made printable.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, MOST_CHARACTERS))


class PhasewatchWarning(UserWarning):
    """Something went wrong that training or a replay goes on without."""


def warn(message: str) -> None:
    """Warn at the line of the user that led here, and never interrupt training, even where warnings are errors."""
    message = printable(message, MOST_CHARACTERS)
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
        print(f"phasewatch: {printable(message, MOST_CHARACTERS)}", file=sys.stderr)
    except (OSError, ValueError):
        pass


def in_words(error: Exception) -> str:
    """Our own sentences as they are, somebody else's exception with its type and in one line."""
    if isinstance(error, PhasewatchError):
        return str(error)
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}", MOST_CHARACTERS)


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


def real_number(
    call: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    hint: str = "",
) -> float:
    """A finite number of any library as a float.

    Args:
        call: the call as it is typed, with `...` for the value, such as "Budget(fraction=...)".
        value: what came.
        above: what it has to exceed.
        least: the smallest that makes sense.
        below: what it must not reach.
        most: the largest that makes sense.
        hint: what to do about it, added to the message.

    Returns:
        The number.

    Raises:
        PhasewatchError: if it is none, or out of bounds.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    number = float(value) if is_number else math.nan  # pyright: ignore[reportArgumentType]
    bounds = [("above", above), ("at least", least), ("below", below), ("at most", most)]
    inside = (
        (above is None or number > above)
        and (least is None or number >= least)
        and (below is None or number < below)
        and (most is None or number <= most)
    )
    if not is_number or not inside:
        words = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        raise PhasewatchError(
            f"{call.replace('...', repr(value))} must be a finite number{f' {words}' if words else ''}"
            f"{f', {hint}' if hint else ''}."
        )
    return number


EXTRAS = {
    "IPython": "notebook",
    "devinterp": "devinterp",
    "gcsfs": "gs",
    "huggingface_hub": "hub",
    "jinja2": "report",
    "lightning": "lightning",
    "markupsafe": "report",
    "matplotlib": "report",
    "PIL": "wandb",
    "ray": "ray",
    "s3fs": "s3",
    "submitit": "slurm",
    "tensorboard": "tensorboard",
    "tokenizers": "toys",
    "transformer_lens": "toys",
    "transformers": "hf",
    "wandb": "wandb",
}
"""The extra of this project that brings each optional package."""


def missing_package(error: ModuleNotFoundError, what: str) -> Exception:
    """A sentence for an optional package that isn't installed; any other error as it is.

    Args:
        error: what its import raised.
        what: what needs it, as the user typed it, such as "WandbSink()".

    Returns:
        What to raise.
    """
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return error
    return PhasewatchError(
        f"{what} needs the package {package}, which isn't installed. Run: pip install 'phasewatch[{EXTRAS[package]}]'"
    )


@contextmanager
def requires(what: str) -> Iterator[None]:
    """Turn a missing optional package into a sentence with the command that installs it.

    Args:
        what: what needs it, as the user typed it, such as "WandbSink()".

    Raises:
        PhasewatchError: if the import inside fails because an optional package isn't installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_package(error, what) from error
