"""The snapshots of a run: how they are written, and their only reader."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.snapshot import Snapshot


@dataclass(frozen=True)
class SnapshotFolder:
    """The snapshots of a run, one safetensors file a step: `step-00001234.safetensors`.

    Attributes:
        path: the folder, as a path or a string; made when the first snapshot is saved.

    Example:
        >>> import tempfile, torch
        >>> folder = SnapshotFolder(tempfile.mkdtemp())
        >>> folder.save(Snapshot.of(torch.nn.Linear(2, 1), step=100))
        >>> folder.steps, list(folder.load(100).tensors), folder.source(100).name
        ((100,), ['bias', 'weight'], 'step-00000100.safetensors')
    """

    path: Path

    _PATTERN = re.compile(r"step-(\d+)\.safetensors")

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are there, in order."""
        if not self.path.is_dir():
            return ()
        found = (self._PATTERN.fullmatch(entry.name) for entry in self.path.iterdir())
        return tuple(sorted(int(match[1]) for match in found if match))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of safetensors files in the folder that aren't named as a snapshot is."""
        return tuple(sorted(e.name for e in self.path.glob("*.safetensors") if not self._PATTERN.fullmatch(e.name)))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Snapshot]:
        return (self.load(step) for step in self.steps)

    def source(self, step: int) -> Path:
        """The file of a step."""
        return self.path / f"step-{step:08d}.safetensors"

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot; a file under its final name is always whole, whatever kills the process.

        Raises:
            OSError: if the disk refuses it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.source(snapshot.step)
        unfinished = target.with_suffix(".unfinished")
        try:
            save_file(dict(snapshot.tensors), unfinished, metadata={"step": str(snapshot.step)})
            os.replace(unfinished, target)
        except SafetensorError as error:  # which is what a full disk is to safetensors
            raise OSError(str(error)) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, step: int) -> Snapshot:
        """Read the snapshot of a step.

        Args:
            step: one of `steps`.

        Returns:
            The snapshot as it was saved, bit for bit.

        Raises:
            PhasewatchError: if the file is missing or damaged.
        """
        source = self.source(step)
        try:
            return Snapshot(step, load_file(source))
        except (OSError, SafetensorError) as error:
            raise PhasewatchError(
                f"The snapshot {source} can't be read ({error}). Delete it to go on without step {step}."
            ) from error
