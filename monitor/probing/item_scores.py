"""Scores of a fixed set of questions by a causal language model, as metrics of a probe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from phasewatch.monitor.emergence.watching import score_metrics, watch_metric
from phasewatch.monitor.errors import PhasewatchError, in_words, warn, whole_number
from phasewatch.monitor.probing.kept_items import write_items

Text = str | Sequence[int]


@dataclass(frozen=True)
class Question:
    """A prompt with its possible answers.

    Attributes:
        prompt: text, or token ids.
        choices: the answers; one alone is an exact-match question, right if greedy decoding gives it.
        right: the index of the right answer.

    Example:
        >>> from phasewatch import Question
        >>> Question("The capital of France is", [" Rome", " Paris"], right=1).right
        1
    """

    prompt: Text
    choices: Sequence[Text]
    right: int = 0


@dataclass(frozen=True, eq=False)
class Measured:
    """What a model makes of the questions.

    Attributes:
        log_p: natural log p of each answer, summed over its tokens, shape (question, choice); NaN behind the last one.
        token_log_p: log p of each token of the right answers, shape (question, token); NaN behind the last one.
        greedy: whether greedy decoding gives the right answer, shape (question,).
        right: the index of the right answer, shape (question,).
    """

    log_p: np.ndarray
    token_log_p: np.ndarray
    greedy: np.ndarray
    right: np.ndarray

    def scores(self) -> dict[str, float]:
        """The mean over the questions of each score of the chain.

        p among the choices and Brier's score, Σ_choices (p - 1[right])², are NaN where every question has one answer.
        """
        rows = np.arange(len(self.log_p))
        right = self.log_p[rows, self.right]
        several = (~np.isnan(self.log_p)).sum(axis=1) > 1
        found = {
            "log_p": float(right.mean()),
            "log_p_per_token": float(np.nanmean(self.token_log_p, axis=1).mean()),
            "p": float(np.exp(right).mean()),
            "p_among_choices": float("nan"),
            "brier": float("nan"),
        }
        correct = self.greedy.astype(float)
        if several.any():
            log_p, at, index = self.log_p[several], self.right[several], np.arange(int(several.sum()))
            share = np.exp(log_p - np.nanmax(log_p, axis=1, keepdims=True))
            share = share / np.nansum(share, axis=1, keepdims=True)
            found["p_among_choices"] = float(share[index, at].mean())
            found["brier"] = float((np.nansum(share**2, axis=1) - 2 * share[index, at] + 1).mean())
            correct[several] = np.nanargmax(log_p, axis=1) == at
        return found | {"accuracy": float(correct.mean())}


class ItemScores:
    """Metrics of a probe: the chain log p -> p -> p among the choices -> Brier -> accuracy on fixed questions.

    Works for every model whose call on token ids of shape (batch, position) returns logits, of shape
    (batch, position, token), or an object that has them as `logits`: TransformerLens, Hugging Face and plain modules.
    The questions are scored once for each snapshot, whatever the number of metrics that are taken.

    Args:
        questions: multiple-choice or exact-match questions.
        name: put before the metrics' names.
        encode: from text to token ids, such as a tokenizer's `encode`; not needed for token ids.
        watch: behaviours of your own by name, each a prompt and a continuation; `watch_<name>` is its log p.
        batch_size: answers that are scored at a time.
        keep: a run's folder. Each step's log p of every answer and token is kept in its folder `items`, for
            `read_items`; nothing is kept if left out.

    Raises:
        PhasewatchError: if there is nothing to score, a text comes without `encode`, an answer is empty, or the right
            one isn't among the choices.

    Example:
        >>> import torch
        >>> from phasewatch import ItemScores, Question
        >>> questions = [Question([0, 1], [[2], [3]]), Question([1], [[0, 2], [3, 3]], right=1)]
        >>> scores = ItemScores(questions, name="toy", watch={"greeting": ([0], [1, 2])})
        >>> model = torch.nn.Embedding(4, 4, _weight=torch.zeros(4, 4))  # every token alike
        >>> round(scores.metrics["toy_p_among_choices"](model, None), 3)
        0.5
        >>> round(scores.metrics["watch_greeting"](model, None), 3)  # 2 log(1/4)
        -2.773
    """

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        name: str = "items",
        encode: Callable[[str], Sequence[int]] | None = None,
        watch: Mapping[str, tuple[Text, Text]] | None = None,
        batch_size: int = 64,
        keep: str | Path | None = None,
    ) -> None:
        self.name = name
        self.watched = dict(watch or {})
        self.batch_size = whole_number("ItemScores(batch_size=...)", batch_size, least=1)
        if not questions and not self.watched:
            raise PhasewatchError("ItemScores(questions) got no questions and nothing to watch.")
        self.right = np.array([question.right for question in questions], dtype=int)
        self._answers: list[tuple[int, int, list[int], list[int]]] = []
        for i, question in enumerate(questions):
            if not 0 <= question.right < len(question.choices):
                raise PhasewatchError(
                    f"ItemScores(questions): question {i} has {len(question.choices)} choices, and {question.right} as "
                    "the index of the right one."
                )
            for c, choice in enumerate(question.choices):
                self._answers.append((i, c, *_tokens(f"question {i}", question.prompt, choice, encode)))
        self._behaviours = [_tokens(f"watch[{key!r}]", *pair, encode) for key, pair in self.watched.items()]
        self.keep = keep
        self._taken: dict[str, float] = {}
        self._measured: Measured | None = None
        self._kept_step: int | None = None
        self._complained = False
        self._weights: torch.Tensor | None = None

    @property
    def metrics(self) -> dict[str, "ScoreMetric"]:
        """For `Probe(metrics=...)`: one for each score, and one for each watched behaviour."""
        names = list(score_metrics(self.name).values()) if len(self.right) else []
        names += map(watch_metric, self.watched)
        return {name: ScoreMetric(self, name) for name in names}

    def measure(self, model: nn.Module) -> Measured:
        """Score the questions, item by item and token by token.

        Args:
            model: a causal language model, on any device.

        Returns:
            The log p of each answer, and of each token of the right ones.

        Raises:
            PhasewatchError: if there are no questions.
        """
        if not len(self.right):
            raise PhasewatchError("ItemScores.measure(model) takes questions, and there are behaviours to watch only.")
        choices = 1 + max(c for _, c, _, _ in self._answers)
        longest = max(len(answer) for i, c, _, answer in self._answers if c == self.right[i])
        log_p = np.full((len(self.right), choices), np.nan)
        token_log_p = np.full((len(self.right), longest), np.nan)
        greedy = np.zeros(len(self.right), dtype=bool)
        pairs = [(prompt, answer) for _, _, prompt, answer in self._answers]
        for (i, c, _, answer), (values, largest) in zip(self._answers, self._scored(model, pairs), strict=True):
            log_p[i, c] = values.sum()
            if c == self.right[i]:
                token_log_p[i, : len(answer)] = values
                greedy[i] = largest
        return Measured(log_p, token_log_p, greedy, self.right)

    def score(self, name: str, model: nn.Module, step: int | None = None) -> float:
        """One of the metrics: taken from the last scoring, if the weights are still those.

        Args:
            name: of the metric.
            model: as for `measure`.
            step: the snapshot's, to keep the questions' values of; None keeps nothing.

        Returns:
            Its value.
        """
        weights = _fingerprint(model)
        if self._weights is None or not torch.equal(weights, self._weights):
            found = {}
            if len(self.right):
                self._measured = self.measure(model)
                scores = self._measured.scores()
                found = {metric: scores[score] for score, metric in score_metrics(self.name).items()}
            behaviours = zip(self.watched, self._scored(model, self._behaviours), strict=True)
            self._taken = found | {watch_metric(key): float(values.sum()) for key, (values, _) in behaviours}
            self._weights = weights
        if self.keep is not None and step is not None and step != self._kept_step and self._measured:
            self._kept_step = step
            self._write(self.keep, step, self._measured)
        return self._taken[name]

    def _write(self, run: str | Path, step: int, measured: Measured) -> None:
        """Keep a step's values; a disk that refuses costs one warning, and no metric."""
        try:
            write_items(run, self.name, step, vars(measured))
        except (OSError, PhasewatchError) as error:
            if not self._complained:
                self._complained = True
                warn(f"ItemScores(keep={str(run)!r}) can't keep the questions' values: {in_words(error)}")

    @torch.no_grad()
    def _scored(self, model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[np.ndarray, bool]]:
        """The tokens' log p of each answer, and whether each of them is the likeliest."""
        device = next(model.parameters()).device
        found = []
        for first in range(0, len(pairs), self.batch_size):
            batch = pairs[first : first + self.batch_size]
            longest = max(len(prompt) + len(answer) for prompt, answer in batch)
            # Padded behind the end, where a causal model's earlier positions can't see it.
            rows = [prompt + answer + [0] * (longest - len(prompt) - len(answer)) for prompt, answer in batch]
            out = model(torch.tensor(rows, device=device))
            logits = getattr(out, "logits", out)
            asked = [
                (row, len(prompt) - 1 + i, token)
                for row, (prompt, answer) in enumerate(batch)
                for i, token in enumerate(answer)
            ]
            row, position, token = torch.tensor(asked, device=device).T
            # Only these positions: the others' log p would fill a GPU's way to the host.
            own = torch.log_softmax(logits[row, position].float(), dim=-1)
            values, largest = own.gather(1, token[:, None])[:, 0].double().cpu(), (own.argmax(dim=1) == token).cpu()
            lengths = [len(answer) for _, answer in batch]
            for some, likeliest in zip(values.split(lengths), largest.split(lengths), strict=True):
                found.append((some.numpy(), bool(likeliest.all())))
        return found


