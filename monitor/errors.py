"""What phasewatch says when something can't be done, or was done without."""

import sys
import warnings


class PhasewatchError(ValueError):
    """Something was asked for that can't be done; the message is a sentence for the person who asked.

    It names what was typed, what came, and what to do. The command line prints it and exits with status 2.
    """


class PhasewatchWarning(UserWarning):
    """Something went wrong that training or a replay goes on without."""


def warn(message: str) -> None:
    """Warn without ever interrupting training, even where warnings are turned into errors."""
    try:
        warnings.warn(message, PhasewatchWarning, stacklevel=3)
    except Exception:
        say(message)


def say(message: str) -> None:
    """Print to the terminal, if there still is one: a run outlives the session that started it."""
    try:
        print(f"phasewatch: {message}", file=sys.stderr)
    except (OSError, ValueError):
        pass
