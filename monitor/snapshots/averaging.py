"""Averaged weights: a snapshot without the last updates' noise, kept beside a run or taken over a saved series.

Late in training λ̂ moves between neighbouring snapshots with where the last minibatches happened to push the weights.
An average over the steps around takes most of that away. How far it may reach without bending the curve is a share of
the steps so far and no fixed number of them, since what λ̂ does takes its time in log step. The last 2 % of the steps
cut the jitter 3 and 2 times on the two toy tasks, the last 5 % 6 and 4 times; where λ̂ moves fast, it is seen to do so
about that share of the step later (experiments/smooth_curves.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from phasewatch.monitor.errors import PhasewatchError, real_number, whole_number
from phasewatch.monitor.snapshots.names import match_names
from phasewatch.monitor.snapshots.series import open_series
from phasewatch.monitor.snapshots.snapshot import Snapshot, Snapshots, unwrap

_STATISTICS = ("running_mean", "running_var")
"""Buffers of batch norm, which belong to the weights that they were collected with; the mean of several is of none."""


class RunningAverage:
    """The mean of a model's parameters over about the last `share` of the steps so far.

    Step s weighs in it as s^(1/share − 1), which is the polynomial-decay averaging of Shamir & Zhang (2013): at step t,
    what was taken in up to step s makes up (s / t)^(1/share) of it. At a share of 0.02 half of it is younger than 1.4 %
    of t, and its mean age is 2 % of t. A step that isn't taken in is made up for by the next one that is.

    It costs a copy of the parameters, on their own device and in float32 at least, and a pass over them at each update.
    The model is only read.

    Args:
        share: above 0 and at most 0.5. A larger one removes more of the noise, and shows a change later.

    Attributes:
        share: as given.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._step: int | None = None
        self._weights: dict[str, Tensor] = {}

    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights of a step in. The first one, and one before the last one seen, begin a new average.

        Args:
            model: the module in training.
            step: the step that it is at.
        """
        if step == self._step:
            return
        if self._step is None or step < self._step:
            self._weights.clear()
            kept = 0.0
        else:
            kept = (self._step / step) ** (1 / self.share)
        # A tensor made in inference mode could not be updated outside it.
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in _averaged_parameters(model):
                average = self._weights.get(name)
                if average is None or (average.shape, average.device) != (parameter.shape, parameter.device):
                    # In bfloat16 the last bit is larger than an update.
                    wide = torch.promote_types(parameter.dtype, torch.float32)
                    self._weights[name] = parameter.detach().to(wide, copy=True)
                else:
                    average.lerp_(parameter.detach().to(average.dtype), 1 - kept)
        self._step = step

    def snapshot(self, model: nn.Module, step: int) -> Snapshot:
        """A snapshot of the averaged parameters, in the parameters' own dtypes, with the model's buffers as they are.

        Args:
            model: the module in training.
            step: the step that it is at, already taken in.

        Returns:
            The snapshot.
        """
        snapshot = Snapshot.of(model, step)
        for name, _ in _averaged_parameters(model):
            snapshot.tensors[name].copy_(self._weights[name])
        return snapshot


def _averaged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in unwrap(model).named_parameters() if _is_continuous(p))


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _found(middle: Snapshot, tensors: Mapping[str, Tensor], step: int) -> dict[str, str]:
    """The names of a snapshot's tensors in another one, perhaps saved inside a wrapper; none if it lacks some."""
    try:
        return match_names(tensors, {name: name for name in middle.tensors}, step=step).names
    except PhasewatchError:
        return {}


