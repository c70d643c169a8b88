"""The tables under results/: Markdown for reading, and csv, which a run may bring up to date in part."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phasewatch import Health, Trajectory, Transition
from phasewatch.monitor.files import write_atomically


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


def keep_table(results: Path | None, experiment: str, lines: Sequence[str]) -> None:
    """Print an experiment's table, and keep it.

    Args:
        results: the folder that it is kept in; None to print it alone.
        experiment: its name.
        lines: of Markdown.
    """
    text = "\n".join([f"# Output of `python experiments/{experiment}.py`", "", *lines]) + "\n"
    print(text)
    if results is not None:
        write_atomically(results / f"{experiment}.md", text)


def markdown(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Rows as a Markdown table, the columns in the order of their first appearance.

    Args:
        rows: by column; what a row lacks is left empty.

    Returns:
        Its lines.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in table]


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def kinds(found: Sequence[Transition]) -> str:
    """The kinds of some transitions, as a cell of a table."""
    return " ".join(t.kind.label for t in found)


def stretches(found: Sequence[Transition]) -> str:
    """Where some transitions start and end, as a cell of a table."""
    return ", ".join(f"{t.start} to {t.end}" for t in found)


def llc_changes(found: Sequence[Transition]) -> str:
    """How much λ̂ changes in some transitions, as a cell of a table."""
    return ", ".join(with_error(t.llc_change, t.changes["llc"].error) for t in found)


def with_error(change: float, error: float) -> str:
    """A change and twice its standard error."""
    return f"{change:+.1f} ± {2 * error:.1f}"


def not_ok(trajectory: Trajectory) -> str:
    """How many points have another verdict than OK, as a cell of a table."""
    return f"{sum(point.llc.health is not Health.OK for point in trajectory)} of {len(trajectory)}"
