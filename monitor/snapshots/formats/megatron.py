"""Folders of Megatron: its distributed form, and the older one of a single model-parallel rank."""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from phasewatch.monitor.snapshots.formats.base import Entry
from phasewatch.monitor.snapshots.formats.distributed import DistributedFolder
from phasewatch.monitor.snapshots.formats.torch_files import TorchFile
from phasewatch.monitor.snapshots.steps import Step

_STACKED = re.compile(r"(.*\blayers)\.(?!\d+\.)(.+)")


@dataclass(frozen=True)
class MegatronDistributed(DistributedFolder):
    """`iter_0000100/` with `common.pt`, `metadata.json` and `.metadata` (`torch_dist`); NeMo's `weights/` as well."""

    def claims(self, path: Path) -> Path | None:
        """A distributed folder with Megatron's file of what isn't sharded."""
        source = super().claims(path)
        return source if source and (source.parent / "common.pt").is_file() else None

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The weights; layers that were saved as one tensor are taken apart, since a model has one for each.

        Raises:
            PhasewatchError: if a file can't be read, or the pieces don't make up the tensors.
        """
        tensors: dict[str, Tensor] = {}
        for name, tensor in super().load(source, within).items():
            stacked = _STACKED.fullmatch(name)
            if stacked and tensor.dim():
                tensors |= {f"{stacked[1]}.{i}.{stacked[2]}": layer.clone() for i, layer in enumerate(tensor)}
            else:
                tensors[name] = tensor
        return tensors


@dataclass(frozen=True)
class MegatronRank:
    """`iter_0000100/mp_rank_00/model_optim_rng.pt`, of a model on one model-parallel rank.

    Attributes:
        key: of the state dict to read; None for the model's own.
    """

    key: str | None = None

    def claims(self, path: Path) -> Path | None:
        """A folder with one such file."""
        files = sorted(path.glob("mp_rank_*/model_optim_rng.pt"))
        return files[0] if len(files) == 1 else None

    def step(self, entry: Entry) -> Step | None:
        """The iteration in the file, or the one in the folder's name."""
        source = self.claims(entry.path)
        return TorchFile().step(entry._replace(path=source)) if source else None

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The weights in the file, by the names that lead to them.

        Raises:
            PhasewatchError: if the file can't be read.
        """
        return TorchFile(self.key).load(source, within)
