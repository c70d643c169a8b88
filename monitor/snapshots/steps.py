"""The training step that the name of a checkpoint carries, and in what it is counted."""

import re

from phasewatch.monitor.errors import LARGEST_STEP

_NUMBER = r"(?:\d{1,3}(?:_\d{3})+|\d{1,3}(?:,\d{3})+|\d+)"
_MILLIONS = r"\d{1,3}(?:_\d{3}){2,}|\d{1,3}(?:,\d{3})+"
"""Digits in groups, by themselves: fairseq's `checkpoint_1_500` is update 500 of epoch 1, and no 1 500."""
_STEP_WORDS = {
    r"global[-_]?step": "steps",
    r"(?:time)?steps?": "steps",
    r"it(?:e?r(?:ation)?s?)?(?:[-_]?num)?": "iterations",
    r"updates?": "updates",
    r"ba": "batches",
}
_WEAK_WORDS = {r"batch(?:es)?": "batches"}
"""Words at which a number may be a size as well; asked where no other number can be the step."""

_OTHER_WORDS = (
    "rank|local_rank|seed|fold|split|v|ver|version|rev|revision|attempt|retry|restart|copy|shard|chunk|expert|e|ep|epoch|epochs|loss|acc|accuracy|ppl|perplexity|score|bleu|wer|"
    "cer|f1|auc|miou|map|val|eval|metric|lr|wd|bs|batch_size|batchsize|run|trial|try|exp|job|id|pid|stage|phase|"
    "ingredient|part|layers?|dim|heads?|gpu|cuda|device|node|worker|proc|process|replica|mp|tp|pp|dp|ep_rank|tokens?|"
    "samples?|size|width|top|of"
)
_COUNTED = "tokens?|epochs?|samples?|examples|hours?|days?|layers?|gpus?|nodes?|ranks?|seeds?|folds?|params?"
_FACTOR = {"": 1, "k": 1_000, "m": 1_000_000}

_SHARD = re.compile(r"-\d+-of-\d+$")
_LETTER_BEFORE = r"(?<![a-z])"
_TIME = re.compile(
    r"(?<!\d)(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
    r"(?:[-_T+ ]+\d\d[-_:.h]?\d\d(?:[-_:.m]?\d\d)?(?:[+]\d\d(?::?\d\d)?)?)?(?!\d)"
    r"|(?<!\d)1[5-9]\d{8}(?!\d)"  # seconds since 1970
)
_UUID = r"[a-f\d]{8}-[a-f\d]{4}-[a-f\d]{4}-[a-f\d]{4}-[a-f\d]{12}"
_HASH = re.compile(
    rf"(?<![a-z\d])(?:{_UUID}|[a-f\d]{{40}}|[a-f\d]{{64}}|(?=[a-f\d]{{7}})(?=[a-f\d]*\d[a-f]+\d)[a-f\d]+)(?![a-z\d])",
    re.I,
)
_NOT_A_STEP = re.compile(
    rf"(?<![a-z\d])(?:{_OTHER_WORDS})[-_=. ]?\d+(?:\.\d+)*(?:e[-+]?\d+)?(?![a-z\d])"
    rf"|(?<![a-z\d.])\d+[-_ ](?:{_COUNTED})(?![a-z]|[-_=. ]?\d)"
    r"|(?<![a-z\d])\d+(?:\.\d+)?e[-+]\d+(?![a-z\d])"
    r"|\(\d+\)$"  # the second download of a file
    r"|\w+=[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?",
    re.I,
)
_GLUED = r"(?<![a-z])(?:checkpoint|chkpt|ckpt|cp|model|weights?|snapshot|save|state)"
_STAGE = re.compile(rf"{_LETTER_BEFORE}(stage|phase|ingredient|cycle|epoch|ep?)[-_=. ]?(\d+)(?![a-z\d]|\.\d)", re.I)

_RUN = re.compile(rf"{_LETTER_BEFORE}(seed|fold|run|trial|split)[-_=. ]?(\d+)(?![a-z\d]|\.\d)", re.I)


