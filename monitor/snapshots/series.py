"""Other people's checkpoint series as snapshots: which files are checkpoints, of which step, and what they hold."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.snapshot import Snapshot

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TRAINING_STATE = re.compile(
    r"(?<![a-z])(optim(izer)?s?|(lr_)?sched(uler)?s?|(grad_)?scaler|rng|random_states?|training_args)(?![a-z])", re.I
)
_SHARD = re.compile(r"-\d+-of-\d+$")
_STEP_WORDS = (r"global[-_]?step", r"steps?", r"iter(?:ation)?s?")
_THOUSANDS = {"": 1, "k": 1_000, "m": 1_000_000}
_STEP_KEYS = ("global_step", "step", "iteration")

_WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "params")
_PICKLED_CODE = re.compile(r"GLOBAL \S|Can only (create|build)|unrecognized function|TorchScript")


@dataclass(frozen=True)
class Series:
    """Checkpoints in order of step: paths alone, so that it can be sent to another process; `load` reads the weights.

    Attributes:
        path: the folder of the checkpoints.
        steps: their training steps, ascending.
        left_out: names in the folder that look like checkpoints and whose step or weights file isn't clear, or that
            are copies of a step that another file carries in its name (Lightning's `last.ckpt`).
    """

    path: Path
    steps: tuple[int, ...]
    sources: tuple[Path, ...] = field(repr=False)
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Snapshot]:
        return (self.load(step) for step in self.steps)

    def source(self, step: int) -> Path:
        """The file that holds the weights of `step`; of a sharded checkpoint, its index.

        Raises:
            PhasewatchError: if the series has no such step.
        """
        if step not in self.steps:
            nearest = min(self.steps, key=lambda known: abs(known - step))
            raise PhasewatchError(
                f"The series {self.path} has no step {step!r}: it has {len(self)} steps from {self.steps[0]} to "
                f"{self.steps[-1]}, and the nearest is {nearest}."
            )
        return self.sources[self.steps.index(step)]

    def load(self, step: int) -> Snapshot:
        """Read the weights of `step`: copies on the CPU, contiguous, without gradients, by the names in the file.

        Raises:
            PhasewatchError: if there is no such step, or its file is gone, damaged, not a state dict, or pickled code.
        """
        source = self.source(step)
        return Snapshot(step=int(step), tensors=_read_checkpoint(source))


def open_series(path: str | Path) -> Series:
    """The checkpoints of a folder, in order of step. Opens no weights, unless a name carries no step.

    `path` is a run folder of phasewatch, or a folder of state dicts (.safetensors, .pt, .pth, .bin, .ckpt), or of
    folders that hold one each, as Hugging Face's Trainer leaves them. A checkpoint's step is the `global_step` of a
    trainer_state.json in its folder; or else in its name (see `step_in_name`); or else an integer `global_step`, `step`
    or `iteration` beside the weights in the file.

    Raises:
        PhasewatchError: if there is no such folder, it holds no checkpoints, or two of them share a step.
    """
    folder = Path(path)
    call = f"open_series({str(path)!r})"
    try:
        if not folder.exists():
            raise PhasewatchError(f"{call}: there is no such folder; give the folder that holds the checkpoints.")
        if not folder.is_dir():
            raise PhasewatchError(f"{call}: this is a file; give the folder that holds it and the other checkpoints.")
        if (folder / "run.json").is_file() and (folder / "snapshots").is_dir():
            folder = folder / "snapshots"
        return _scan(folder, call)
    except OSError as error:
        raise PhasewatchError(
            f"{call}: {error.filename or folder} can't be read ({error.strerror}); check its permissions."
        ) from error


def step_in_name(stem: str) -> int | None:
    """The training step that a name without suffix carries, if any.

    The number at a word `global_step`, `step` or `iter` (in this order; `step10k` is 10 000), or else the number that
    the name ends with, or else the only number that stands by itself: `gpt2_100` and `gpt2_100_ema` are step 100.
    """
    if _SHARD.search(stem):
        return None
    for word in _STEP_WORDS:
        after = re.search(rf"(?<![a-z]){word}[-_=. ]*(\d+)(?!\.?\d)(?:([km])(?![a-z\d]))?", stem, re.I)
        if after:
            return int(after[1]) * _THOUSANDS[(after[2] or "").lower()]
        before = re.search(rf"(?<![a-z\d.])(\d+)[-_ ]?{word}(?![a-z])", stem, re.I)
        if before:
            return int(before[1])
    last = re.search(r"(?<!\d)(?<!\d\.)\d+$", stem)
    if last:
        return int(last[0])
    alone = re.findall(r"(?<![a-z\d.])\d+(?![a-z\d]|\.\d)", stem, re.I)
    return int(alone[0]) if len(alone) == 1 else None


def _scan(folder: Path, call: str) -> Series:
    """The series of a folder, `call` being what the user typed.

    Raises:
        PhasewatchError: if the folder holds no checkpoints, or two of them share a step.
    """
    named: list[tuple[int, str, Path]] = []
    unnamed: list[tuple[int, str, Path]] = []
    left_out = []
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        files = _weights_files(entry)
        step = _step_outside(entry) if len(files) == 1 else None
        inside = _step_inside(files[0]) if len(files) == 1 and step is None else None
        if step is not None:
            named.append((step, entry.name, files[0]))
        elif inside is not None:
            unnamed.append((inside, entry.name, files[0]))
        elif files:
            left_out.append(entry.name)
    known = {step for step, _, _ in named}
    left_out += [name for step, name, _ in unnamed if step in known]
    found = sorted(named + [checkpoint for checkpoint in unnamed if checkpoint[0] not in known])
    if not found:
        raise PhasewatchError(_nothing_found(folder, call, [entry.name for entry in entries]))
    for (step, name, _), (next_step, next_name, _) in pairwise(found):
        if step == next_step:
            raise PhasewatchError(
                f"{call}: {name} and {next_name} are both of step {step}; move one of them out of {folder}."
            )
    steps, _, sources = zip(*found, strict=True)
    return Series(path=folder, steps=steps, sources=sources, left_out=tuple(sorted(left_out)))


def _nothing_found(folder: Path, call: str, names: list[str]) -> str:
    if any(name in _HF_FILES or name == "trainer_state.json" for name in names):
        return f"{call}: {folder} is one checkpoint, not a series; give the folder that holds it and the others."
    there = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return (
        f"{call} looked in {folder} for {', '.join(_SUFFIXES)} files, or folders with one such file, that carry a step "
        f"(step1000.pt, checkpoint-500/), and found {there or 'nothing'}; give the folder that holds the checkpoints."
    )


def _weights_files(entry: Path) -> list[Path]:
    """The files of weights that an entry of a folder stands for: itself, or those in it."""
    if entry.is_file():
        return [entry] if _may_be_weights(entry) else []
    if not entry.is_dir():
        return []
    for name in _HF_FILES:
        if (entry / name).is_file():
            return [entry / name]
    return sorted(file for file in entry.iterdir() if file.is_file() and _may_be_weights(file))


def _may_be_weights(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and not _TRAINING_STATE.search(file.stem)


def _step_outside(entry: Path) -> int | None:
    """The step of a checkpoint as far as it can be known without its weights."""
    try:
        step = json.loads((entry / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        if _is_step(step):
            return step
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none there, or torn by a crash: the name is as good
    return step_in_name(entry.name if entry.is_dir() else entry.stem)


def _step_inside(source: Path) -> int | None:
    """The step that a file of torch.save holds beside the weights; None if it can't be read either."""
    if source.suffix.lower() in {".safetensors", ".json"}:
        return None
    try:
        with _reading(source):
            content = _torch_load(source)
    except (PhasewatchError, MemoryError):  # a foreign .bin may ask for any amount
        return None
    steps = (content.get(key) for key in _STEP_KEYS) if isinstance(content, Mapping) else ()
    return next((step for step in steps if _is_step(step)), None)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_checkpoint(source: Path) -> dict[str, Tensor]:
    if not source.name.endswith(".index.json"):
        return _read_weights(source)
    with _reading(source):
        shard_of = json.loads(source.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if not (source.parent / shard).is_file():
            raise PhasewatchError(f"{source} names the shard {shard}, which isn't there; put it next to the index.")
        tensors |= _read_weights(source.parent / shard)
    if missing := shard_of.keys() - tensors.keys():
        name = min(missing)
        raise PhasewatchError(
            f"{source.parent / shard_of[name]} lacks {name}, which {source.name} puts there; copy the checkpoint again."
        )
    return tensors


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Copies of the tensors in a file: memory-mapped ones would change when a training run writes over it.

    Raises:
        PhasewatchError: if the file can't be read or holds no state dict.
    """
    with _reading(file):
        if file.suffix.lower() == ".safetensors":
            file.open("rb").close()  # safetensors reports every file that it can't open as missing
            with safe_open(file, framework="pt") as content:
                tensors = {name: content.get_tensor(name).clone() for name in content.keys()}
        else:
            state = _state_dict(_torch_load(file), file)
            tensors = {
                name: value.detach().clone(memory_format=torch.contiguous_format)
                for name, value in state.items()
                if isinstance(name, str) and isinstance(value, Tensor)
            }
    if not tensors:
        raise PhasewatchError(f"{file} holds no tensors; save model.state_dict() there, or move it out of the folder.")
    return tensors


def _torch_load(file: Path) -> Any:
    with file.open("rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is refused right after: TorchScript, foreign pickles
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns whatever a damaged or foreign file makes its reader raise into a sentence.

    Raises:
        PhasewatchError: instead of it.
    """
    try:
        yield
    except (PhasewatchError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise PhasewatchError(f"{file} is no longer there; put it back, or open the series again.") from error
    except OSError as error:
        raise PhasewatchError(f"{file} can't be read ({error.strerror or error}); check its permissions.") from error
    except Exception as error:
        if _PICKLED_CODE.search(str(error)):
            raise PhasewatchError(
                f"{file} holds pickled code, which phasewatch never runs; save model.state_dict() instead."
            ) from error
        raise PhasewatchError(
            f"{file} is empty, cut off, or not a checkpoint at all; copy it again, or move it out of the folder."
        ) from error


def _state_dict(content: Any, file: Path) -> Mapping[Any, Any]:
    """The one state dict in what a file holds.

    Raises:
        PhasewatchError: if there is none, or more than one.
    """
    if not isinstance(content, Mapping):
        raise PhasewatchError(
            f"{file} holds a {type(content).__name__}, not a state dict; save model.state_dict() there."
        )
    found = _state_dicts(content)
    if not found:
        keys = ", ".join(repr(key) for key in list(content)[:6]) or "nothing"
        raise PhasewatchError(f"{file} holds a dict without a state dict ({keys}); save model.state_dict() there.")
    if len(found) > 1:
        keys = " and ".join(repr(key) if key else "at its top level" for key in found)
        raise PhasewatchError(
            f"{file} holds {len(found)} state dicts, {keys}; save the one to measure as {{'state_dict': ...}}."
        )
    return next(iter(found.values()))


def _state_dicts(content: Mapping[Any, Any], path: str = "") -> dict[str, Mapping[Any, Any]]:
    """Candidates by their dotted key: those under a usual key if there are any, else whatever holds tensors."""
    if "param_groups" in content:  # an optimizer's
        return {}
    usual: dict[str, Mapping[Any, Any]] = {}
    other: dict[str, Mapping[Any, Any]] = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and not key.endswith("_extra_state"):
            inner = _state_dicts(value, f"{path}.{key}" if path else key)
            if key in _WEIGHTS_KEYS:
                usual |= inner
            elif not _TRAINING_STATE.search(key):
                other |= inner
    if usual:
        return usual
    direct = any(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    return ({path: content} if direct else {}) | other
