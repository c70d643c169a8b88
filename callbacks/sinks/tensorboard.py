"""Points and transitions in TensorBoard."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from phasewatch.monitor.errors import PhasewatchError, requires
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.trajectories.changes import Transition
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory
from phasewatch.monitor.trajectories.transitions import find_transitions

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_SECONDS = 10
"""What was written is on disk after at most this time; TensorBoard itself looks every 30 seconds."""

LAYOUT = {"phasewatch": {"λ̂ ± 2 s.e.": ["Margin", ["phase/llc", "phase/llc_low", "phase/llc_high"]]}}
"""A chart under Custom Scalars: λ̂ in its band."""


class TensorBoardSink:
    """Writes points to TensorBoard as scalars `phase/...`, each at its own step, and transitions as text.

    A point that is measured late, as in the background, stands at the step of its snapshot. λ̂ with its band of ± 2
    standard errors is a chart under Custom Scalars. `phasewatch transitions FOLDER` reads the folder again.

    Args:
        to: a folder, such as one beside those of the training's own logs, or a `SummaryWriter` that is open already
            and stays open.

    Raises:
        PhasewatchError: if the package tensorboard isn't installed, or `to` is neither.

    Example:
        >>> import tempfile
        >>> import phasewatch as pw
        >>> point = pw.Trajectory.from_values([10], loss=[2.5], llc=[31.0])[0]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = pw.TensorBoardSink(folder)
        ...     sink.write(point)
        ...     sink.close()
        ...     pw.Trajectory.read(folder).llc
        array([31.])
    """

    def __init__(self, to: "str | Path | SummaryWriter") -> None:
        with requires("TensorBoardSink()"):
            from torch.utils.tensorboard import SummaryWriter
        if isinstance(to, str | Path):
            self._writer, self._is_ours = SummaryWriter(str(to), flush_secs=FLUSH_SECONDS), True
        elif callable(getattr(to, "add_scalar", None)):
            self._writer, self._is_ours = to, False
        else:
            raise PhasewatchError(f"TensorBoardSink({to!r}) takes a folder or a SummaryWriter.")
        self._writer.add_custom_scalars(LAYOUT)
        self._trajectory: Callable[[], Trajectory] | None = None

    def attach(self, trajectory: Callable[[], Trajectory]) -> None:
        """Take the function that returns the trajectory so far."""
        self._trajectory = trajectory

    def write(self, item: Point | Transition) -> None:
        """Take one point or transition."""
        if isinstance(item, Transition):
            self._writer.add_text("phase/transition", printable(item, 1000), global_step=item.end)
            return
        for tag, value in _scalars(item).items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, global_step=item.step)

    def close(self) -> None:
        """Write the transitions of the whole trajectory as one text, and close a writer of our own."""
        if self._trajectory is not None and len(trajectory := self._trajectory()):
            lines = [f"- {printable(transition, 1000)}" for transition in find_transitions(trajectory)]
            text = "\n".join(lines) or "No transition so far."
            self._writer.add_text("phase/transitions", text, global_step=trajectory[-1].step)
        self._writer.flush()
        if self._is_ours:
            self._writer.close()


def _scalars(point: Point) -> dict[str, float]:
    """A point's values by tag; a metric whose tag is taken becomes `phase/metrics/NAME`."""
    llc = point.llc
    scalars = {
        "phase/loss": point.loss,
        "phase/llc": math.nan if llc.health.failed else llc.value,
        "phase/llc_error": llc.error,
        "phase/llc_low": llc.value - 2 * llc.error,
        "phase/llc_high": llc.value + 2 * llc.error,
        "phase/doubtful": float(llc.health.doubtful),
    }
    for name, estimate in point.parts.items():
        scalars[f"phase/parts/{printable(name)}"] = estimate.value
    for name, value in point.metrics.items():
        tag = f"phase/{printable(name)}"
        scalars[f"phase/metrics/{printable(name)}" if tag in scalars else tag] = value
    return scalars
