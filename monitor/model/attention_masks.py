"""Attention masks in forms that Hugging Face models take under `vmap`.

With a mask of shape (sample, token), their code asks whether all of it is True, which `vmap` refuses. Without a mask,
or with one of shape (sample, 1, query, key), it doesn't. Which form means the same is for the loss to show.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phasewatch.monitor.model.minibatches import MOST_BYTES, Batches

NAME = "attention_mask"


@dataclass(frozen=True)
class MaskForm:
    """One form of the masks in stacked minibatches.

    Attributes:
        change: makes it of the stacked minibatches.
        fits: whether these minibatches can have this form.
    """

    change: Callable[[Any], Any]
    fits: Callable[[Any], bool]

    def __call__(self, stacked: Any) -> Any:
        """The minibatches in this form."""
        return self.change(stacked)


def _dropped(stacked: Any) -> Any:
    return {name: leaf for name, leaf in stacked.items() if name != NAME}


def _of_pairs(stacked: Any, *, causal: bool) -> Any:
    keys = stacked[NAME].bool()[..., None, None, :]
    length = keys.shape[-1]
    queries = torch.ones(length, length, dtype=torch.bool, device=keys.device)
    return {**stacked, NAME: keys & (queries.tril() if causal else queries)}


def _small(stacked: Any) -> bool:
    mask: Tensor = stacked[NAME]
    return mask.numel() * mask.shape[-1] <= MOST_BYTES


AS_GIVEN = MaskForm(lambda stacked: stacked, lambda stacked: True)
DROPPED = MaskForm(_dropped, lambda stacked: bool(stacked[NAME].all()))
CAUSAL = MaskForm(lambda stacked: _of_pairs(stacked, causal=True), _small)
FULL = MaskForm(lambda stacked: _of_pairs(stacked, causal=False), _small)


def forms_for(batches: Batches) -> list[MaskForm]:
    """The forms to try for some minibatches, the simplest first.

    Args:
        batches: stacked.

    Example:
        >>> len(forms_for(Batches([{"attention_mask": torch.ones(2, 5)}])))
        4
        >>> len(forms_for(Batches([torch.ones(2, 5)])))
        1
    """
    stacked = batches.stacked
    if not isinstance(stacked, dict) or not isinstance(stacked.get(NAME), Tensor) or stacked[NAME].ndim != 3:
        return [AS_GIVEN]
    return [form for form in (AS_GIVEN, DROPPED, CAUSAL, FULL) if form.fits(stacked)]
