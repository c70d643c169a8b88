"""Options of the command line that say where a replay measures."""

from collections.abc import Mapping, Sequence

from phasewatch.monitor.errors import PhasewatchError


def options_for(place: str | None, given: Mapping[str, Sequence[str] | None]) -> dict[str, str | int | bool]:
    """The options of the place that a replay measures at, from `--slurm` or `--ray`.

    Args:
        place: what `--on` says.
        given: the values of each option, by its name.

    Returns:
        Values by name.

    Raises:
        PhasewatchError: if they aren't NAME=VALUE, or belong to another place.

    Example:
        >>> options_for("slurm", {"slurm": ["partition=gpu,gpus_per_node=1", "nodelist=a1,a2"]})
        {'partition': 'gpu', 'gpus_per_node': 1, 'nodelist': 'a1,a2'}
    """
    found: dict[str, str] = {}
    for option, values in given.items():
        if values and (place or "").partition("://")[0] != option:
            shown = option if option == "slurm" else "ray://HOST:PORT"
            raise PhasewatchError(f"--{option} {values[0]} goes with --on {shown}; --on {place or 'local'} was given.")
        for value in values or ():
            last = None
            for piece in value.split(","):
                name, equals, rest = piece.partition("=")
                if equals and name.strip():
                    last = name.strip()
                    found[last] = rest
                elif last is not None:  # a comma inside a value, as in nodelist=a1,a2
                    found[last] += f",{piece}"
                else:
                    raise PhasewatchError(f"--{option} {value} must be NAME=VALUE, or several with commas between.")
    return {name: _value(text) for name, text in found.items()}


def _value(text: str) -> str | int | bool:
    if text.isascii() and text.isdigit():
        return int(text)
    return {"true": True, "false": False}.get(text.lower(), text)
