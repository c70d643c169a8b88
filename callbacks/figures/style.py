"""How each kind of transition looks in figures, in the report and in the terminal: the only place that says so."""

from dataclasses import dataclass

from phasewatch.monitor.trajectories.kinds import Kind


@dataclass(frozen=True)
class KindStyle:
    """The look of one kind.

    Attributes:
        colour: in figures, as a hexadecimal RGB colour.
        shade: the share of the colour, from 0 to 1, in the background of a stage in figures; the rest is white. Each
            kind has its own, so that kinds differ in black and white too.
        on_light: the colour of the kind's label on the report's light page; dark enough for white letters on it.
        on_dark: the same on its dark page; light enough for dark letters on it.
        terminal: in the terminal, as a style of the library rich.
        explanation: its entry in a figure's legend; empty if the letter is enough.
    """

    colour: str
    shade: float
    on_light: str
    on_dark: str
    terminal: str
    explanation: str = ""


# The colours of A and B are blue and vermilion of Okabe & Ito's palette, which all kinds of colour vision tell apart.
KIND_STYLES = {
    Kind.A: KindStyle("#0072B2", 0.12, on_light="#0072b2", on_dark="#6cb8ea", terminal="bold blue"),
    Kind.B: KindStyle("#D55E00", 0.32, on_light="#c2500a", on_dark="#f0965a", terminal="bold yellow"),
    Kind.OTHER: KindStyle(
        "#767676", 0.2, on_light="#6b6b6b", on_dark="#a09f9a", terminal="bold", explanation="other: neither A nor B"
    ),
}
"""The look of each kind; a kind's label is `Kind.label`."""

PROVISIONAL_HATCH = "////"
"""The hatch of a stage that is provisional, as matplotlib writes it."""

INK = "#1c1c1c"
"""The colour of curves and letters in figures."""

MUTED = "#6b6b6b"
"""The colour of axes and legends in figures."""
