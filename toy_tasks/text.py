"""Plain text that is there wherever Python is: the source of its standard library, in tokens of a small BPE.

Names come again and again within a file and differ between files, which is what induction heads are for. The tokeniser
is trained on the text itself, so that nothing is downloaded. The text is that of the Python that runs: what is measured
on one version differs a little on the next. With `installed=True` it is the source of all packages beside it instead,
fifty times as much where torch and its like are installed.

Induction heads (experiments/induction_substages.py): on the standard library none form within 10,000 steps (V = 512,
T = 128, width 128). On 240 million characters of packages (76 million tokens, V = 4,096, T = 256, width 256), in four
runs of four, prefix matching rises from 0.02 to between 0.16 and 0.30 within 6,000 steps, in three from about step
1,900 on and in one from 3,400 on, while the in-context score falls from -0.3 to below -0.6. Which of the differences
decides wasn't taken apart.

Measured on Python 3.11 (4.7 million characters, 2.0 million tokens, whose bigrams have an entropy of 3.59) with
`make_model(vocabulary=512, context=64)` and `training`, about 80 ms a step: the loss is 3.99 at step 300, 3.37 at 900
and 3.00 at 2,400, the best previous-token score 0.07, 0.15 and 0.17. There are no induction heads yet: prefix matching
is 0.04.
"""

import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Generator, Tensor

from phasewatch.toy_tasks.attention_only import Metric, bigram_cross_entropy, icl_score, unigram_cross_entropy
from phasewatch.toy_tasks.attention_only import loss as loss
from phasewatch.toy_tasks.attention_only import make_model as make_model
from phasewatch.toy_tasks.attention_only import training as training
from phasewatch.toy_tasks.head_scores import best_head_metrics


@dataclass(frozen=True)
class TextData:
    """Windows of the text, anywhere in it.

    Called as `data(generator, batch_size)`, it returns tokens of shape (batch, context).

    Attributes:
        vocabulary: V, the number of tokens, of which the bytes that occur in the text take up to 256.
        context: T, the length of a window.
        installed: take the source of the packages that are installed, not that of the standard library's modules.
    """

    vocabulary: int = 512
    context: int = 64
    installed: bool = False

    @property
    def documents(self) -> list[str]:
        """The modules in the order of their names; of the standard library, those that aren't in packages.

        Raises:
            FileNotFoundError: if there are none, as in a Python that came without its source.
        """
        name, pattern = ("purelib", "**/*.py") if self.installed else ("stdlib", "*.py")
        folder = Path(sysconfig.get_path(name))
        if not (files := sorted(file for file in folder.glob(pattern) if file.is_file())):
            raise FileNotFoundError(f"TextData(installed={self.installed}): there is no Python source in {folder}.")
        return [file.read_text("utf-8", errors="replace") for file in files]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Byte-pair encoding, trained on the text."""
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        trainer = BpeTrainer(vocab_size=self.vocabulary, show_progress=False)
        tokenizer.train_from_iterator(self.documents, trainer)
        return tokenizer

    @cached_property
    def tokens(self) -> Tensor:
        """The whole text, shape (token,)."""
        encoded = self.tokenizer.encode_batch(self.documents)
        return torch.tensor([token for document in encoded for token in document.ids])

    @cached_property
    def table(self) -> Tensor:
        """How often each token follows each other one in the text, a row for each token, shape (V, V).

        The row of a token that never comes is 0.
        """
        pairs = self.tokens[:-1] * self.vocabulary + self.tokens[1:]
        counts = pairs.bincount(minlength=self.vocabulary**2).view(self.vocabulary, -1)
        return counts / counts.sum(-1, keepdim=True).clamp(min=1)

    @cached_property
    def frequencies(self) -> Tensor:
        """Share of each token in the text, shape (V,)."""
        return self.tokens.bincount(minlength=self.vocabulary) / len(self.tokens)

    def __call__(self, generator: Generator, batch_size: int) -> Tensor:
        """Draw a batch on the generator's device."""
        device = generator.device
        if device not in self._copies:
            self._copies[device] = self.tokens.to(device)
        start = torch.randint(len(self.tokens) - self.context + 1, (batch_size, 1), generator=generator, device=device)
        return self._copies[device][start + torch.arange(self.context, device=device)]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        """The tokens on each device that batches were drawn on."""
        return {}


def published_metrics(data: TextData) -> dict[str, Metric]:
    """The scores of arXiv 2402.02364, and the K-composition of Elhage et al. (2021), as metrics of a probe, by name.

    Args:
        data: the training data.

    Returns:
        Metrics for `Probe(metrics=...)`: in-context score, bigram and unigram cross-entropy, and the best head's or
        pair's scores. `head_scores.head_metrics` has each head's own.
    """
    return {
        "icl_score": icl_score,
        "bigram": bigram_cross_entropy(data.table),
        "unigram": unigram_cross_entropy(data.frequencies),
        **best_head_metrics(data),
    }
