"""The one exception that phasewatch raises at its users."""


class PhasewatchError(ValueError):
    """Something was asked for that can't be done; the message is a sentence for the person who asked.

    It names what was typed, what came, and what to do. The command line prints it and exits with status 2.
    """


class PhasewatchWarning(UserWarning):
    """Something went wrong that training or a replay can go on without."""
