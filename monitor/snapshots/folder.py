"""The snapshots of a run: how they are written, and their only reader."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError
from phasewatch.monitor.files import replacing
from phasewatch.monitor.snapshots.formats.safetensors import SafetensorsFile
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

    _PATTERN = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,18})\.safetensors")

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are there, in order."""
        if not self.path.is_dir():
            return ()
        found = (self._PATTERN.fullmatch(entry.name) for entry in self.path.iterdir())
        return tuple(sorted(step for match in found if match and (step := int(match[1])) <= LARGEST_STEP))

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
        try:
            with replacing(self.source(snapshot.step)) as unfinished:
                save_file(dict(snapshot.tensors), unfinished, metadata={"step": str(snapshot.step)})
        except SafetensorError as error:  # which is what a full disk is to safetensors
            raise OSError(str(error)) from error

    def load(self, step: int) -> Snapshot:
        """Read the snapshot of a step.

        Args:
            step: one of `steps`.

        Returns:
            The snapshot as it was saved, bit for bit.

        Raises:
            PhasewatchError: if the file is missing or damaged, or a link leads out of the folder.
        """
        try:
            return Snapshot(step, SafetensorsFile().load(self.source(step), self.path))
        except PhasewatchError as error:
            raise PhasewatchError(f"{error} To go on without step {step}, delete its snapshot.") from error
