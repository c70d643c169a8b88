"""One line of logged samples, as any version of lm-evaluation-harness or its relatives writes it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from phasewatch.monitor.emergence.items import LEAST_LOG_P
from phasewatch.monitor.strict_json import loads

ROUNDING = 1e-6
"""A log p may be this far above 0: a probability of 1, rounded."""


class LeftOut(Exception):
    """Why a line can't be used, in a few words that a count is put before."""


class Line(NamedTuple):
    """One item at one step.

    Attributes:
        item: its name within the task.
        log_p: of each choice.
        correct: 1 or 0.
        lengths: of each choice in UTF-8 bytes, NaN where the text isn't there.
        target: the right choice's index; None where the line doesn't tell.
    """

    item: str
    log_p: tuple[float, ...]
    correct: float
    lengths: tuple[float, ...]
    target: int | None


def parse_line(text: bytes) -> Line:
    """Read a line of a samples file.

    Understood are resps and filtered_resps of numbers or strings, targets as numbers, text or lists, arguments as
    mappings (gen_args_0 ...) or lists, and results under their own name or under metrics.

    Args:
        text: one line of JSON.

    Returns:
        The item.

    Raises:
        LeftOut: if the line can't be used.
    """
    try:
        record = loads(text.decode().strip("\ufeff \t\r\n"))
    except (ValueError, RecursionError) as error:
        raise LeftOut("lines that are not JSON (cut off, or two written into one)") from error
    if not isinstance(record, dict) or "doc_id" not in record:
        raise LeftOut("lines without a doc_id")
    texts = _continuations(record.get("arguments"))
    log_p = _log_p(record)
    choices = len(log_p)
    if choices % 2 == 0 and texts is not None and len(texts) == choices and _is_doubled(record, texts):
        choices //= 2  # the second half has no context, for acc_mutual_info
        log_p, texts = log_p[:choices], texts[:choices]
    if texts is not None and len(texts) != choices:
        raise LeftOut("lines with another number of answers than of log probabilities")
    target = 0 if choices == 1 else _target(record.get("target"), texts, choices)
    correct = _metric(record)
    if correct is None:
        if choices == 1:
            correct = float(_flag(record))
        elif target is None:
            raise LeftOut("lines that tell neither the right choice nor whether it was chosen")
        else:
            correct = float(max(range(choices), key=log_p.__getitem__) == target)
    if target is None and correct == 1:
        target = max(range(choices), key=log_p.__getitem__)
    return Line(str(record["doc_id"]), log_p, correct, _lengths(texts, choices), target)


def _lengths(texts: Sequence[str] | None, choices: int) -> tuple[float, ...]:
    """The texts' lengths in UTF-8; a half surrogate, which isn't text, counts as three bytes."""
    if texts is None:
        return (math.nan,) * choices
    if "".join(texts).isascii():  # one look at all of them; most are
        return tuple(map(len, texts))
    return tuple([len(text.encode("utf-8", "surrogatepass")) for text in texts])


def _log_p(record: Mapping[str, Any]) -> tuple[float, ...]:
    answers = record.get("filtered_resps") or record.get("resps")
    if not isinstance(answers, list) or not answers:
        raise LeftOut("lines without answers (resps)")
    try:
        found = tuple([float(answer[0]) for answer in answers if type(answer) is list])  # as most files have it
    except (TypeError, ValueError, IndexError, OverflowError):
        found = ()
    if len(found) != len(answers):
        found = tuple(map(_value, [answers] if _is_pair(answers) else answers))
    for value in found:
        if not LEAST_LOG_P <= value <= ROUNDING:
            raise LeftOut("lines with a log probability above 0, of minus infinity, or none")
    return found


def _value(answer: Any) -> float:
    """The number in an answer, whatever lists are around it."""
    while isinstance(answer, list) and answer:
        answer = answer[0]
    try:
        return float(answer)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError) as error:
        raise LeftOut("lines with generated text in place of log probabilities") from error


def _is_pair(answers: Sequence[Any]) -> bool:
    """Whether it is one answer, a log p and a flag, that no list was put around."""
    return len(answers) == 2 and not isinstance(answers[0], list) and str(answers[1]).lower() in {"true", "false"}


def _flag(record: Mapping[str, Any]) -> bool:
    """Whether greedy decoding gives the one answer."""
    answer: Any = record.get("filtered_resps") or record.get("resps")
    while isinstance(answer, list) and answer and isinstance(answer[0], list):
        answer = answer[0]
    if isinstance(answer, list) and len(answer) > 1:
        return str(answer[1]).lower() == "true"
    raise LeftOut("lines that don't tell whether the answer was right")


def _metric(record: Mapping[str, Any]) -> float | None:
    metrics = record.get("metrics")
    for place in (record, metrics if isinstance(metrics, dict) else {}):
        for name in ("acc", "exact_match", "acc,none", "exact_match,none"):
            if name in place:
                value = place[name]
                if isinstance(value, str):
                    value = {"true": 1.0, "false": 0.0}.get(value.lower())
                if isinstance(value, (int, float)) and value in (0, 1):
                    return float(value)
    return None


def _target(target: Any, texts: Sequence[str] | None, choices: int) -> int | None:
    if isinstance(target, str):
        stripped = target.strip()
        answers = [] if texts is None else list(map(str.strip, texts))
        if answers.count(stripped) == 1:
            return answers.index(stripped)
        try:
            target = int(stripped) if stripped.isdecimal() else loads(stripped)
        except (ValueError, RecursionError):
            return None
    index: Any = target[0] if isinstance(target, list) and target else target
    if not isinstance(index, (int, float)) or isinstance(index, bool) or index % 1 != 0:
        return None
    if not 0 <= index < choices:
        raise LeftOut("lines whose right choice is missing")
    return int(index)


def _continuations(arguments: Any) -> list[str] | None:
    """The answers' texts, or None where the line doesn't hold them."""
    if isinstance(arguments, dict):
        arguments = list(arguments.values())  # gen_args_0, gen_args_1, ... as they were written
    if not isinstance(arguments, list):
        return None
    try:
        found = [argument["arg_1"] if type(argument) is dict else argument[1] for argument in arguments]
        "".join(found)  # fails where one is no text
    except (KeyError, IndexError, TypeError):
        return None
    return found or None


def _is_doubled(record: Mapping[str, Any], texts: Sequence[str]) -> bool:
    half = len(texts) // 2
    if texts[0] != texts[half] or list(texts[:half]) != list(texts[half:]):
        return False
    metrics = record.get("metrics")
    return "acc_mutual_info" in record or (isinstance(metrics, (dict, list)) and "acc_mutual_info" in metrics)
