"""Folders of DeepSpeed: the module of one rank (ZeRO 1 and 2), partitions of all (ZeRO 3), and universal ones.

How partitions are laid out is described by DeepSpeed's own `zero_to_fp32.py`, which goes with every checkpoint.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import read_text
from phasewatch.monitor.snapshots.formats.base import Entry, reading, some_tensors
from phasewatch.monitor.snapshots.formats.hugging_face import step_of_trainer
from phasewatch.monitor.snapshots.formats.pickled import SavedFile
from phasewatch.monitor.snapshots.formats.torch_files import TorchFile
from phasewatch.monitor.snapshots.formats.unpickler import StoredTensor
from phasewatch.monitor.snapshots.steps import Step, step_in_name

_MODULE = "mp_rank_00_model_states.pt"
_ZERO_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"

FP32 = "fp32"
"""The key of the optimizer's weights in float32; ZeRO 1 and 2 keep the module in 16 bit as well, which is read."""


@dataclass(frozen=True)
class DeepSpeedFolder:
    """`global_step500/`, or `checkpoint-500/` of Hugging Face's Trainer with such a folder inside.

    Attributes:
        key: "fp32" for the optimizer's copy of the weights under ZeRO 1 and 2; else as in a file of torch.save.
    """

    key: str | None = None

    def claims(self, path: Path) -> Path | None:
        """A folder with DeepSpeed's model states, or with the one that `latest` names."""
        inner = [folder for folder in sorted(path.glob("global_step*/")) if _states(folder)]
        if len(inner) > 1 and (path / "latest").is_file() and _is_trainers(path):
            named = _named_by_latest(path)
            inner = [folder for folder in inner if folder.name == named]
        folder = inner[0] if len(inner) == 1 and _is_trainers(path) else path
        return _states(folder)

    def step(self, entry: Entry) -> Step | None:
        """The step of the Trainer, or in the model states, or in the folder's name."""
        source, step = self.claims(entry.path), step_of_trainer(entry)
        if source is None or step is not None:
            return step
        return step_in_name(entry.name) if source.name == "fp32.pt" else TorchFile().step(entry._replace(path=source))

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The weights: of the universal form, or the module's, or put together from the ranks' partitions.

        Raises:
            PhasewatchError: if a file can't be read, ranks are missing, or the model itself was split over ranks.
        """
        if source.name == "fp32.pt":
            return _universal(source.parent.parent, within)
        others = sorted(source.parent.glob("*mp_rank_01*_model_states.pt")) + sorted(
            source.parent.glob("layer_*-model_*states.pt")
        )
        if others:
            raise PhasewatchError(
                f"{source.parent} holds a model that was split over ranks ({others[0].name}); put it together with "
                "DeepSpeed's ds_to_universal.py, and give the universal checkpoints."
            )
        if source.name == _MODULE and self.key != FP32:
            return TorchFile(self.key).load(source, within)
        with reading(source):
            return _merged(source, within)


def _states(folder: Path) -> Path | None:
    """The file that a folder of DeepSpeed's is read by."""
    if universal := next((file for file in sorted(folder.glob("zero/*/fp32.pt"))), None):
        return universal
    return next((folder / name for name in (_MODULE, _ZERO_3) if (folder / name).is_file()), None)


def _is_trainers(path: Path) -> bool:
    return step_in_name(path.name) is not None or (path / "trainer_state.json").is_file()


def _named_by_latest(path: Path) -> str:
    try:
        return read_text(path / "latest", within=path, most_bytes=1000).strip()
    except PhasewatchError:
        return ""


