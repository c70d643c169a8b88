"""Files that are whole under their name at every moment."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write beside a file and rename, so that a reader or a killed process leaves the old one or the new one.

    Args:
        path: the file, replaced if it is there.
        text: what it is to hold, as UTF-8.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