class Step(int):
    """A step, and what is known of it.

    Attributes:
        unit: what it counts, such as "steps" or "iterations"; empty if only a number is known.
        epoch: the epoch that the checkpoint says it is of, if it does.
    """

    unit: str
    epoch: int | None

    def __new__(cls, step: int, unit: str = "", epoch: int | None = None) -> "Step":
        """A step with what is known of it."""
        made = super().__new__(cls, step)
        made.unit, made.epoch = unit, epoch
        return made


def step_in_name(stem: str) -> Step | None:
    """The training step that a name without suffix carries.

    It is the number at a word `global_step`, `step`, `iter`, `update` or `ba` (in this order; `step10k` and `step1e4`
    are 10 000). Otherwise it is the number that the name ends with, or else the only one that stands by itself. The
    number of a rank, seed, fold, version, epoch, loss, hash, date or time is never a step.

    Args:
        stem: such as `checkpoint-500`.

    Returns:
        The step, or None if there is none.

    Example:
        >>> step_in_name("ep1-ba2000-rank0"), step_in_name("model_1000_v2"), step_in_name("epoch=3-loss=0.25")
        (2000, 1000, None)
        >>> step_in_name("ep1-ba2000-rank0").unit
        'batches'
    """
    if _SHARD.search(stem):
        return None
    stem = _HASH.sub("_", _TIME.sub("_", stem))
    for found in (
        _step_at_a_word(stem, _STEP_WORDS),
        _step_by_itself(_NOT_A_STEP.sub("_", stem)),
        _step_at_a_word(stem, _WEAK_WORDS),
    ):
        if found is not None:
            return found
    return None


def stage_in_name(stem: str) -> tuple[int, ...]:
    """The numbers of the stage, phase, ingredient, cycle or epoch that a name carries, in their order there.

    Args:
        stem: such as `stage2-ingredient1-step1000`.

    Example:
        >>> stage_in_name("stage2-ingredient1-step1000-tokens3B"), stage_in_name("step1000")
        ((2, 1), ())
    """
    return tuple(int(number) for _, number in _STAGE.findall(stem) if len(number) < 19)


def run_in_name(stem: str) -> tuple[tuple[str, str], ...]:
    """The seed, fold, run, trial or split that a name carries.

    Args:
        stem: such as `model_seed3_step1000`.

    Example:
        >>> run_in_name("model_seed3_step1000")
        (('seed', '3'),)
    """
    return tuple((word.lower(), number) for word, number in _RUN.findall(stem))


def _step_at_a_word(stem: str, words: dict[str, str]) -> Step | None:
    for word, unit in words.items():
        after = re.search(
            rf"{_LETTER_BEFORE}(?:{word})[-_=. ]*({_NUMBER})(?:e(\d)|([km]))?(?![a-z\d]|\.\d)", stem, re.I
        )
        if after:
            return _bounded(_whole(after[1]) * 10 ** int(after[2] or 0) * _FACTOR[(after[3] or "").lower()], unit)
        before = re.search(rf"(?<![a-z\d.])({_NUMBER})[-_ ]?(?:{word})(?![a-z])", stem, re.I)
        if before:
            return _bounded(_whole(before[1]), unit)
    return None


def _step_by_itself(rest: str) -> Step | None:
    rest = rest.rstrip("-_=. ")
    if grouped := re.search(rf"(?<![a-z\d.])(?:{_MILLIONS})$", rest, re.I):
        return _bounded(_whole(grouped[0]), "")
    last = re.search(rf"(?:(?<![a-z\d.])|(?<=[a-z]\.)|(?<=[-_]\.)|{_GLUED})(\d+)$", rest, re.I)
    if last:
        return _bounded(int(last[1]), "")
    alone = re.findall(r"(?<![a-z\d.])\d+(?![a-z\d]|\.\d)", rest, re.I)
    return _bounded(int(alone[0]), "") if len(alone) == 1 else None


def _whole(number: str) -> int:
    return int(number.replace("_", "").replace(",", ""))


def _bounded(step: int, unit: str) -> Step | None:
    return Step(step, unit) if step <= LARGEST_STEP else None
