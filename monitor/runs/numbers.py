"""The numbers beside a run's snapshots, in `numbers.jsonl`: those that changed at each step."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError
from phasewatch.monitor.files import open_append, read_bytes
from phasewatch.monitor.strict_json import parse_json


class NumbersFile:
    """What a model's and a loss's numbers were at the steps of a run.

    Args:
        run: the run's folder.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> kept = NumbersFile(run)
        >>> kept.keep(10, {"temperature": 1.0, "p": 0.1})
        >>> kept.keep(20, {"temperature": 0.5, "p": 0.1})
        >>> NumbersFile(run).at(15), NumbersFile(run).at(20)
        ({'temperature': 1.0, 'p': 0.1}, {'temperature': 0.5, 'p': 0.1})
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "numbers.jsonl"
        self._changes: dict[int, dict[str, float]] = {}
        if os.path.lexists(self._path):
            with suppress(PhasewatchError, OSError):
                for line in read_bytes(self._path, within=run).splitlines():
                    self._read(line)
        self._last = self.at(max(self._changes, default=0))

    def keep(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append those that changed; a disk that refuses them costs a replay its warning, and nothing else."""
        changed = {name: value for name, value in numbers.items() if self._last.get(name) != value}
        if not changed:
            return
        self._last |= changed
        with suppress(OSError, PhasewatchError), open_append(self._path) as file:
            file.write(json.dumps({"step": step, "numbers": changed}).encode() + b"\n")

    def at(self, step: int) -> dict[str, float]:
        """The numbers at a step of training."""
        found: dict[str, float] = {}
        for changed in (numbers for at, numbers in sorted(self._changes.items()) if at <= step):
            found |= changed
        return found

    def _read(self, line: bytes) -> None:
        """Take a line over if it is one: the last may be cut off."""
        with suppress(PhasewatchError, ValueError, KeyError, TypeError, AttributeError):
            record: Any = parse_json(line.decode(), str(self._path))
            step, numbers = record["step"], record["numbers"]
            if type(step) is int and 0 <= step <= LARGEST_STEP:
                found = {n: v for n, v in numbers.items() if isinstance(v, int | float) and not isinstance(v, bool)}
                self._changes.setdefault(step, {}).update(found)
