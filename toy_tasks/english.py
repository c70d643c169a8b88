"""English text in tokens, as `experiments/english_corpus.py` makes it: windows of it, and its bigrams and trigrams."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

HELD_OUT = 0.01
"""Share of the text, its end, that batches of training are never drawn from."""

PREDICTABLE = 0.5
"""A token is one that a trigram tells if it follows its two predecessors in at least this share of all cases, ..."""

UNPREDICTABLE = 0.1
"""... and its one predecessor in less than this share."""


@dataclass(frozen=True)
class EnglishData:
    """Windows of the text, anywhere in it but in the part that is held out.

    Called as `data(generator, batch_size)`, it returns tokens of shape (batch, context) on the generator's device.

    Attributes:
        file: tokens as uint16.
        vocabulary: V, the number of tokens.
        context: T, the length of a window.
    """

    file: Path = Path("build/corpus/tokens.bin")
    vocabulary: int = 5_000
    context: int = 1_024

    @cached_property
    def tokens(self) -> Tensor:
        """The whole text, int16, shape (token,).

        Raises:
            FileNotFoundError: if the corpus hasn't been made.
        """
        if not self.file.exists():
            raise FileNotFoundError(
                f"EnglishData(file={str(self.file)!r}): there is no such file. Make it with "
                "`python experiments/english_corpus.py`."
            )
        return torch.from_numpy(np.fromfile(self.file, dtype="<u2").astype(np.int16))

    @property
    def trained_on(self) -> int:
        """How many tokens windows are drawn from."""
        return len(self.tokens) - max(self.context, int(HELD_OUT * len(self.tokens)))

    def __call__(self, generator: Generator, batch_size: int) -> Tensor:
        """Draw a batch on the generator's device."""
        device = generator.device
        starts = torch.randint(self.trained_on - self.context + 1, (batch_size,), generator=generator, device=device)
        return self.windows(starts)

    def windows(self, starts: Tensor) -> Tensor:
        """The windows that begin at some tokens, int64, shape (batch, context)."""
        text = self.on(starts.device)
        return text[starts.unsqueeze(1) + torch.arange(self.context, device=starts.device)].long()

    def held_out(self, sequences: int, *, seed: int = 0) -> Tensor:
        """Windows of the part that is held out, shape (sequences, context)."""
        generator = Generator().manual_seed(seed)
        last = len(self.tokens) - self.context
        return self.windows(torch.randint(self.trained_on, last + 1, (sequences,), generator=generator))

    def on(self, device: torch.device) -> Tensor:
        """The tokens on a device; the copy is kept."""
        if device not in self._copies:
            self._copies[device] = self.tokens.to(device)
        return self._copies[device]

    def bigrams(self, device: torch.device) -> Tensor:
        """How often each token follows each other one in the text, a row for each token, shape (V, V).

        The row of a token that never comes is 0.
        """
        text = self.on(device)
        counts = torch.zeros(self.vocabulary**2, dtype=torch.int32, device=device)
        for start in range(0, len(text) - 1, 2**24):
            part = text[start : start + 2**24 + 1].long()
            counts += (part[:-1] * self.vocabulary + part[1:]).bincount(minlength=self.vocabulary**2)
        table = counts.view(self.vocabulary, -1).float()
        return table / table.sum(-1, keepdim=True).clamp(min=1)

    def told_by_trigrams(self, tokens: Tensor) -> Tensor:
        """Whether the text's trigrams tell a token, and its bigrams don't, of shape (batch, T); never the first two.

        Args:
            tokens: shape (batch, T), on the device to count on.
        """
        text, size = self.on(tokens.device).long(), self.vocabulary
        pairs = text[:-1] * size + text[1:]
        triples = (pairs[:-1] * size + text[2:]).sort().values
        pairs = pairs.sort().values
        singles = text.bincount(minlength=size)

        def count(held: Tensor, wanted: Tensor) -> Tensor:
            wanted = wanted.contiguous()
            return torch.searchsorted(held, wanted, right=True) - torch.searchsorted(held, wanted)

        first, second, third = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
        of_pair = count(pairs, first * size + second)
        by_trigram = count(triples, (first * size + second) * size + third) / of_pair.clamp(min=1)
        by_bigram = count(pairs, second * size + third) / singles[second].clamp(min=1)
        told = (by_trigram >= PREDICTABLE) & (by_bigram < UNPREDICTABLE)
        return torch.nn.functional.pad(told, (2, 0), value=False)

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}
