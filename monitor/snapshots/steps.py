"""The training step that the name of a checkpoint carries."""

import re

from phasewatch.monitor.errors import LARGEST_STEP

_NUMBER = r"(?:\d{1,3}(?:_\d{3})+|\d+)"
_STEP_WORDS = (r"global[-_]?step", r"steps?", r"iter(?:ation)?s?(?:[-_]?num)?", r"ba(?:tch(?:es)?)?|updates?")
_OTHER_WORDS = (
    "rank|seed|fold|v|ver|version|e|ep|epoch|epochs|loss|acc|accuracy|ppl|score|bleu|lr|run|trial|stage|phase|part|"
    "layer|gpu|node|worker|tokens|of"
)
_FACTOR = {"": 1, "k": 1_000, "m": 1_000_000}

_SHARD = re.compile(r"-\d+-of-\d+$")
_LETTER_BEFORE = r"(?<![a-z])"
_HASH = re.compile(
    r"(?<![a-z\d])(?:[a-f\d]{40}|[a-f\d]{64}|(?=[a-f\d]{7})(?=[a-f\d]*\d[a-f]+\d)[a-f\d]+)(?![a-z\d])", re.I
)
_NOT_A_STEP = re.compile(
    r"(?<!\d)\d{4}-\d\d-\d\d(?!\d)"  # a date
    rf"|{_LETTER_BEFORE}(?:{_OTHER_WORDS})[-_=. ]?\d+(?:\.\d+)*(?:e[-+]?\d+)?(?![a-z\d])"
    r"|\w+=[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?",
    re.I,
)
_GLUED = r"(?<![a-z])(?:checkpoint|chkpt|ckpt|cp|model|weights?|snapshot|save|state)"


def step_in_name(stem: str) -> int | None:
    """The training step that a name without suffix carries.

    It is the number at a word `global_step`, `step`, `iter` or `ba` (in this order; `step10k` and `step1e4` are
    10 000). Otherwise it is the number that the name ends with, or else the only one that stands by itself. The
    number of a rank, seed, fold, version, epoch, loss, hash or date is never a step.

    Args:
        stem: such as `checkpoint-500`.

    Returns:
        The step, or None if there is none.

    Example:
        >>> step_in_name("ep1-ba2000-rank0"), step_in_name("model_1000_v2"), step_in_name("epoch=3-loss=0.25")
        (2000, 1000, None)
    """
    if _SHARD.search(stem):
        return None
    stem = _HASH.sub("_", stem)
    step = _step_at_a_word(stem)
    return step if step is not None else _step_by_itself(_NOT_A_STEP.sub("_", stem))


def _step_at_a_word(stem: str) -> int | None:
    for word in _STEP_WORDS:
        after = re.search(
            rf"{_LETTER_BEFORE}(?:{word})[-_=. ]*({_NUMBER})(?:e(\d)|([km]))?(?![a-z\d]|\.\d)", stem, re.I
        )
        if after:
            return _bounded(int(after[1]) * 10 ** int(after[2] or 0) * _FACTOR[(after[3] or "").lower()])
        before = re.search(rf"(?<![a-z\d.])({_NUMBER})[-_ ]?(?:{word})(?![a-z])", stem, re.I)
        if before:
            return _bounded(int(before[1]))
    return None


def _step_by_itself(rest: str) -> int | None:
    rest = rest.rstrip("-_=. ")
    last = re.search(rf"(?:(?<![a-z\d.])|(?<=[a-z]\.)|(?<=[-_]\.)|{_GLUED})(\d+)$", rest, re.I)
    if last:
        return _bounded(int(last[1]))
    alone = re.findall(r"(?<![a-z\d.])\d+(?![a-z\d]|\.\d)", rest, re.I)
    return _bounded(int(alone[0])) if len(alone) == 1 else None


def _bounded(step: int) -> int | None:
    return step if step <= LARGEST_STEP else None
