"""The csv tables under results/, which a run may bring up to date in part."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def keep(path: Path, rows: Sequence[Mapping[str, Any]], *, by: Sequence[str]) -> None:
    """Write rows to a table in place of those that it has of the same cases; all others stay as and where they are.

    Args:
        path: of the csv file, which needn't be there.
        rows: by column.
        by: the columns that name a case, which may have several rows.
    """

    def case(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in by)

    held: list[Mapping[str, Any]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            held += csv.DictReader(file)
    places = {name: place for place, name in enumerate(dict.fromkeys(map(case, [*held, *rows])))}
    measured = set(map(case, rows))
    table = sorted([*(row for row in held if case(row) not in measured), *rows], key=lambda row: places[case(row)])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, list(dict.fromkeys(column for row in [*rows, *held] for column in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(table)
