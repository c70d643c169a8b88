"""Windows of a text in tokens, the part of it that is held out, and its bigrams and trigrams."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Generator

from phasewatch.toy_tasks.english import EnglishData

VOCABULARY, CONTEXT = 6, 8


@pytest.fixture
def text():
    return np.random.default_rng(0).integers(VOCABULARY, size=3000)


@pytest.fixture
def data(text, tmp_path):
    file = tmp_path / "tokens.bin"
    file.write_bytes(text.astype("<u2").tobytes())
    return EnglishData(file, vocabulary=VOCABULARY, context=CONTEXT)


def test_a_plain_file_and_a_compressed_one_hold_the_same(text, data, tmp_path):
    (tmp_path / "tokens.bin").write_bytes(text.astype("<u2").tobytes())
    plain = EnglishData(tmp_path / "tokens.bin")
    assert plain.tokens.tolist() == data.tokens.tolist() == text.tolist()


def test_batches_are_windows_of_the_part_that_is_not_held_out(text, data):
    seen = {tuple(text[start : start + CONTEXT]) for start in range(3000 - 30 - CONTEXT + 1)}
    batch = data(Generator().manual_seed(0), 500)
    assert batch.shape == (500, CONTEXT)
    assert batch.dtype == torch.int64
    assert {tuple(row) for row in batch.tolist()} <= seen
    assert torch.equal(batch, data(Generator().manual_seed(0), 500))
    later = {tuple(text[start : start + CONTEXT]) for start in range(3000 - 30, 3000 - CONTEXT + 1)}
    assert {tuple(row) for row in data.held_out(200).tolist()} == later


def test_its_bigrams_are_those_of_the_text(text, data):
    table = data.bigrams(torch.device("cpu"))
    counts = Counter(pairwise(text.tolist()))
    assert table[2, 4].item() == pytest.approx(counts[2, 4] / sum(counts[2, b] for b in range(VOCABULARY)))


def test_a_token_is_told_by_trigrams_if_two_predecessors_say_it_and_one_does_not(tmp_path):
    rng = np.random.default_rng(1)
    pieces = [rng.permuted([0, 1, 2, 3, 4, 5]) for _ in range(300)]
    text = np.concatenate([np.concatenate([piece, [10, 11, 12]]) for piece in pieces])
    text = np.concatenate([text, np.tile([11, 13], 3000)])  # so that 11 alone says 13, and 10 11 says 12
    (tmp_path / "tokens.bin").write_bytes(text.astype("<u2").tobytes())
    data = EnglishData(tmp_path / "tokens.bin", vocabulary=20, context=8)
    told = data.told_by_trigrams(torch.tensor([[10, 11, 12, 0, 10, 11, 13, 11], [3, 10, 11, 12, 5, 1, 11, 12]]))
    assert told.tolist() == [[False, False, True] + 5 * [False], [False, False, False, True] + 4 * [False]]


def test_a_corpus_that_was_not_made_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no such file. Make it with .*english_corpus.py"):
        EnglishData(tmp_path / "none.bin").tokens  # noqa: B018
