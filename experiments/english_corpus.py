"""A corpus of English prose from Debian's packages of documentation, and a byte-pair encoding trained on it.

The packages below are fetched by `apt-get download` from Debian 12 (main and non-free), which needs neither root nor
an installation. Of their text files, HTML pages, manuals (man pages) and dictionaries, the paragraphs that are English
sentences are kept: at least 80 characters, of which 75 % letters, and at least one word in eight of the commonest.
A paragraph that came before, but for spaces, digits and case, is left out. What remains of a file is one document.

In `--folder` it leaves

    english.txt     the documents in an order of no meaning, each ended by a line with a null character
    tokenizer.json  the byte-pair encoding of 5,000 tokens
    tokens.bin      the documents in tokens, uint16, each begun by token 0
    sources.csv     characters kept of each package

    python experiments/english_corpus.py [--folder build/corpus] [--jobs 2]

Measured: 59 packages, 446 MB of text and 120.6 million tokens. About half of the text is RFCs; the rest is
dictionaries, and documentation of the kernel, of Python, Perl and others.
"""

import argparse
import csv
import gzip
import hashlib
import html
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm

PACKAGES = """
ada-reference-manual-2012 anarchism apache2-doc aptitude-doc-en bash-doc cmake-doc csound-doc db5.3-doc debian-faq
debian-handbook debian-policy debian-reference-en developers-reference dict-devil dict-foldoc dict-gcide dict-jargon
dict-vera dict-wn doc-rfc-experimental doc-rfc-fyi-bcp doc-rfc-informational doc-rfc-misc doc-rfc-old-std
doc-rfc-others doc-rfc-std doc-rfc-std-proposed erlang-doc fortunes fortunes-min freedombox-doc-en git-doc
gnome-devel-docs gnome-user-docs gnucash-docs installation-guide-amd64 libreoffice-help-en-us lilypond-doc-html
linux-doc-6.1 llvm-19-doc manpages manpages-dev maxima-doc mercurial octave-doc openjdk-17-doc perl-doc
postgresql-doc-15 python-django-doc python-pandas-doc python-scipy-doc python-sympy-doc python3.11-doc r-base-html
r-doc-html racket-doc rust-doc twisted-doc vim-runtime
""".split()
"""Chosen for prose in English: standards, handbooks, dictionaries, manuals."""

SOURCES = "deb http://deb.debian.org/debian bookworm main non-free"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

COMMON = frozenset(
    "the of to and a in is that for it be as by on with this are or an not from at which can if will have was but its "
    "they you may must when has one all any more these such used use no other than their there i he his".split()
)
LEAST_CHARACTERS = 80
LEAST_LETTERS = 0.75
LEAST_COMMON = 0.125
LEAST_DOCUMENT, MOST_DOCUMENT = 400, 50_000
"""Characters of a document: a shorter one has too little before each token, and a longer one, a dictionary say, is cut,
so that any part of the corpus has some of everything."""

VOCABULARY = 5_000
END = "\n\x00\n"

OTHER_LANGUAGE = re.compile(
    r"[./_-](?!en\b)(ar|ca|cs|da|de|el|es|fa|fi|fr|hu|id|it|ja|ko|nb|nl|pl|pt|ro|ru|sv|tr|uk|vi|zh)"
    r"([-_][A-Za-z]{2,4})?[./]"
)
BLOCK = re.compile(r"(?i)<(?:/?(?:p|div|li|dd|dt|td|th|tr|h[1-6]|ul|ol|dl|table|br|section|blockquote)\b)[^>]*>")
UNSEEN = re.compile(r"(?is)<(script|style|head|pre|nav|footer)\b.*?</\1\s*>|<!--.*?-->")
TAG = re.compile(r"<[^>]*>")
SPACES = re.compile(r"\s+")
WORD = re.compile(r"[a-z']+")
NOT_LETTERS = re.compile(r"[^a-z]+")
ROFF = re.compile(r"\\f[A-Z]|\\f\([A-Z]{2}|\\s[+-]?\d|\\&|\\\^|\\\||\\c")


