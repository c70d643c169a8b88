"""What the science leaves to the rim, pictures and servers, is imported by name when it is asked for."""

import importlib
from types import ModuleType

from phasewatch.monitor.errors import requires


def rim(module: str, what: str) -> ModuleType:
    """A module of `phasewatch.callbacks`, for a method that is only a short way to it, such as `Trajectory.plot`.

    Args:
        module: its name below `phasewatch.callbacks`.
        what: the call that needs it, as the user typed it.

    Returns:
        The module.

    Raises:
        PhasewatchError: if it needs a package that isn't installed.
    """
    with requires(what):
        return importlib.import_module(f"phasewatch.callbacks.{module}")
