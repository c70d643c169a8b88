"""Induction: a transformer that learns to repeat what followed a token before in its sequence (Olsson et al. 2022).

Tokens follow a fixed table of bigrams, except after the trigger tokens of a sequence, each of which is followed by one
and the same token all through that sequence (as in Bietti et al. 2023). Two layers of attention learn it in stages of
the order that arXiv 2402.02364 finds in natural text: the bigrams, then previous-token heads and induction heads that
compose them, which one layer can't.

Measured with the defaults and `training` (experiments/smooth_curves.py): the loss is 2.25 at step 700, about what the
bigrams give, and 1.91 at 1,300, while the best previous-token head goes from 0.12 to 0.66 and the best prefix-matching
head from 0.06 to 0.60; by step 2,800 the loss is 1.84. λ̂ rises by 55 % over that fall, a transition of type A, half of
it by step 900: it is 110, 139, 171, 170 and 162 at steps 700, 900, 1,300, 2,000 and 2,800. Whether its slow fall
afterwards is a type B is not known. The K-composition of the two best heads, 0.125 at random, is 0.14 at step 500, 0.17
at 700 and 0.22 from 900 on, the highest of all pairs.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from phasewatch.toy_tasks.attention_only import Metric, bigram_cross_entropy, icl_score, unigram_cross_entropy
from phasewatch.toy_tasks.attention_only import loss as loss
from phasewatch.toy_tasks.attention_only import make_model as make_model
from phasewatch.toy_tasks.attention_only import token_losses as token_losses
from phasewatch.toy_tasks.attention_only import training as training
from phasewatch.toy_tasks.head_scores import best_head_metrics


@dataclass(frozen=True)
class InductionData:
    """Sequences of bigrams in which a few trigger tokens are always followed by the same token.

    Called as `data(generator, batch_size)`, it returns tokens of shape (batch, context). A sequence draws its triggers
    without replacement, and for each of them, uniformly, the token that follows it. That may be a trigger again, or
    the same one: with the defaults one sequence in seven ends in such a circle.

    Attributes:
        vocabulary: V, the number of tokens.
        context: T, the length of a sequence.
        triggers: trigger tokens of a sequence, at most V.
        table_seed: of the table of bigrams.
    """

    vocabulary: int = 32
    context: int = 48
    triggers: int = 8
    table_seed: int = 0

    @cached_property
    def table(self) -> Tensor:
        """Probabilities of the next token, a row for each token: softmax(2·N(0, 1)), shape (V, V)."""
        generator = Generator().manual_seed(self.table_seed)
        return (2 * torch.randn(self.vocabulary, self.vocabulary, generator=generator)).softmax(-1)

    @cached_property
    def frequencies(self) -> Tensor:
        """Share of each token in 4,096 fixed sequences, shape (V,)."""
        tokens = self(Generator().manual_seed(self.table_seed), 4096)
        return tokens.flatten().bincount(minlength=self.vocabulary) / tokens.numel()

    def __call__(self, generator: Generator, batch_size: int) -> Tensor:
        """Draw a batch on the generator's device."""
        device = generator.device

        def token(*shape: int) -> Tensor:
            return torch.randint(self.vocabulary, shape, generator=generator, device=device)

        shuffled = torch.rand(batch_size, self.vocabulary, generator=generator, device=device).argsort(-1)
        triggers = shuffled[:, : self.triggers]
        follower = torch.full_like(shuffled, -1).scatter(-1, triggers, token(*triggers.shape))
        thresholds = self.table.to(device).cumsum(-1)[:, :-1].contiguous()  # the last is 1, but for rounding
        uniform = torch.rand(self.context, batch_size, 1, generator=generator, device=device)
        tokens = [token(batch_size)]
        for u in uniform[1:]:
            last = tokens[-1]
            fixed = follower.gather(-1, last.unsqueeze(-1)).squeeze(-1)
            bigram = (u > thresholds[last]).sum(-1)
            tokens.append(torch.where(fixed < 0, bigram, fixed))
        return torch.stack(tokens, dim=-1)


def published_metrics(data: InductionData) -> dict[str, Metric]:
    """The scores of arXiv 2402.02364, and the K-composition of Elhage et al. (2021), as metrics of a probe, by name.

    Args:
        data: the training data.

    Returns:
        Metrics for `Probe(metrics=...)`: in-context score, bigram and unigram cross-entropy, the best head's
        previous-token and prefix-matching scores, and the best pair's K-composition. `head_scores.head_metrics` has
        each head's own.
    """
    return {
        "icl_score": icl_score,
        "bigram": bigram_cross_entropy(data.table),
        "unigram": unigram_cross_entropy(data.frequencies),
        **best_head_metrics(data),
    }
