"""A figure as an SVG image that is part of a page."""

import base64

from markupsafe import Markup
from matplotlib.figure import Figure

from phasewatch.callbacks.figures.rendering import render


class NotebookFigure(Figure):
    """A figure that belongs to no window, and that a notebook shows all the same."""

    def _repr_html_(self) -> str:
        return (
            f'<img src="{svg_address(self)}" style="width:{self.get_figwidth():.2f}in;max-width:100%;background:white">'
        )


def svg_address(figure: Figure) -> Markup:
    """The data address of a figure as an SVG image, whose identifiers can't clash with the page's.

    Args:
        figure: what to draw.

    Returns:
        The value of an image's `src`.

    >>> svg_address(Figure())[:26]
    Markup('data:image/svg+xml;base64,')
    """
    image = render(figure, "svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Markup("data:image/svg+xml;base64," + base64.b64encode(image).decode("ascii"))
