"""How far a replay has come, as its run's folder tells it to anybody who looks."""

import os
import time
from pathlib import Path

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.files import inside, read_bytes
from phasewatch.monitor.formatting import integer
from phasewatch.monitor.runs.board import Board
from phasewatch.monitor.runs.members import BEAT_SECONDS, Peer
from phasewatch.monitor.trajectories.trajectory import parse_points


def status(run: str | Path, *, watch_seconds: float = BEAT_SECONDS + 1.0) -> str:
    """How many checkpoints are measured, who is at work, and how long the rest takes.

    Members are told alive by watching their files grow, since the clocks of machines differ.

    Args:
        run: the run's folder.
        watch_seconds: how long to watch where workers share the run.

    Returns:
        Lines of text.

    Raises:
        PhasewatchError: if there is no run, or its points can't be read.
    """
    run = Path(run)
    if not os.path.lexists(run / "run.json"):
        raise PhasewatchError(
            f"--status {run}: there is no run.json, so no replay has begun there; give a run's folder."
        )
    file = inside(run, "points.jsonl")
    kept = parse_points(read_bytes(file, within=run), str(file)) if os.path.lexists(file) else []
    measured = {point.step for point in kept}
    board = Board(run)
    if not board.is_there:
        return f"{run}: {integer(len(measured))} checkpoints measured. No replay shares its work out there."
    board.refresh()
    steps = {step for step in board.tasks if step is not None}
    peers = [Peer(path, run) for path in sorted(board.members.glob("*.jsonl"))]
    counts, failed, seconds = _read(board, peers, measured)
    alive = _alive(peers, watch_seconds)
    workers = [peer for peer in alive if peer.name != board.driver]
    left = len(steps - measured - failed)
    lines = [f"{run}: {integer(len(measured))} checkpoints measured, {integer(left)} to go"]
    if failed:
        lines[0] += f", {integer(len(failed))} failed"
    if left and workers and seconds:
        mean = sum(seconds) / len(seconds)
        lines[0] += f", about {_in_words(mean * -(-left // len(workers)))} left"
    lines += [f"  {peer.name}: {integer(counts[peer.name])} measured" for peer in workers]
    if not workers and left:
        lines.append("  no worker gives a sign of life")
    if left and board.driver not in {peer.name for peer in alive}:
        lines.append("  no replay collects the points; start the same command again")
    return "\n".join(lines)


def _read(board: Board, peers: list[Peer], measured: set[int]) -> tuple[dict[str, int], set[int], list[float]]:
    """Results of each member, the steps that failed and aren't measured, and the seconds that results took."""
    counts: dict[str, int] = {}
    failed: set[int] = set()
    seconds: list[float] = []
    for peer in peers:
        counts[peer.name] = 0
        for record in peer.read():
            task = record.get("task")
            if not isinstance(task, int) or not 0 <= task < len(board.tasks) or (step := board.tasks[task]) is None:
                continue
            if "error" in record:
                failed.add(step)
                continue
            counts[peer.name] += 1
            if isinstance(record.get("point"), dict):
                measured.add(step)
            if isinstance(took := record.get("seconds"), int | float) and took >= 0:
                seconds.append(float(took))
    return counts, failed - measured, seconds


def _alive(peers: list[Peer], watch_seconds: float) -> list[Peer]:
    """The members that write something while one watches."""
    candidates = [peer for peer in peers if not peer.is_gone()]
    end = time.monotonic() + watch_seconds
    alive: list[Peer] = []
    while candidates and time.monotonic() < end:
        time.sleep(0.2)
        alive += [peer for peer in candidates if peer.read()]
        candidates = [peer for peer in candidates if peer not in alive]
    return [peer for peer in alive if not peer.has_left]


def _in_words(seconds: float) -> str:
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {name}s"
    return f"{seconds:.0f} seconds"
