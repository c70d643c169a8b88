"""Folders of one checkpoint: as Hugging Face's Trainer leaves them, or with one file of weights."""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import read_json
from phasewatch.monitor.snapshots.formats.base import Entry, reading, stem_of
from phasewatch.monitor.snapshots.formats.choosing import under_prefix
from phasewatch.monitor.snapshots.formats.safetensors import SafetensorsFile
from phasewatch.monitor.snapshots.formats.torch_files import TorchFile, is_step
from phasewatch.monitor.snapshots.steps import Step, step_in_name

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""The files that may hold the weights; the first one that is there is read."""

TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class HuggingFaceFolder:
    """`checkpoint-1000/` with `model.safetensors` or `pytorch_model.bin`, whole or in shards with an index.

    Attributes:
        key: of the state dict to read in each file; None for the model's own.
    """

    key: str | None = None

    def claims(self, path: Path) -> Path | None:
        """A folder with one of the usual files, safetensors first."""
        return next((path / name for name in WEIGHTS if (path / name).is_file()), None)

    def step(self, entry: Entry) -> int | None:
        """The `global_step` of the Trainer, or one in the file, or the step in the folder's name."""
        step = step_of_trainer(entry)
        source = self.claims(entry.path)
        if step is not None or source is None or numbered_by_accelerate(entry):
            return step
        return _format_of(source).step(entry._replace(path=source))

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The tensors of the file, or of all shards that the index names.

        Raises:
            PhasewatchError: if a file can't be read, or index and shards don't fit.
        """
        if not source.name.endswith(".index.json"):
            return load_file(source, within, self.key)
        with reading(source):
            shard_of = dict(read_json(source, within=within)["weight_map"])
            shards = sorted({str(shard) for shard in shard_of.values()})
        if not shards:
            raise PhasewatchError(f"{source} names no shard; copy the checkpoint again.")
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            if shard != Path(shard).name:
                raise PhasewatchError(
                    f"{source} names the shard {shard!r}, which isn't a file beside it; only such shards are read."
                )
            with reading(source):
                is_there = (source.parent / shard).is_file()
            if not is_there:
                raise PhasewatchError(f"{source} names the shard {shard}, which isn't there; put it next to the index.")
            tensors |= load_file(source.parent / shard, within, self.key)
        if self.key is None and (missing := shard_of.keys() - tensors.keys()):
            name = min(missing)
            raise PhasewatchError(
                f"{source.parent / shard_of[name]} lacks {name}, which {source.name} puts there; "
                "copy the checkpoint again."
            )
        return tensors


@dataclass(frozen=True)
class FolderOfOneFile:
    """`step1000/weights.pt`: a folder in which one file holds weights, or one is called `model` or like it.

    Attributes:
        key: of the state dict to read; None for the model's own.
    """

    key: str | None = None

    usual = ("model", "weights", "state_dict", "consolidated.00")

    def claims(self, path: Path) -> Path | None:
        """A folder whose file of weights is clear."""
        files = weights_files(path)
        named = [file for file in files if file.stem in self.usual]
        return files[0] if len(files) == 1 else named[0] if len(named) == 1 else None

    def step(self, entry: Entry) -> int | None:
        """The `global_step` of the Trainer, or as the format of the file says, by the folder's name or its own."""
        step = step_of_trainer(entry)
        source = self.claims(entry.path)
        if step is not None or source is None:
            return step
        step = _format_of(source).step(entry._replace(path=source))
        return step_in_name(stem_of(source)) if step is None else step

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """As the format of the file.

        Raises:
            PhasewatchError: if it can't be read.
        """
        return load_file(source, within, self.key)


def weights_files(folder: Path) -> list[Path]:
    """The files in a folder that may hold weights, sorted; none if it isn't one.

    Args:
        folder: any path.
    """
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if SafetensorsFile().claims(file) or TorchFile().claims(file))


def step_of_trainer(entry: Entry) -> Step | None:
    """The `global_step` of `trainer_state.json`; None if there is no such file, or it can't be read.

    Args:
        entry: the folder of a checkpoint.
    """
    file = entry.path / TRAINER_STATE
    try:
        state = read_json(file, within=entry.within, allow_nan=True)
        step = state["global_step"]
    except (PhasewatchError, KeyError, TypeError):
        return None
    return Step(step, "steps") if is_step(step) else None


def numbered_by_accelerate(entry: Entry) -> bool:
    """Whether a folder's number counts the saves, as under Accelerate's `automatic_checkpoint_naming`.

    Args:
        entry: the folder of a checkpoint.
    """
    named = re.fullmatch(r"checkpoint_\d+", entry.name) and entry.path.parent.name == "checkpoints"
    return bool(named) and next(entry.path.glob("random_states_*.pkl"), None) is not None


def load_file(file: Path, within: Path | None, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of one file, by its suffix.

    Args:
        file: of safetensors or torch.save.
        within: the folder that no link may lead out of.
        key: of the state dict to read; None for the model's own.

    Raises:
        PhasewatchError: if it can't be read.
    """
    form = _format_of(file)
    if isinstance(form, TorchFile):
        return TorchFile(key).load(file, within)
    tensors = form.load(file, within)
    return tensors if key is None else under_prefix(tensors, file, key)


def _format_of(file: Path) -> SafetensorsFile | TorchFile:
    return SafetensorsFile() if file.suffix.lower() in SafetensorsFile.suffixes else TorchFile()