def fetch(folder: Path) -> list[Path]:
    """Download the packages that aren't there; all of them."""
    debs = folder / "packages"
    for state in (debs, folder / "apt" / "lists" / "partial", folder / "apt" / "cache" / "archives" / "partial"):
        state.mkdir(parents=True, exist_ok=True)
    apt = (folder / "apt").resolve()
    (apt / "sources.list").write_text(SOURCES.replace("deb ", f"deb [signed-by={KEYRING}] ") + "\n", encoding="utf-8")
    places = {
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": apt / "lists",
        "Dir::Cache": apt / "cache",
    }
    options = [word for name, place in places.items() for word in ("-o", f"{name}={place}")]
    missing = [name for name in PACKAGES if not any(debs.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", *options, "-qq", "update"], check=True)
        subprocess.run(["apt-get", *options, "-qq", "download", *missing], check=True, cwd=debs)
    return [next(debs.glob(f"{name}_*.deb")) for name in PACKAGES]


def files_in(package: Path) -> Iterator[tuple[str, str]]:
    """Each file of a package that holds text, with its text: plain, or roff and HTML as they are."""
    unpacked = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
    assert unpacked.stdout is not None
    with tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive:
        for member in archive:
            name = member.name
            if not member.isfile() or OTHER_LANGUAGE.search(name) or not (form := form_of(name)):
                continue
            file = archive.extractfile(member)
            assert file is not None
            raw = file.read()
            if raw[:2] == b"\x1f\x8b":
                raw = gzip.decompress(raw)
            yield form, raw.decode("utf-8", errors="replace")
    unpacked.wait()


def form_of(name: str) -> str:
    """How a file holds its text, by its name; "" where it holds none."""
    if re.search(r"changelog|copyright|/LICENSE|NEWS|AUTHORS|/index\.|genindex|/_sources/", name):
        return ""
    if re.search(r"\.x?html?(\.gz)?$", name):
        return "" if "/RFC/" in name else "html"
    if re.search(r"/man/man\d/.*\.gz$", name):
        return "roff"
    if re.search(r"\.(txt|rst|md|pod|page|info|text)(\.gz)?$|\.dict\.dz$|/games/fortunes/[a-z-]+$", name):
        return "text"
    return ""


def paragraphs(form: str, text: str) -> Iterator[str]:
    """The paragraphs of a file, each on one line."""
    if form == "html":
        text = UNSEEN.sub("\n\n", text)
        text = SPACES.sub(" ", text)
        text = html.unescape(TAG.sub("", BLOCK.sub("\n\n", text)))
    elif form == "roff":
        text = ROFF.sub("", text)
        text = re.sub(r"(?m)^\.(B|I|BR|IR|RB|RI|BI|IB|SM)\s+", "", text)
        text = re.sub(r"(?m)^[.'].*$", "\n", text).replace("\\-", "-")
    for paragraph in re.split(r"\n\s*\n", text):
        yield SPACES.sub(" ", paragraph).strip()


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences of English."""
    if len(paragraph) < LEAST_CHARACTERS or "<" in paragraph[:2]:
        return False
    letters = sum(map(str.isalpha, paragraph))
    words = WORD.findall(paragraph.lower())
    spaces = paragraph.count(" ")
    return (
        (letters + spaces) / len(paragraph) > LEAST_LETTERS + 0.1
        and len(words) > 0
        and sum(word in COMMON for word in words) / len(words) >= LEAST_COMMON
    )


def documents_of(package: Path) -> list[list[tuple[bytes, str]]]:
    """The prose of each file of a package: its paragraphs, each with a digest of its letters."""
    found = []
    for form, text in files_in(package):
        kept = [(digest(NOT_LETTERS.sub("", p.lower())), p) for p in paragraphs(form, text) if is_prose(p)]
        if kept:
            found.append(kept)
    return found


def digest(text: str) -> bytes:
    """Eight bytes that hardly two texts share."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def cut(document: str) -> Iterator[str]:
    """A document in pieces of whole paragraphs."""
    piece: list[str] = []
    for paragraph in document.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) > MOST_DOCUMENT:
            yield "\n\n".join(piece)
            piece = []
    if sum(map(len, piece)) >= LEAST_DOCUMENT:
        yield "\n\n".join(piece)


def collect(packages: list[Path], folder: Path, jobs: int) -> None:
    """Write english.txt and sources.csv."""
    seen: set[bytes] = set()
    documents: list[str] = []
    kept: Counter[str] = Counter()
    with ProcessPoolExecutor(jobs) as pool:
        for package, found in zip(packages, tqdm(pool.map(documents_of, packages), total=len(packages)), strict=True):
            name = package.name.partition("_")[0]
            kept[name] = 0
            for document in found:
                fresh = []
                for letters, paragraph in document:
                    if letters not in seen:
                        seen.add(letters)
                        fresh.append(paragraph)
                if sum(map(len, fresh)) >= LEAST_DOCUMENT:
                    documents.append("\n\n".join(fresh))
                    kept[name] += len(documents[-1])
    pieces = sorted((piece for document in documents for piece in cut(document)), key=digest)
    with (folder / "english.txt").open("w", encoding="utf-8") as file:
        file.writelines(piece + END for piece in pieces)
    with (folder / "sources.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("package", "characters"), *kept.most_common()])


def encode(folder: Path) -> None:
    """Train the byte-pair encoding on english.txt, and write it in tokens."""
    documents = (folder / "english.txt").read_text("utf-8").split(END)[:-1]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<begin>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents[::4], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    with (folder / "tokens.bin").open("wb") as file:
        for start in tqdm(range(0, len(documents), 256), desc="encoding"):
            for encoded in tokenizer.encode_batch_fast(documents[start : start + 256]):
                np.array([0, *encoded.ids], dtype="<u2").tofile(file)


def main() -> None:
    """Make what isn't there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/corpus"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, make in {
        "english.txt": lambda: collect(fetch(given.folder), given.folder, given.jobs),
        "tokens.bin": partial(encode, given.folder),
    }.items():
        if not (given.folder / name).exists():
            make()
    size = (given.folder / "english.txt").stat().st_size
    tokens = (given.folder / "tokens.bin").stat().st_size // 2
    print(f"{size / 1e6:.0f} MB of text, {tokens / 1e6:.1f} million tokens")


if __name__ == "__main__":
    main()
