"""A probe from a Python file of the user's."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from phasewatch.monitor.errors import PhasewatchError, in_words

if TYPE_CHECKING:
    from phasewatch.monitor.probing.probe import Probe


def load_probe(spec: str) -> "Probe":
    """Import a probe from the user's file.

    Args:
        spec: "FILE.py:NAME", the name of a Probe or of a function that returns one.

    Returns:
        The probe.

    Raises:
        PhasewatchError: if there is no such file or name, it fails, or it is no probe.
    """
    from phasewatch.monitor.probing.probe import Probe

    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not name or not path.is_file():
        raise PhasewatchError(
            f"--probe {spec} must be FILE.py:NAME, a Python file and the name of a Probe in it (or of a function that "
            f"returns one); {'there is no such file' if file and name else 'the colon and the name are missing'}."
        )
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module = importlib.import_module(path.stem)
    except SystemExit as error:
        raise PhasewatchError(f"--probe {spec}: importing {path} called sys.exit({error.code!r}).") from error
    except Exception as error:
        raise PhasewatchError(f"--probe {spec}: importing {path} failed with {in_words(error)}") from error
    origin = getattr(module, "__file__", None)
    if origin is None or Path(origin).resolve() != path.resolve():
        raise PhasewatchError(
            f"--probe {spec}: {path.stem} is also the name of another module ({origin or 'built into Python'}), "
            "which Python finds first. Rename the file."
        )
    found = getattr(module, name, None)
    if found is None:
        raise PhasewatchError(f"--probe {spec}: {path} has no {name}.")
    if not isinstance(found, Probe) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise PhasewatchError(f"--probe {spec}: {name}() failed with {in_words(error)}") from error
    if not isinstance(found, Probe):
        came = type(found).__name__
        raise PhasewatchError(f"--probe {spec} must be a Probe or a function that returns one; a {came} came.")
    return found