def _universal(zero: Path, within: Path | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(zero.glob("*/fp32.pt")):
        with reading(file), SavedFile(file, within) as saved:
            content = saved.content.get("param") if isinstance(saved.content, dict) else saved.content
            if not isinstance(content, StoredTensor):
                raise PhasewatchError(f"{file} holds no tensor; convert the checkpoint again.")
            tensors |= saved.read({file.parent.name: content})
    return tensors


def _merged(source: Path, within: Path | None) -> dict[str, Tensor]:
    """The weights in float32, from the optimizer's partitions of all ranks."""
    files = sorted(source.parent.glob("*_optim_states.pt"), key=_natural)
    with SavedFile(source, within) as saved:
        states: dict[str, Any] = saved.content
        module = states.get("module") or {}
        buffers = saved.read({name: module[name] for name in states.get("buffer_names") or () if name in module})
    groups = [{str(name): _shape(shape) for name, shape in group.items()} for group in states["param_shapes"]]
    flat: list[list[Tensor]] = []
    stage = 0
    for file in files:
        with reading(file), SavedFile(file, within) as saved:
            state = saved.content["optimizer_state_dict"]
            stage, count = state["zero_stage"], state["partition_count"]
            count = max(count) if isinstance(count, list) else count
            if count != len(files):
                raise PhasewatchError(
                    f"{source.parent} holds {len(files)} of {count} files *_optim_states.pt; copy the checkpoint again."
                )
            parts = state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
            flat.append([*saved.read({str(i): part for i, part in enumerate(parts)}).values()])
    if not flat:
        raise PhasewatchError(f"{source.parent} holds no *_optim_states.pt, which have the weights; copy them too.")
    tensors = (_of_zero_3 if stage == 3 else _of_zero_2)(groups, flat)
    tensors |= buffers | _frozen(source, states, within, stage, len(files))
    for alias, name in dict(states.get("shared_params") or {}).items():
        if name in tensors:
            tensors[alias] = tensors[name].clone()
    return some_tensors(tensors, source)


def _of_zero_2(groups: Sequence[dict[str, tuple[int, ...]]], flat: list[list[Tensor]]) -> dict[str, Tensor]:
    """Each group is one vector, cut into a part for each rank; its parameters lie in it one after another."""
    tensors: dict[str, Tensor] = {}
    for number, shapes in enumerate(groups):
        whole, start = torch.cat([parts[number] for parts in flat]), 0
        for name, shape in shapes.items():
            tensors[name] = _cut(whole, start, shape).clone()
            start += math.prod(shape)
    return tensors


def _of_zero_3(groups: Sequence[dict[str, tuple[int, ...]]], flat: list[list[Tensor]]) -> dict[str, Tensor]:
    """Each parameter is cut into a part for each rank, padded to one length; a rank's parts lie one after another."""
    whole, start = [torch.cat(parts) for parts in flat], 0
    tensors: dict[str, Tensor] = {}
    for shapes in groups:
        for name, shape in shapes.items():
            length = -(-math.prod(shape) // len(whole))
            joined = torch.cat([_cut(part, start, (length,)) for part in whole])
            tensors[name] = _cut(joined, 0, shape).clone()
            start += length
    return tensors


def _frozen(source: Path, states: dict[str, Any], within: Path | None, stage: int, ranks: int) -> dict[str, Tensor]:
    """The parameters that weren't trained, which the optimizer has none of; under ZeRO 3 a part lies with each rank."""
    shapes = {str(name): _shape(shape) for name, shape in (states.get("frozen_param_shapes") or {}).items()}
    if not shapes:
        return {}
    parts: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for rank in range(ranks if stage == 3 else 1):
        file = source.with_name(_ZERO_3.replace("rank_0_", f"rank_{rank}_", 1)) if stage == 3 else source
        with reading(file), SavedFile(file, within) as saved:
            fragments = saved.content["frozen_param_fragments"]
            for name, part in saved.read({name: fragments[name] for name in shapes}).items():
                parts[name].append(part.flatten())
    return {name: _cut(torch.cat(parts[name]), 0, shape).clone() for name, shape in shapes.items()}


def _cut(vector: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    n = math.prod(shape)
    if vector.dim() != 1 or start + n > len(vector):
        raise ValueError("a parameter beyond its partition")
    return vector[start : start + n].view(shape)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > 64 or not all(type(n) is int and 0 <= n for n in value):
        raise ValueError("no shape")
    return tuple(value)


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
