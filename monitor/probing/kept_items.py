"""What a model makes of each question, kept in files beside a run's points."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from phasewatch.monitor.emergence.items import Items
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import inside, read_bytes, write_atomically
from phasewatch.monitor.formatting import printable

FOLDER = "items"
"""The folder of these files in a run's; one file for each name of questions and step."""

MOST_BYTES = 64 * 2**20
"""A larger file is refused; 100,000 questions of four choices and ten tokens take 12 MB."""

_ARRAYS = ("log_p", "token_log_p", "greedy", "right")


def write_items(run: str | Path, name: str, step: int, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write one step's values, whole under their name at every moment.

    Args:
        run: the run's folder.
        name: of the questions.
        step: the snapshot's.
        arrays: `log_p`, shape (question, choice); `token_log_p`, shape (question, token); `greedy` and `right`, shape
            (question,).

    Returns:
        The file's path.

    Raises:
        PhasewatchError: if the name can't be part of a file's.
        OSError: if the disk refuses it.
    """
    path = inside(run, f"{FOLDER}/{name}-{step}.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({key: np.ascontiguousarray(arrays[key]) for key in _ARRAYS}))
    return path


def read_items(run: str | Path, name: str = "items") -> Items:
    """Read what `ItemScores(keep=...)` wrote, for `emergence.scores` and `emergence.attribute`.

    Args:
        run: the run's folder.
        name: of the questions.

    Returns:
        The items at every step that is kept.

    Raises:
        PhasewatchError: if there are none, or a file is damaged or of other questions.

    Example:
        >>> import tempfile, torch
        >>> import phasewatch as pw
        >>> run = tempfile.mkdtemp()
        >>> quiz = pw.ItemScores([pw.Question([0], [[1], [2]])], name="quiz", keep=run)
        >>> model = torch.nn.Embedding(4, 4, _weight=torch.zeros(4, 4))
        >>> for step in (10, 20):
        ...     _ = quiz.score("quiz_accuracy", model, step)
        >>> pw.read_items(run, "quiz").log_p.shape  # (step, item, choice)
        (2, 1, 2)
    """
    pattern = re.compile(rf"{re.escape(name)}-(\d{{1,18}})\.safetensors")
    folder = inside(run, FOLDER)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(found[1]) for file in names if (found := pattern.fullmatch(file)))
    if not steps:
        raise PhasewatchError(
            f"{printable(folder)} has no values of questions called '{printable(name)}'; they are kept by "
            "ItemScores(..., keep=RUN)."
        )
    read = [read_step(run, name, step) for step in steps]
    first = read[0]
    for step, arrays in zip(steps, read, strict=True):
        if arrays["log_p"].shape != first["log_p"].shape or (arrays["right"] != first["right"]).any():
            raise PhasewatchError(
                f"{printable(folder)}: step {step} is of other questions than step {steps[0]}. Give each set of "
                "questions a name of its own."
            )
    log_p = np.array([arrays["log_p"] for arrays in read])
    several = (~np.isnan(log_p[0])).sum(axis=1) > 1
    best = np.where(np.isnan(log_p), -np.inf, log_p).argmax(axis=2) == first["right"]
    correct = np.where(several, best, [arrays["greedy"] for arrays in read])
    return Items(x=np.array(steps, dtype=float), log_p=log_p, correct=correct, target=first["right"])


def read_step(run: str | Path, name: str, step: int) -> dict[str, np.ndarray]:
    """Read one step's values.

    Args:
        run: the run's folder.
        name: of the questions.
        step: the snapshot's.

    Returns:
        The arrays as `write_items` takes them.

    Raises:
        PhasewatchError: if the file isn't there, is too large, or doesn't hold them.
    """
    path = inside(run, f"{FOLDER}/{name}-{step}.safetensors")
    content = read_bytes(path, within=run, most_bytes=MOST_BYTES)
    try:
        arrays = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PhasewatchError(f"{printable(path)} is damaged ({printable(error)}); measure the step again.") from error
    if set(arrays) != set(_ARRAYS) or not _fits(arrays):
        raise PhasewatchError(f"{printable(path)} doesn't hold the values of questions; measure the step again.")
    return arrays


def _fits(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether kinds and shapes are those that are written."""
    count = len(arrays["right"]) if arrays["right"].ndim == 1 else -1
    return (
        all(arrays[key].dtype == np.float64 and arrays[key].ndim == 2 for key in ("log_p", "token_log_p"))
        and arrays["greedy"].dtype == np.bool_
        and arrays["greedy"].shape == (count,)
        and arrays["right"].dtype == np.int64
        and len(arrays["log_p"]) == len(arrays["token_log_p"]) == count
    )
