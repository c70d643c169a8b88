"""A run in a terminal: its transitions as a table and in words, and a point as one line of a log."""

import re
import textwrap
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from phasewatch.callbacks.figures.style import KIND_STYLES
from phasewatch.monitor.emergence.watching import NewRedFlags, RedFlag, red_flags
from phasewatch.monitor.errors import MOST_CHARACTERS
from phasewatch.monitor.formatting import MISSING, integer, measured, number, percent, printable, value_and_error
from phasewatch.monitor.trajectories.changes import UNKNOWN_CHANGE, Transition
from phasewatch.monitor.trajectories.points import Point
from phasewatch.monitor.trajectories.trajectory import Trajectory

_INSIDE_A_NUMBER = re.compile(r"(?<=\d) (?=\d{3}\b|[±%])|(?<=[±>]) (?=\d)")


def print_transitions(
    trajectory: Trajectory,
    transitions: Sequence[Transition],
    console: Console | None = None,
    *,
    signal: str = "llc",
    remarks: str = "",
) -> None:
    """Print the transitions as a table, then each as a sentence, red flags, and how many points they were found in.

    A red flag is a watched behaviour whose log-likelihood has turned after a rise.

    The second line of a row has the 95 % intervals of start and end, and how many of the points are doubtful.

    Without a terminal the same text comes without colours. No row is folded and no number is broken, however narrow
    the terminal.

    Args:
        trajectory: the points that the transitions were found in.
        transitions: what to print, in order.
        console: where to print; standard output if None.
        signal: the signal whose transitions they are.
        remarks: lines to print after the sentences.

    Example:
        >>> import phasewatch as pw
        >>> from phasewatch.callbacks.sinks.terminal import print_transitions
        >>> trajectory = pw.Trajectory.from_values([1, 10, 100], loss=[3.0, 2.0, 1.9], llc=[1.0, 20.0, 21.0])
        >>> print_transitions(trajectory, pw.find_transitions(trajectory))
        No transition so far.
        3 points.
    """
    console = console or Console(highlight=False)
    if transitions:
        table = _table(transitions, signal)
        # Rich folds cells to fit the console, inside a number if need be; it leaves a table of fixed width alone.
        table.width = console.measure(table, options=console.options.update(max_width=1000)).maximum
        console.print(table, soft_wrap=True)
        console.print()
        for transition in transitions:
            _print_wrapped(console, printable(transition.sentence(), MOST_CHARACTERS))
        console.print()
    else:
        _print_wrapped(console, "No transition so far.")
    for remark in remarks.splitlines():
        _print_wrapped(console, printable(remark, MOST_CHARACTERS))
    flags = red_flags(trajectory)
    for flag in flags:
        _print_wrapped(console, printable(flag, MOST_CHARACTERS), style="bold red")
    if remarks or flags:
        console.print()
    _print_wrapped(console, _count(trajectory, signal), style="dim")


def point_line(point: Point) -> str:
    """One line of a live log, as wide for every point: `step     1 234  loss    1.945  llc    142.5 ± 0.8    ok`."""
    value, error = measured(point.llc.value, point.llc.error)
    spread = "" if value == MISSING or error == MISSING else f"± {error}"
    return (
        f"step {integer(point.step):>9}  loss {number(point.loss):>8}  llc {value:>8} {spread:<6}  "
        f"{point.llc.health.name.lower()}"
    )


def _table(transitions: Sequence[Transition], signal: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    own = signal not in {"llc", "loss"}
    table.add_column("kind")
    for name in ("steps, 95 % intervals", *([printable(signal, 40)] if own else []), "loss", "llc", "confidence"):
        table.add_column(Text(name), justify="right")
    for transition in transitions:
        llc = transition.changes.get("llc", UNKNOWN_CHANGE)
        cells: list[Text | str] = [
            Text(transition.kind.label, style=KIND_STYLES[transition.kind].terminal),
            Text.assemble(
                f"{integer(transition.start)} → {integer(transition.end)}\n",
                (f"{_interval(transition.start_interval)} → {_interval(transition.end_interval)}", "dim"),
            ),
            number(transition.loss_change, sign=True),
            value_and_error(llc.value, llc.error, sign=True),
            Text.assemble(percent(transition.confidence), *((f"\n{remark}", "dim") for remark in transition.remarks)),
        ]
        if own:
            cells.insert(2, value_and_error(transition.change.value, transition.change.error, sign=True))
        table.add_row(*cells)
    return table


def _interval(steps: tuple[int, int]) -> str:
    return f"{integer(steps[0])}–{integer(steps[1])}"


def _count(trajectory: Trajectory, signal: str) -> str:
    """How many points there are, and how many of them are doubtful or left out."""
    points, usable = len(trajectory), trajectory.usable(signal)
    text = f"{integer(points)} point{'' if points == 1 else 's'}"
    if len(usable) < points:
        needed = "λ̂ or loss" if signal == "llc" else printable(signal, 40)
        text += f", {integer(points - len(usable))} left out without {needed}"
    if signal == "llc" and (doubtful := sum(point.llc.health.doubtful for point in usable)):
        text += f", {integer(doubtful)} doubtful"
    return text + "."


def _print_wrapped(console: Console, sentence: str, style: str = "") -> None:
    """Print a sentence, wrapped at its words but never inside a number such as `40 404` or `1.2 ± 0.3`."""
    # textwrap breaks at ASCII blanks alone, so a no-break space holds a number together until the lines are cut.
    glued = _INSIDE_A_NUMBER.sub("\N{NO-BREAK SPACE}", sentence)
    for line in textwrap.wrap(glued, console.width, break_long_words=False, break_on_hyphens=False):
        console.print(Text(line.replace("\N{NO-BREAK SPACE}", " "), style=style), soft_wrap=True)


class TerminalSink:
    """Prints each point and each transition as it comes, beside a progress bar if one runs; each red flag once."""

    def __init__(self) -> None:
        self._trajectory: Callable[[], Trajectory] | None = None
        self._red_flags = NewRedFlags()

    def attach(self, trajectory: Callable[[], Trajectory]) -> None:
        """Be told where the points so far are kept, for the red flags; none without it.

        Args:
            trajectory: returns the points so far.
        """
        self._trajectory = trajectory

    def write(self, item: Point | Transition) -> None:
        """Print one line, and one for each watched log-likelihood that has turned since the last point."""
        tqdm.write(printable(f"→ {item}" if isinstance(item, Transition) else point_line(item), MOST_CHARACTERS))
        if isinstance(item, Point) and self._trajectory is not None:
            self._print(self._red_flags.after(item, self._trajectory))

    def close(self) -> None:
        """Print the red flags of the last points."""
        if self._trajectory is not None:
            self._print(self._red_flags.among(self._trajectory()))

    def _print(self, flags: Sequence[RedFlag]) -> None:
        for flag in flags:
            tqdm.write(printable(flag, MOST_CHARACTERS))
