"""A figure as bytes, with nothing of the drawing left behind."""

import gc
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib import font_manager, mathtext
from matplotlib.figure import Figure


def render(figure: Figure, form: str, **options: Any) -> bytes:
    """Draw a figure, and let go of what matplotlib keeps of it.

    Matplotlib keeps its fonts' files open for each thread that ever drew, and a sink has a thread of its own in each
    run. Its parser of formulas leaves cycles that hold the frames of all callers, with all points of a report for one.

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
    with cycles_collected():
        figure.savefig(file, format=form, **options)
        if threading.current_thread() is not threading.main_thread():
            _let_go_of_fonts()
    return file.getvalue()


@contextmanager
def cycles_collected() -> Iterator[None]:
    """Collect the cycles that the block makes, in a time that doesn't grow with what was there before.

    Nothing is collected where the process has frozen objects of its own.
    """
    freezes = not gc.get_freeze_count()
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.collect()
            gc.unfreeze()


def _let_go_of_fonts() -> None:
    """Empty matplotlib's caches of fonts, and of formulas, which hold fonts; both fill again when they are asked."""
    for owner, name in ((font_manager, "_get_font"), (mathtext.MathTextParser, "_parse_cached")):
        clear = getattr(getattr(owner, name, None), "cache_clear", None)
        if clear:
            clear()
