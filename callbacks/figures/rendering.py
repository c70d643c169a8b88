"""A figure as bytes, with nothing of the drawing left behind."""

import io
import threading
from typing import Any

from matplotlib import font_manager, mathtext
from matplotlib.figure import Figure

from phasewatch.monitor.runs.exiting import settle_at_exit


def render(figure: Figure, form: str, **options: Any) -> bytes:
    """Draw a figure in a thread of its own, and let go of what matplotlib keeps of it.

    Matplotlib's parser of formulas leaves cycles that hold the frames of all callers, which would be ours, with all
    points of a report. It keeps its fonts' files open for each thread that ever drew.

    Args:
        figure: what to draw.
        form: the format, as `Figure.savefig` names it.
        options: further arguments of `Figure.savefig`.

    Returns:
        The file's content.

    >>> render(Figure(), "png")[1:4]
    b'PNG'
    """
    file = io.BytesIO()
    failures: list[BaseException] = []

    def draw() -> None:
        try:
            figure.savefig(file, format=form, **options)
        except BaseException as error:
            failures.append(error)
        finally:
            _let_go_of_fonts()

    thread = threading.Thread(target=draw, name="phasewatch-draw", daemon=True)
    settle_at_exit(thread)
    try:
        thread.start()
    except RuntimeError:  # from Python 3.12 on, a process that ends starts no thread
        draw()
    else:
        thread.join()
    if failures:
        raise failures[0]
    return file.getvalue()


def _let_go_of_fonts() -> None:
    """Empty matplotlib's caches of fonts, and of formulas, which hold fonts; both fill again when they are asked."""
    for owner, name in ((font_manager, "_get_font"), (mathtext.MathTextParser, "_parse_cached")):
        clear = getattr(getattr(owner, name, None), "cache_clear", None)
        if clear:
            clear()
