"""A figure as an SVG image that is part of a page."""

import base64
import io

from markupsafe import Markup
from matplotlib.figure import Figure


def svg_address(figure: Figure) -> Markup:
    """The data address of a figure as an SVG image, whose identifiers can't clash with the page's.

    Args:
        figure: what to draw.

    Returns:
        The value of an image's `src`.

    >>> svg_address(Figure())[:26]
    Markup('data:image/svg+xml;base64,')
    """
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Markup("data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii"))
