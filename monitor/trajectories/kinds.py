"""The kinds of transition: which changes of loss and complexity make one, and what it is called."""

import enum
from typing import Literal

Trend = Literal["up", "flat", "down"]


class Kind(enum.Enum):
    """What loss and complexity did across a transition (Hoogland et al. 2024, arXiv 2402.02364).

    A new kind is one member here, with its rule in `of` and its words in `verdict`, and its look in
    `callbacks/figures/style.py`.

    Example:
        >>> import phasewatch as pw
        >>> pw.Kind.of(loss="down", llc="up")
        <Kind.A: 'loss down, complexity up'>
        >>> pw.Kind.B.value, pw.Kind.B.label
        ('loss flat or down, complexity down', 'B')
    """

    A = "loss down, complexity up"
    B = "loss flat or down, complexity down"
    OTHER = "neither type A nor type B"

    @classmethod
    def of(cls, *, loss: Trend, llc: Trend) -> "Kind":
        """The kind of a transition.

        Args:
            loss: the trend of the loss across it.
            llc: the trend of λ̂ across it.

        Returns:
            A, B or OTHER.
        """
        if loss == "down" and llc == "up":
            return cls.A
        if loss != "up" and llc == "down":
            return cls.B
        return cls.OTHER

    @property
    def label(self) -> str:
        """The kind in a table or a figure: A, B or other."""
        return "other" if self is Kind.OTHER else self.name

    @property
    def verdict(self) -> str:
        """What the kind means for the model, as the end of a sentence."""
        return {
            Kind.A: "a type A transition, the model became more complex to fit the data better",
            Kind.B: "a type B transition, the model simplified itself",
            Kind.OTHER: "neither a type A nor a type B transition",
        }[self]