@dataclass(frozen=True)
class AveragedSnapshots:
    """Another series' snapshots, each the mean of its neighbours; made by `averaged`.

    Attributes:
        series: the snapshots as they were saved.
        neighbours: the most to take on each side.
        within: how far away a neighbour may be, as a share of the step.
    """

    series: Snapshots
    neighbours: int
    within: float

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the series."""
        return self.series.steps

    def source(self, step: int) -> Path:
        """Where the snapshot in the middle comes from."""
        return self.series.source(step)

    def window(self, step: int) -> tuple[int, ...]:
        """The steps that are averaged at a step: as many before it as after it, so fewer near both ends."""
        steps = self.series.steps
        middle = steps.index(step)
        reach = min(self.neighbours, middle, len(steps) - 1 - middle)
        while step - steps[middle - reach] > self.within * step or steps[middle + reach] - step > self.within * step:
            reach -= 1
        return steps[middle - reach : middle + reach + 1]

    def load(self, step: int) -> Snapshot:
        """Read the snapshots around a step, and average them.

        Integer tensors and the running statistics of batch norms are those of the step itself.

        Args:
            step: one of `steps`.

        Returns:
            The mean, in the tensors' own dtypes.

        Raises:
            PhasewatchError: if a snapshot can't be read, or two hold different tensors.
        """
        middle = self.series.load(step)
        window = self.window(step)
        wide = {
            name: torch.promote_types(tensor.dtype, torch.float64)
            for name, tensor in middle.tensors.items()
            if _is_continuous(tensor) and name.rpartition(".")[2] not in _STATISTICS
        }
        total = {name: middle.tensors[name].to(dtype) for name, dtype in wide.items()}
        for other in window:
            if other == step:
                continue
            tensors = self.series.load(other).tensors
            found = _found(middle, tensors, other)
            for name in total:
                tensor = tensors.get(found.get(name, name))
                if tensor is None or tensor.shape != total[name].shape:
                    raise PhasewatchError(
                        f"averaged(...) can't average steps {step} and {other}: {name} has another shape in one of "
                        "them, or is missing. Give a series of one model."
                    )
                total[name] = total[name] + tensor
        means = {name: (t / len(window)).to(middle.tensors[name].dtype) for name, t in total.items()}
        return Snapshot(step, {**middle.tensors, **means})


def averaged(series: str | Path | Snapshots, *, neighbours: int = 5, within: float = 0.05) -> AveragedSnapshots:
    """A dense series whose snapshot at each step is the mean of its neighbours, for `replay(averaged(...), probe)`.

    Loss, λ̂ and metrics of its points are those of the averaged weights. Neighbouring points share snapshots, so what
    is left of their noise is correlated; and λ̂ is higher by nβ times what the averaged weights' loss is lower, so they
    don't compare with points of the series itself. Where a series is too sparse, average while it is trained:
    `PhaseMonitor(..., average=0.02)`.

    Args:
        series: a run's folder, a folder of checkpoints, or what `open_series` returned; complete, since the windows of
            its last steps change when it grows.
        neighbours: the most snapshots to take on each side of a step; there are fewer near the ends, and at either end
            none. Snapshots a few steps apart share most of their noise: what counts is the steps that they span.
        within: how far away a neighbour may be, as a share of the step: more smooths more, and bends the curve more.

    Returns:
        The series, which reads up to 2·neighbours + 1 files for each snapshot.

    Raises:
        PhasewatchError: if the series can't be used, or none of its snapshots has neighbours as close as that.

    Example:
        >>> import tempfile, torch
        >>> from phasewatch import SnapshotFolder
        >>> folder = SnapshotFolder(tempfile.mkdtemp())
        >>> for step in (1000, 1010, 1020):
        ...     folder.save(Snapshot(step, {"w": torch.tensor([float(step)])}))
        >>> series = averaged(folder)
        >>> series.window(1010), series.load(1010).tensors["w"]
        ((1000, 1010, 1020), tensor([1010.]))
    """
    neighbours = whole_number("averaged(neighbours=...)", neighbours, least=1)
    hint = "the share of a step that a neighbour may be away, such as 0.05"
    within = real_number("averaged(within=...)", within, above=0, below=1, hint=hint)
    snapshots = open_series(series) if isinstance(series, str | Path) else series
    made = AveragedSnapshots(snapshots, neighbours, within)
    if all(len(made.window(step)) == 1 for step in made.steps):
        raise PhasewatchError(
            f"averaged(within={within!r}) finds no snapshot among {len(made.steps)} with one on each side that is no "
            "further away than that share of its step. Raise it, or average while training: "
            "PhaseMonitor(..., average=0.02)."
        )
    return made
