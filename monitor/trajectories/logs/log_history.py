"""The `log_history` of Hugging Face's Trainer, or any other list of rows in a JSON file, as rows."""

from pathlib import Path

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import read_json
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.trajectories.rows import Row

MOST_BYTES = 64 * 2**20
"""A larger file is refused; 200,000 rows of a Trainer have 30 MB."""


def read_log_history(path: Path, within: Path | None) -> list[Row]:
    """The rows that a Trainer logged, in order.

    Args:
        path: a `trainer_state.json`, or a JSON file with a list of rows.
        within: the folder that no link may lead out of; None where the user named the file itself.

    Returns:
        The rows as they are.

    Raises:
        PhasewatchError: if the file can't be read or holds no rows.
    """
    name = printable(path)
    content = read_json(path, within=within, most_bytes=MOST_BYTES, allow_nan=True)
    entries = content.get("log_history") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise PhasewatchError(
            f"{name} has no log_history; give the trainer_state.json of a Trainer, a list of rows, a .jsonl or a .csv."
        )
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise PhasewatchError(
                f"Entry {number} of {name} is not an object of named values; correct it or delete it."
            )
    return [(f"Entry {number} of {name}", entry) for number, entry in enumerate(entries, start=1)]
