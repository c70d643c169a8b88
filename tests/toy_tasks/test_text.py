"""Plain text: that its tokens are the text, its counts, and that it learns."""

import math
import sysconfig
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from tokenizers.decoders import ByteLevel
from torch import Generator

from phasewatch.toy_tasks.text import TextData, loss, make_model, published_metrics, training


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def some_modules(tmp_path_factory):
    """Every tenth module of the standard library, whose tokens take a tenth of the time."""
    folder = tmp_path_factory.mktemp("modules")
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::10]:
        (folder / module.name).symlink_to(module)
    return folder


@pytest.fixture(scope="module")
def data(some_modules):
    data = TextData(vocabulary=300, context=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sysconfig.get_path", lambda name: str(some_modules))
        assert data.tokens.max() < data.tokenizer.get_vocab_size() == 300
    return data


def test_the_text_is_that_of_the_standard_library():
    documents = TextData().documents
    assert len(documents) > 100
    assert "".join(documents).count("import") > 1000


def test_the_tokens_are_the_text_and_no_more_than_the_vocabulary(data, some_modules, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(some_modules))
    assert data.tokens.min() >= 0
    assert data.tokens.max() < data.tokenizer.get_vocab_size() == 300
    data.tokenizer.decoder = ByteLevel()
    start = data.tokenizer.decode(data.tokens[:3000].tolist())
    assert len(start) > 4000
    assert "".join(data.documents).startswith(start)


def test_a_python_without_its_source_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"TextData\(installed=False\): there is no Python source in .*"):
        TextData().tokens  # noqa: B018


def test_installed_packages_are_a_text_of_their_own(monkeypatch, tmp_path):
    (tmp_path / "package" / "inner").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text("first = 1\n")
    (tmp_path / "package" / "inner" / "latin.py").write_bytes("name = 'café'\n".encode("latin-1"))
    (tmp_path / "package" / "notes.txt").write_text("not source")
    (tmp_path / "standard.py").write_text("second = 2\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "package" if name == "purelib" else tmp_path))
    assert TextData(installed=True).documents == ["first = 1\n", "name = 'caf\ufffd'\n"]
    assert TextData().documents == ["second = 2\n"]


def test_the_same_text_gives_the_same_tokens(data, some_modules, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(some_modules))
    assert torch.equal(TextData(vocabulary=300).tokens, data.tokens)


def test_windows_are_of_the_text_from_its_start_to_its_end(data):
    tokens = data(generator(), 64)
    assert tokens.shape == (64, 24)
    windows = data.tokens.unfold(0, 24, 1)
    for window in tokens[:8]:
        assert (windows == window).all(-1).any()
    almost_all = replace(data, context=len(data.tokens) - 1)
    almost_all.__dict__["tokens"] = data.tokens
    starts = {tuple(almost_all(generator(seed), 1)[0, :5].tolist()) for seed in range(12)}
    assert starts == {tuple(data.tokens[:5].tolist()), tuple(data.tokens[1:6].tolist())}
    assert torch.equal(data(generator(1), 8), data(generator(1), 8))
    assert not torch.equal(data(generator(1), 8), data(generator(2), 8))


def test_counts_of_the_text(data):
    tokens = data.tokens.tolist()
    first, second = tokens[500:502]
    pairs = list(pairwise(tokens))
    assert data.table[first, second].item() == pytest.approx(pairs.count((first, second)) / tokens[:-1].count(first))
    assert data.frequencies[first].item() == pytest.approx(tokens.count(first) / len(tokens))
    assert data.frequencies.sum().item() == pytest.approx(1, rel=1e-5)
    seen = torch.zeros(300).index_fill(0, data.tokens[:-1], 1.0)
    torch.testing.assert_close(data.table.sum(-1), seen)


def test_training_learns_the_frequencies_first(data):
    model = make_model(width=16, vocabulary=300, context=24)
    batch, metrics = data(generator(99), 128), published_metrics(data)
    assert metrics.keys() == {"icl_score", "bigram", "unigram", "previous_token", "prefix_matching", "k_composition"}
    with torch.no_grad():
        before = loss(model, batch).item(), metrics["unigram"](model, batch)
    assert abs(before[1] - math.log(300)) < 1
    for _ in islice(training(model, data, seed=1), 60):
        pass
    with torch.no_grad():
        after = loss(model, batch).item(), metrics["unigram"](model, batch)
    assert after[0] < before[0] - 0.4
    assert after[1] < before[1] - 0.4
