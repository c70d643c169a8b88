"""Logged samples of many checkpoints, read into arrays."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from phasewatch.monitor.emergence.columns import Columns, together
from phasewatch.monitor.emergence.items import LEAST_LOG_P, Items
from phasewatch.monitor.emergence.lines import ROUNDING, LeftOut, Line, parse_line
from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError
from phasewatch.monitor.files import MOST_BYTES, MOST_JSON_BYTES, open_regular, read_json
from phasewatch.monitor.strict_json import parse_json

_TIME = r"\d{4}-\d{2}-\d{2}T\d{2}[-:]\d{2}[-:]\d{2}(?:\.\d+)?(?:[+-]\d{2}[-:]\d{2}|Z)?"
_STEP = re.compile(r"(?:^|[^a-z])(?:global_?)?(?:step|checkpoint|ckpt|iter)s?[-_=]?(\d+)", re.IGNORECASE)
_TOKENS = re.compile(r"tokens?[-_=]?(\d+(?:\.\d+)?)([KMBT]?)|(\d+(?:\.\d+)?)([KMBT])[-_]?tokens?", re.IGNORECASE)
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}

MOST_OF_A_LINE = 2**20
"""So many bytes of a first line tell what kind of file it is."""

Steps = dict[float, Columns]


def read_samples(folder: str | Path, task: str | None = None, *, axis: Literal["step", "tokens"] = "step") -> Items:
    """Read what lm-evaluation-harness logged of one task at several checkpoints.

    Every `samples_<task>_<time>.jsonl` at or below the folder is one checkpoint (`--log_samples`, all versions from
    0.4.0, and writers of the same lines). Revisions of one model share a folder; the step or the tokens are those of
    `results_<time>.json` beside it, of its model_args, revision or model name ("revision=step3000",
    "stage1-step1000-tokens5B"), or else of the folder's name. Of two files at one step the later counts, of an item's
    lines the first. Items that lack a usable line at one of the steps are left out, and counted.

    Or a table, csv or jsonl, with a line for each step, item and choice: the columns `step` or `tokens`, `item`,
    `log_p`, and where there are choices `choice` and `right` (1 for the right one); `correct`, `length` and `task` may
    be there.

    Args:
        folder: a folder, one samples file, or a table that ends in .csv or .jsonl.
        task: the task's name as in the files' names; needn't be given where there is one.
        axis: whether x is to be steps or tokens.

    Returns:
        The items with what was left out.

    Raises:
        PhasewatchError: if there is no such file, task or step, or no line can be used.
    """
    if not isinstance(folder, (str, Path)):
        raise PhasewatchError(f"read_samples({folder!r}): the folder must be a path.")
    if axis not in ("step", "tokens"):
        raise PhasewatchError(f"read_samples(axis={axis!r}) must be 'step' or 'tokens'.")
    path = Path(folder)
    if not path.exists():
        raise PhasewatchError(f"read_samples({str(folder)!r}): there is no such folder or file.")
    steps, left_out, unit = (_of_folder if path.is_dir() else _of_file)(path, task, axis)
    return together(steps, left_out, unit, str(folder), axis)


def holds_items(path: Path) -> bool:
    """Whether a folder or table is for `read_samples`, and neither a run's folder nor a table of whole scores.

    Args:
        path: a folder or file.

    Returns:
        Whether it has a line for each item.
    """
    if path.is_dir():
        return not (path / "points.jsonl").exists()
    with open_regular(path) as file:
        first = file.readline(MOST_OF_A_LINE).decode(errors="replace").strip("\ufeff \t\r\n")
    try:
        names = set(parse_json(first, "the first line")) if path.suffix.lower() == ".jsonl" else set(first.split(","))
    except (PhasewatchError, TypeError):
        return False
    return "doc_id" in names or "item" in {str(name).strip('"') for name in names}


def _of_folder(folder: Path, task: str | None, axis: str) -> tuple[Steps, Counter[str], str]:
    name = re.compile(rf"samples_(?P<task>.+?)(?:_(?P<time>{_TIME}))?\.jsonl")
    found = [(match["task"], match["time"] or "", path) for path in sorted(folder.rglob("samples_*.jsonl"))
             if (match := name.fullmatch(path.name))]  # fmt: skip
    tasks = sorted({own for own, _, _ in found})
    if not tasks:
        raise PhasewatchError(
            f"read_samples({str(folder)!r}): there is no samples_<task>_<time>.jsonl in it. Run lm_eval with "
            "--log_samples, or give a csv or jsonl with the columns step, item, choice, log_p and right."
        )
    if task is None and len(tasks) > 1:
        raise PhasewatchError(f"read_samples({str(folder)!r}) holds the tasks {', '.join(tasks)}; name one of them.")
    task = task or tasks[0]
    if task not in tasks:
        raise PhasewatchError(
            f"read_samples({str(folder)!r}, {task!r}): there is no such task, but {', '.join(tasks)}."
        )
    steps: Steps = {}
    left_out: Counter[str] = Counter()
    for own, time, path in sorted(found, key=lambda entry: entry[1]):
        if own != task:
            continue
        at = _place(path, time, axis, folder)
        if at is None:
            raise PhasewatchError(
                f"{path}: neither results_{time or '<time>'}.json beside it nor its folder's name tells the {axis}. "
                "Evaluate with revision=step... in model_args, put each checkpoint in a folder step_<number>, or ask "
                f"for axis={'tokens' if axis == 'step' else 'step'!r}."
            )
        if at in steps:
            left_out["files of a step that was evaluated again"] += 1
        steps[at] = _lines(path, left_out, folder)
    return steps, left_out, "bytes"


def _place(path: Path, time: str, axis: str, within: Path) -> float | None:
    """The step or the tokens of a samples file; None if nothing tells."""
    texts: list[str] = []
    for results in sorted(path.parent.glob(f"*results*{time}*.json" if time else "*results*.json")):
        try:
            record = read_json(results, within=within, allow_nan=True)
        except PhasewatchError:
            continue
        config = record.get("config") if isinstance(record, dict) else None
        if not isinstance(config, dict):
            continue
        arguments = config.get("model_args")
        own: dict[str, Any] = arguments if isinstance(arguments, dict) else {}
        if isinstance(arguments, str):
            parts = [part.partition("=") for part in arguments.split(",")]
            own = {name: value for name, _, value in parts}
        names = [own.get("revision"), config.get("model_revision"), own.get("pretrained"), own.get("path")]
        texts += [str(t) for t in (*names, record.get("model_name"), config.get("model")) if t]
    texts += [part for part in (path.parent.name, path.parent.parent.name)]
    for text in texts:
        if axis == "tokens":
            match = _TOKENS.search(text)
            if match:
                number, letter = (match[1], match[2]) if match[1] else (match[3], match[4])
                return _bounded(float(number) * _UNITS[letter.upper()])
        elif match := _STEP.search(text):
            return _bounded(float(match[1]))
    if axis == "step":
        digits = re.fullmatch(r"\d+", path.parent.name)
        return _bounded(float(digits[0])) if digits else None
    return None


def _bounded(place: float) -> float | None:
    return place if 0 <= place <= LARGEST_STEP else None


def _lines(path: Path, left_out: Counter[str], within: Path | None) -> Columns:
    found = Columns()
    with open_regular(path, within=within, most_bytes=MOST_BYTES) as file:
        while text := file.readline(MOST_JSON_BYTES):
            if not text.strip():
                continue
            try:
                line = parse_line(text)
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            if not found.add(line):
                left_out["further lines of an item (another filter, or a repeat)"] += 1
    return found


def _of_file(path: Path, task: str | None, axis: str) -> tuple[Steps, Counter[str], str]:
    left_out: Counter[str] = Counter()
    with open_regular(path, most_bytes=MOST_BYTES) as file:
        first = file.readline(MOST_JSON_BYTES)
    if path.suffix.lower() == ".jsonl" and b'"doc_id"' in first:
        at = _place(path, (re.search(_TIME, path.name) or [""])[0], axis, path.parent)
        if at is None:
            raise PhasewatchError(f"{path}: neither results beside it nor its folder's name tells the {axis}.")
        return {at: _lines(path, left_out, None)}, left_out, "bytes"
    if path.suffix.lower() not in {".csv", ".jsonl"}:
        raise PhasewatchError(f"read_samples({str(path)!r}) reads a folder, a .csv or a .jsonl, not {path.suffix!r}.")
    choices: dict[tuple[float, str], dict[int, Mapping[str, Any]]] = {}
    for row in _rows(path, left_out):
        if task is not None and row.get("task", task) != task:
            continue
        try:
            at = _bounded(float(row[axis]))
            if at is None:
                raise ValueError("no step")
            key = (at, str(row["item"]))
            choice = int(row.get("choice") or 0)
            log_p = float(row["log_p"])
        except KeyError as missing:
            raise PhasewatchError(
                f"{path} has no column {missing}; it needs {axis}, item and log_p, and has {', '.join(map(str, row))}."
            ) from missing
        except (TypeError, ValueError, OverflowError):
            left_out["lines without numbers for the step, the choice or log p"] += 1
            continue
        if not LEAST_LOG_P <= log_p <= ROUNDING:
            left_out["lines with a log probability above 0, or none"] += 1
            continue
        if choice in choices.setdefault(key, {}):
            left_out["further lines of a choice"] += 1
            continue
        choices[key][choice] = row
    steps: Steps = {}
    for (at, item), own in choices.items():
        rows = [own[i] for i in sorted(own)]
        if sorted(own) != list(range(len(own))):
            left_out["items with a choice missing"] += 1
            continue
        right = [i for i, row in enumerate(rows) if _number(row.get("right")) == 1]
        if len(right) > 1:
            left_out["items with more than one right choice"] += 1
            continue
        log_p = tuple(min(float(row["log_p"]), 0.0) for row in rows)
        target = 0 if len(rows) == 1 else (right[0] if right else None)
        given = _number(rows[0].get("correct"), most=1.0)
        if target is None or (len(rows) == 1 and math.isnan(given)):
            left_out["items that don't tell whether they are right"] += 1
            continue
        correct = given if not math.isnan(given) else float(int(np.argmax(log_p)) == target)
        lengths = tuple(_number(row.get("length")) for row in rows)
        steps.setdefault(at, Columns()).add(Line(item, log_p, correct, lengths, target))
    return steps, left_out, "tokens"


def _rows(path: Path, left_out: Counter[str]) -> Iterator[Mapping[str, Any]]:
    opened = open_regular(path, most_bytes=MOST_BYTES)
    with io.TextIOWrapper(opened, encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.suffix.lower() == ".csv":
            try:
                yield from csv.DictReader(file)
            except csv.Error as error:
                raise PhasewatchError(f"{path} can't be read as comma-separated text: {error}.") from error
            return
        while text := file.readline(MOST_JSON_BYTES):
            if not text.strip():
                continue
            try:
                record = parse_json(text, "A line", allow_nan=True)
            except PhasewatchError:
                left_out["lines that are not JSON (cut off, or two written into one)"] += 1
                continue
            if isinstance(record, dict):
                yield record
            else:
                left_out["lines that are no object of named values"] += 1


def _number(cell: Any, most: float = 2.0**53) -> float:
    """A cell's number from 0 to `most`, or True and False; NaN where it holds anything else."""
    cell = {"true": 1, "false": 0}.get(str(cell).strip().lower(), cell)
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return value if 0 <= value <= most else math.nan
