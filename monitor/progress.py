"""How far something long has come, on a terminal."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

PROGRESS_SECONDS = 1.0
"""What takes longer than this shows its progress."""

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, unit: str = " rows") -> Iterable[Item]:
    """The same items; on a terminal with a bar, if they take longer than `PROGRESS_SECONDS`.

    Args:
        items: what is gone through.
        what: what is done, before the bar.
        unit: of an item, with the blank before it.
    """
    return tqdm(items, what, unit=unit, unit_scale=True, delay=PROGRESS_SECONDS, leave=False, disable=None)
