"""What a monitor is given, checked before the first step."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from phasewatch.callbacks.trainers.schedule import Budget
from phasewatch.callbacks.trainers.session import Options
from phasewatch.monitor.errors import LARGEST_STEP, PhasewatchError, real_number, whole_number
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.probing.automatic import WORD
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.sink import Sink
from phasewatch.monitor.snapshots.sharded import described, is_sharded
from phasewatch.monitor.snapshots.snapshot import Snapshot


def check_call(model: Any, run: Any, at: Any, measure: Any, *, name: str = "PhaseMonitor") -> None:
    """Refuse what no rank can work with.

    Args:
        model: the model in training.
        run: the run's folder.
        at: the schedule.
        measure: where to measure.
        name: of what was called.

    Raises:
        PhasewatchError: if something is of another kind.
    """
    if not callable(at):
        raise PhasewatchError(
            f"{name}(at={at!r}) must be a schedule such as every(100), or any function from a step to True or False."
        )
    if measure not in {"inline", "background"}:
        raise PhasewatchError(f"{name}(measure={measure!r}) must be 'inline' or 'background'.")
    if not isinstance(model, nn.Module):
        raise PhasewatchError(f"{name}(model=...) must be a torch.nn.Module; a {type(model).__name__} came.")
    if not isinstance(run, str | Path):
        raise PhasewatchError(f"{name}(run={run!r}) must be the path of a folder.")


def checked_options(
    at: Any,
    sinks: Any,
    measure: str,
    keep_snapshots: bool,
    average: Any,
    sampler: Any,
    calibrate_at: Any,
    *,
    name: str = "PhaseMonitor",
) -> Options:
    """The options of a session.

    Raises:
        PhasewatchError: if they make no sense.
    """
    sinks = checked_sinks(sinks, name)
    if average is not None:
        hint = "such as 0.02: the share of the steps so far to average over, and no decay"
        average = real_number(f"{name}(average=...)", average, above=0, most=0.5, hint=hint)
    if sampler is not None and sampler != WORD:
        raise PhasewatchError(
            f"{name}(sampler={sampler!r}) must be 'calibrate' or left out. A setting belongs to the probe: "
            "Probe(sampler=...) or probe.with_sampler(...)."
        )
    if calibrate_at is not None:
        calibrate_at = whole_number(f"{name}(calibrate_at=...)", calibrate_at, least=0)
        if sampler is None:
            raise PhasewatchError(
                f"{name}(calibrate_at={calibrate_at}) says when to calibrate: give sampler='calibrate' too."
            )
    return Options(
        sinks=sinks,
        background=measure == "background",
        keep_snapshots=keep_snapshots,
        fraction=at.fraction if isinstance(at, Budget) else None,
        average=average,
        calibrate=sampler is not None,
        calibrate_at=calibrate_at,
    )


def check_probe(model: nn.Module, probe: Any, average: float | None) -> None:
    """Refuse a probe that isn't of this model.

    Raises:
        PhasewatchError: if it isn't, its own model is sharded, or the weights of a sharded model are to be averaged.
    """
    if not isinstance(probe, Probe):
        raise PhasewatchError(f"PhaseMonitor(probe=...) must be a Probe; a {type(probe).__name__} came.")
    if probe.is_sharded:
        raise PhasewatchError(
            "PhaseMonitor(probe=...) measures on rank 0 alone, and this probe's model is spread over several "
            "processes. Give a probe of the whole model, or keep checkpoints and have every rank replay them with this "
            "probe."
        )
    sharded = is_sharded(model)
    if sharded and average is not None:
        raise PhasewatchError(
            f"PhaseMonitor(average={average!r}) can't average weights that are spread over several processes. Leave it "
            "out, and replay pw.averaged(series) of the snapshots."
        )
    try:
        if not sharded:
            probe.subject.model.load(Snapshot.of(model, 0))
        elif (shapes := described(model)) is not None:
            probe.subject.model.fitting(shapes)
    except PhasewatchError as error:
        hint = _hint_of_a_split_model()
        raise PhasewatchError(f"PhaseMonitor(model=...) is not the model of its probe: {error}{hint}") from error


def _hint_of_a_split_model() -> str:
    """What else may be wrong where several processes train."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return ""
    return (
        " If this process holds a part of the model (a stage of a pipeline, some experts, or tensor parallelism of "
        "Megatron or DeepSpeed), it can't be gathered: replay the training's checkpoints."
    )


def checked_sinks(sinks: Any, name: str = "PhaseMonitor") -> Sequence[Sink]:
    """The sinks as a list.

    Raises:
        PhasewatchError: if one of them is none.
    """
    if not isinstance(sinks, Iterable):
        raise PhasewatchError(f"{name}(sinks=...) must be a list of sinks; a {type(sinks).__name__} came.")
    sinks = list(sinks)
    for sink in sinks:
        if (
            isinstance(sink, type)
            or not callable(getattr(sink, "write", None))
            or not callable(getattr(sink, "close", None))
        ):
            raise PhasewatchError(
                f"{name}(sinks=[{sink!r}]) must hold objects with write(point_or_transition) and close()."
            )
    return sinks


def shown(step: Any) -> str:
    """A step as it came, for a message."""
    try:
        return printable(repr(step), 80)
    except Exception:  # an integer of 5,000 digits has no repr
        return f"a {type(step).__name__}"


def whole_step(step: Any) -> int:
    """A training step of any library's type as an int.

    Raises:
        PhasewatchError: if it is none.
    """
    try:
        number = int(step)
        if number == step and 0 <= number <= LARGEST_STEP:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise PhasewatchError(f"a training step is a whole number from 0 to {LARGEST_STEP}.")
