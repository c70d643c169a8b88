"""Rows of named cells become points: which column is the step, which rows are one point, which cells are numbers."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError
from phasewatch.monitor.formatting import integer, printable
from phasewatch.monitor.progress import progress
from phasewatch.monitor.trajectories.points import Point, estimate_without_diagnostics

MOST_COLUMNS = 5000
"""A table with more columns is refused; the widest exports of a W&B chart have some hundreds."""

MOST_CHAINS = 256
"""A table with more columns of chains is refused, since each point keeps a number for each of them."""

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, in words for messages, and its cells by column."""

_CHAIN = re.compile(r"llc_chain[0-9]{1,9}")
_FIRST_STEPS = ("step", "global_step", "trainer/global_step", "train/global_step")
_LAST_STEPS = ("Step", "_step")  # W&B's count of rows, which is a training step only where nothing else says it
_OTHER_STEPS = {
    *("step", "steps", "train_step", "training_step", "optimizer_step", "num_steps", "num_updates"),
    *("iteration", "iterations", "iter", "iters", "iter_num"),
}
_EMPTY = {
    *("", "-", "na", "n/a", "#n/a", "#na", "<na>", "null", "none", "nil"),
    *("∞", "+∞", "-∞", "1.#inf", "-1.#inf", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"),
}
"""Cells in lower case that hold no number in what spreadsheets, pandas and Windows write, and no mistake either."""

_NOT_TRAINING = {"eval", "evaluation", "val", "valid", "validation", "test"}


def plain_names(columns: Sequence[str], signal: str) -> list[str]:
    """Column names without what W&B puts around them: the run's name in an export, and `phase/` before our own.

    Where a column has the plain name already, `phase/loss` is the loss that belongs to λ̂, and the other one is called
    `user/loss`; any other signal keeps the user's column.

    Args:
        columns: as they are in the file.
        signal: whose transitions are sought; a column of this very name is left as it is.

    Returns:
        A name for each.
    """
    exported = any(column.endswith(("__MIN", "__MAX")) for column in columns)
    shown = [column.rpartition(" - ")[2] if exported else column for column in columns]
    ours = {name for name in shown if name.startswith("phase/") and name != signal}
    taken = {name for name in shown if f"phase/{name}" in ours}
    if signal == "llc":
        return [f"user/{name}" if name in taken else name.removeprefix("phase/") for name in shown]
    return [name if name == signal or name[6:] in taken else name.removeprefix("phase/") for name in shown]


def points_of_records(
    records: Sequence[Row], name: str, signal: str, step: str | None = None, *, last_counts: bool = False
) -> list[Point]:
    """Points from rows of which each has its own columns, as in a jsonl; otherwise as `points_of_rows`."""
    if not records:
        return []
    columns = list(dict.fromkeys(column for _, row in records for column in row))
    plain = dict(zip(columns, plain_names(columns, signal), strict=True))
    rows = [(where, {plain[column]: cell for column, cell in row.items()}) for where, row in records]
    return points_of_rows(rows, list(plain.values()), name, signal, step, last_counts=last_counts)


def points_of_rows(
    rows: Sequence[Row],
    columns: Sequence[str],
    name: str,
    signal: str,
    step: str | None = None,
    *,
    last_counts: bool = False,
) -> list[Point]:
    """Points from rows of named cells, of text or of JSON.

    Rows of one step that complete each other are one point, as loggers write the training's and the evaluation's values
    in rows of their own. In a column that isn't needed for the signal, a cell that is not a number counts as empty, and
    of several values the last one counts. A value that isn't finite counts as empty everywhere.

    Args:
        rows: the rows, in the order of the file.
        columns: the names of all columns, by `plain_names`.
        name: of the file, for messages.
        signal: "llc", "loss" or the name of a metric, which has to be there.
        step: the column of the training step; found by its name if left out.
        last_counts: of several values of the signal at one step the last one counts, as in logs that were resumed.

    Returns:
        The points in the order of their first rows.

    Raises:
        PhasewatchError: a column that is needed is missing or there twice, or a cell that is needed can't be read.
    """
    steps = [step] if step is not None else _step_columns(columns)
    _check_columns(columns, name, signal, steps)
    chains = sorted((c for c in columns if _CHAIN.fullmatch(c)), key=lambda c: int(c.removeprefix("llc_chain")))
    needed = {signal, *(["loss", "llc", "llc_error", *chains] if signal == "llc" else [])}
    numbered = [
        (where, row, _numbers(row, where, needed, steps))
        for where, row in progress(rows, f"Reading {printable(name, 40)}")
    ]
    step_column = _step_column(steps, [row for _, row, values in numbered if needed & values.keys()])

    found: dict[int, dict[str, float]] = {}
    others: list[tuple[int, dict[str, float]]] = []
    for where, row, values in numbered:
        cell = row.get(step_column)
        if _is_empty(cell) and not needed & values.keys():
            continue  # another curve's row in an export of several
        values.pop(step_column, None)
        at = _step(cell, where, step_column)
        known = found.setdefault(at, values)
        if known is values:
            continue
        if last_counts or all(known.get(column, values[column]) == values[column] for column in needed & values.keys()):
            known.update(values)
        else:
            others.append((at, values))  # the trajectory says how they contradict each other
    return [_point(at, values, chains) for at, values in (*found.items(), *others)]


def _step_columns(columns: Sequence[str]) -> list[str]:
    """The columns that may hold the training step, the likeliest first."""

    def rank(column: str) -> int | None:
        if column in _LAST_STEPS:
            return 100 + _LAST_STEPS.index(column)
        if column in _FIRST_STEPS:
            return _FIRST_STEPS.index(column)
        *above, last = column.lower().replace(" ", "_").split("/")
        if _NOT_TRAINING & set(above):
            return None
        return 10 if last == "global_step" else 20 if last in _OTHER_STEPS else None

    ranked = [(place, column) for column in dict.fromkeys(columns) if (place := rank(column)) is not None]
    return [column for _, column in sorted(ranked, key=lambda pair: pair[0])]


def _step_column(steps: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The first of the columns that has a cell in every row with the signal."""
    return next((step for step in steps if not any(_is_empty(row.get(step)) for row in rows)), steps[0])


def _check_columns(columns: Sequence[str], name: str, signal: str, steps: Sequence[str]) -> None:
    if len(columns) > MOST_COLUMNS:
        raise too_many_columns(name, len(columns))
    signals = [c for c in columns if not (_CHAIN.fullmatch(c) or c in {"step", "llc_error"})]
    if signal not in {"llc", "loss", *signals}:
        raise lacks(name, signal, [c for c in signals if not c.endswith(("__MIN", "__MAX"))])
    for needed in [*(steps[:1] or ["step"]), *(["loss", "llc"] if signal == "llc" else [signal])]:
        if columns.count(needed) != 1:
            found = "no column" if needed not in columns else f"{columns.count(needed)} columns"
            advice = "" if needed in {"step", *steps} or needed in columns else "; ask for another signal"
            advice = (
                "; name the one that counts it (--step, or read(..., step=...))"
                if needed == "step" and needed not in columns
                else advice
            )
            raise PhasewatchError(
                f"{name} has {found} '{printable(needed, 60)}', and needs one; its columns are "
                f"{_listed(list(columns))}{advice}."
            )
    seen: set[str] = set()
    for column in columns:
        if column in seen:
            raise PhasewatchError(f"{name} has the column '{printable(column, 60)}' twice; rename one of them.")
        seen.add(column)
    if sum(_CHAIN.fullmatch(column) is not None for column in columns) > MOST_CHAINS:
        raise PhasewatchError(f"{name} has the columns of more than {MOST_CHAINS} chains; leave some out.")


def too_many_columns(name: str, count: int) -> PhasewatchError:
    """What is said of a table that is too wide."""
    return PhasewatchError(
        f"{name} has {integer(count)} columns, and at most {integer(MOST_COLUMNS)} are read; leave some out."
    )


def lacks(name: str, signal: str, there: list[str]) -> PhasewatchError:
    """What is said where a signal isn't there, with those that are."""
    return PhasewatchError(f"{name} has no signal '{printable(signal, 60)}'; it has {_listed(there) or 'none'}.")


def _listed(names: list[str]) -> str:
    """Names for a message: each in one short piece, the first twenty of them."""
    more = f" and {integer(len(names) - 20)} more" if len(names) > 20 else ""
    return ", ".join(printable(name, 60) for name in names[:20]) + more


def _numbers(row: Mapping[str, Any], where: str, needed: set[str], steps: Sequence[str]) -> dict[str, float]:
    """The finite numbers of a row by column; what is "step" and nothing else isn't one of them."""
    values = {}
    for column, cell in row.items():
        if column == "step" and column in steps:
            continue
        value = _number(cell, where, column, needed=column in needed)
        if column == "llc_error" and value < 0:
            raise PhasewatchError(
                f"{where}, column 'llc_error', holds {_quoted(cell)}; a standard error isn't negative. Correct it, or "
                "leave it empty."
            )
        if math.isfinite(value):
            values[column] = value
    return values


def _is_empty(cell: Any) -> bool:
    return (
        cell is None
        or (isinstance(cell, str) and cell.lower() in _EMPTY)
        or (isinstance(cell, float) and math.isnan(cell))
    )


def _number(cell: Any, where: str, column: str, *, needed: bool) -> float:
    """A cell's number, NaN where it is empty; in a column that is needed, anything else is refused."""
    try:
        return math.nan if _is_empty(cell) else float(cell)
    except (TypeError, ValueError):
        if not needed:
            return math.nan
        raise PhasewatchError(
            f"{where}, column {_quoted(column)}, holds {_quoted(cell)}, not a number; correct it, or leave it empty."
        ) from None


def _step(cell: Any, where: str, column: str) -> int:
    try:
        value = float(cell)
        step = int(cell) if isinstance(cell, int) or (isinstance(cell, str) and cell.isdecimal()) else int(value)
    except (TypeError, ValueError, OverflowError):
        value, step = math.nan, -1
    if not 0 <= step <= LARGEST_STEP or not value.is_integer():
        raise PhasewatchError(
            f"{where}, column {_quoted(column)}, holds {_quoted(cell)}; "
            f"a training step is a whole number from 0 to {LARGEST_STEP}."
        )
    return step


def _quoted(cell: Any) -> str:
    return f"'{printable(cell, 60)}'" if isinstance(cell, str) else printable(repr(cell), 60)


def _point(step: int, values: dict[str, float], chains: Sequence[str]) -> Point:
    no_metrics = {"loss", "llc", "llc_error", *chains}
    per_chain = [values.get(chain, math.nan) for chain in chains if "llc" in values]
    return Point(
        step=step,
        loss=values.get("loss", math.nan),
        llc=estimate_without_diagnostics(values.get("llc", math.nan), values.get("llc_error"), per_chain),
        metrics={column: value for column, value in values.items() if column not in no_metrics},
    )
