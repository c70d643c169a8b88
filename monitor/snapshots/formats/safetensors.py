"""Single safetensors files."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from phasewatch.monitor.snapshots.formats.base import Entry, is_weights_file, reading, some_tensors
from phasewatch.monitor.snapshots.steps import step_in_name


@dataclass(frozen=True)
class SafetensorsFile:
    """`step1000.safetensors`; the step is in the name."""

    suffixes = (".safetensors",)

    def claims(self, path: Path) -> Path | None:
        """A file with this suffix."""
        return path if is_weights_file(path, self.suffixes) else None

    def step(self, entry: Entry) -> int | None:
        """The step in the name."""
        return step_in_name(entry.name)

    def load(self, source: Path) -> dict[str, Tensor]:
        """Copies: memory-mapped tensors would change when a training run writes over the file.

        Raises:
            PhasewatchError: if the file can't be read or holds no tensors.
        """
        with reading(source):
            source.open("rb").close()  # safetensors reports every file that it can't open as missing
            with safe_open(source, framework="pt") as content:
                tensors = {name: content.get_tensor(name).clone() for name in content.keys()}
        return some_tensors(tensors, source)