@dataclass
class ScoreMetric:
    """One metric of `ItemScores`.

    Attributes:
        scores: what it is of.
        name: its name.
        step: of the snapshot that it is taken at next, as the probe says before it.
    """

    scores: ItemScores
    name: str
    step: int | None = None

    def at(self, step: int) -> None:
        """Be told the step of the snapshot that it is taken at next."""
        self.step = step

    def __call__(self, model: nn.Module, _: object) -> float:
        """Its value for a model."""
        return self.scores.score(self.name, model, self.step)


def _tokens(
    where: str, prompt: Text, answer: Text, encode: Callable[[str], Sequence[int]] | None
) -> tuple[list[int], list[int]]:
    found = []
    for text in (prompt, answer):
        if isinstance(text, str):
            if encode is None:
                raise PhasewatchError(
                    f"ItemScores: {where} is text; pass encode=, such as a tokenizer's encode, or give token ids."
                )
            text = encode(text)
        found.append([int(token) for token in text])
    if not found[0] or not found[1]:
        raise PhasewatchError(f"ItemScores: {where} has an empty prompt or answer; each needs a token.")
    return found[0], found[1]


def _fingerprint(model: nn.Module) -> torch.Tensor:
    """Two sums of each parameter and buffer, which change with the weights."""
    tensors = [t.detach().double().flatten() for t in (*model.parameters(), *model.buffers())]
    return torch.stack([torch.stack([t.sum(), (t * t.abs()).sum()]) for t in tensors]).cpu()
