"""In-context Markov chains: a transformer that learns to estimate the chain it is shown (Edelman et al. 2024).

Every sequence has a chain of its own, with transition probabilities drawn from Dirichlet(1), so that all that helps is
in the sequence (arXiv 2402.11004). The published stages are uniform predictions, then a plateau at how often each
symbol came (unigrams), then an abrupt fall to what followed the present symbol before (bigrams), as induction heads
form.

Measured with 8 symbols (the default), `make_model(heads=1, width=32, vocabulary=8, context=100)` and `training`, about
40 ms a step: on two seeds the loss is 2.06 from step 450 to 750, nearest to the unigrams (a divergence of 0.03, of 0.11
from the bigrams). By step 1,200 and 1,300 it is 1.98, with 0.03 from the bigrams, and the previous-token score has gone
from 0.06 to 0.32. Bayes-optimal is 1.94. One layer stays at the unigrams, with a loss of 2.06, to step 1,600 at least.
With 2 symbols (width 16) the plateau is hardly there: the bigrams are nearer by step 300.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from phasewatch.toy_tasks.attention_only import Metric, icl_score
from phasewatch.toy_tasks.attention_only import loss as loss
from phasewatch.toy_tasks.attention_only import make_model as make_model
from phasewatch.toy_tasks.attention_only import training as training
from phasewatch.toy_tasks.head_scores import previous_token_scores

Strategy = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class MarkovData:
    """Sequences of a Markov chain each, with rows of transition probabilities drawn from Dirichlet(1).

    Called as `data(generator, batch_size)`, it returns tokens of shape (batch, context). The first is uniform, which
    makes `bigrams` the exact posterior.

    Attributes:
        vocabulary: V, the number of symbols.
        context: T, the length of a sequence.
    """

    vocabulary: int = 8
    context: int = 100

    def __call__(self, generator: Generator, batch_size: int) -> Tensor:
        """Draw a batch on the generator's device."""
        device, v = generator.device, self.vocabulary
        rows = torch.empty(batch_size, v, v, device=device).exponential_(generator=generator)
        thresholds = (rows.cumsum(-1) / rows.sum(-1, keepdim=True))[..., :-1]  # the last is 1, but for rounding
        uniform = torch.rand(self.context - 1, batch_size, 1, 1, generator=generator, device=device)
        after = (uniform > thresholds).sum(-1)  # each symbol, at each step
        tokens = [torch.randint(v, (batch_size, 1), generator=generator, device=device)]
        for step in after:
            tokens.append(step.gather(-1, tokens[-1]))
        return torch.cat(tokens, dim=-1)


def unigrams(tokens: Tensor, vocabulary: int) -> Tensor:
    """Predict each symbol as often as it came so far, with one added to every count.

    Args:
        tokens: shape (batch, T).
        vocabulary: V.

    Returns:
        Probabilities of the token after each, shape (batch, T, V).
    """
    counts = 1 + F.one_hot(tokens, vocabulary).cumsum(1)
    return counts / counts.sum(-1, keepdim=True)


def bigrams(tokens: Tensor, vocabulary: int) -> Tensor:
    """Predict each symbol as often as it followed the present one so far, with one added to every count.

    That is the posterior mean of the present symbol's row: no predictions have a lower expected loss.

    Args:
        tokens: shape (batch, T).
        vocabulary: V.

    Returns:
        Probabilities of the token after each, shape (batch, T, V).
    """
    symbols = F.one_hot(tokens, vocabulary)
    transitions = symbols[:, :-1, :, None] * symbols[:, 1:, None, :]
    so_far = F.pad(transitions.cumsum(1), (0, 0, 0, 0, 1, 0))
    counts = 1 + torch.einsum("btij,bti->btj", so_far, symbols)
    return counts / counts.sum(-1, keepdim=True)


def divergence(strategy: Strategy) -> Metric:
    """A metric: the mean KL divergence of the model's predictions from a strategy's, in nats.

    Args:
        strategy: such as `bigrams`.

    Returns:
        The metric, which is 0 for a model that follows the strategy.
    """

    def divergence_from_strategy(model: nn.Module, batch: Tensor) -> float:
        logits = model(batch)
        expected = strategy(batch, logits.shape[-1])
        return F.kl_div(logits.log_softmax(-1), expected, reduction="none").sum(-1).mean().item()

    return divergence_from_strategy


def published_metrics(data: MarkovData) -> dict[str, Metric]:
    """The scores of arXiv 2402.11004 as metrics of a probe, by name.

    Args:
        data: the training data.

    Returns:
        Metrics for `Probe(metrics=...)`: in-context score, divergence from the unigram and the bigram strategy, and the
        best head's previous-token score.
    """
    return {
        "icl_score": icl_score,
        "unigrams": divergence(unigrams),
        "bigrams": divergence(bigrams),
        "previous_token": lambda model, batch: previous_token_scores(model, data).max().item(),
    }
