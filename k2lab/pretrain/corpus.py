"""Real text in batches that every run can repeat: documents, tokenizers, split, windows.

The default text is one that every machine has: the source files of the running Python's
standard library (about 12 MB, without its tests). `load_corpus` also reads any folder or file,
given as its argument or in the environment variable K2LAB_CORPUS.

Four rules make runs comparable. The order of the documents is that of a hash of their relative
paths, and every 20th goes to validation whole, so no file is ever in both parts. Documents end
in an end-of-document id that no text can produce. A training batch is a pure function of
(seed, step), so resuming needs no data-loader state. And the validation windows are the same
for every run. Text files that are left out are counted in `Corpus.skipped`, by reason.
"""

import contextlib
import hashlib
import math
import os
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch

# One thread is fast enough here, and `tokenizers` would warn when a process that used its
# threads is forked. A reader who set the variable keeps their choice.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TEXT_SUFFIXES = frozenset([".c", ".h", ".html", ".js", ".md", ".py", ".rst", ".tex", ".txt"])
STDLIB_EXCLUDED = frozenset(["site-packages", "dist-packages", "test", "tests", "idle_test"])
MIN_FILE_BYTES = 64  # shorter files, mostly empty __init__.py, teach nothing
VAL_EVERY = 20  # one document in 20 is for validation: 5%
MAX_BLOCK_CHARS = 8192  # a single file is cut into documents of about this size
CACHE_VERSION = 1  # raise when the meaning of a cached file changes


class ByteTokenizer:
    """Map text to its UTF-8 bytes, ids 0 to 255; `eod_id` is 256. Round-trips any text of Unicode."""

    eod_id = 256
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without an end-of-document id."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; ends of documents vanish, broken UTF-8 becomes U+FFFD."""
        return bytes(_text_ids(ids, self)).decode(errors="replace")


class BPETokenizer:
    """Map text to byte-pair codes over its UTF-8 bytes; `eod_id` is the last id.

    The end-of-document id lives outside the trained vocabulary, so that no text encodes to it.
    """

    def __init__(self, serialized: str) -> None:
        """Restore a tokenizer from the JSON of another one's `bpe.to_str()`."""
        self.bpe = tokenizers.Tokenizer.from_str(serialized)
        self.eod_id = self.bpe.get_vocab_size()
        self.vocab_size = self.eod_id + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn at most `vocab_size` ids from `texts`: 256 bytes, merges, end of document.

        A text too small for the asked number of merges gives fewer: read `.vocab_size`.

        Raises:
            ValueError: `vocab_size` is below 257 and cannot hold every byte.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and one end")
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe.to_str())

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without an end-of-document id."""
        return self.bpe.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; ends of documents vanish, broken UTF-8 becomes U+FFFD."""
        return self.bpe.decode(_text_ids(ids, self))


Tokenizer = ByteTokenizer | BPETokenizer


def _text_ids(ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """Return the ids without ends of documents, after checking their range."""
    ids = [int(i) for i in ids]
    if wrong := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise ValueError(f"id {wrong[0]} is not in [0, {tokenizer.vocab_size}): other tokenizer?")
    return [i for i in ids if i != tokenizer.eod_id]


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Hold an encoded text and cut batches from it; made by `load_corpus`."""

    name: str  # what was read: "stdlib-3.11", or the folder's or file's name
    tokenizer: Tokenizer
    train: torch.Tensor  # (num_train_tokens,) int16 or int32, documents joined by eod_id
    val: torch.Tensor  # (num_val_tokens,) same
    num_documents: int  # files used, or blocks of a single file
    num_bytes: int  # UTF-8 bytes of all documents
    val_bytes: int  # UTF-8 bytes of the validation documents
    skipped: dict[str, int]  # reason -> files left out
    fingerprint: str  # hash of tokens and split: equal means the same training data

    @property
    def bytes_per_token(self) -> float:
        """Return UTF-8 bytes per token on the validation part (end-of-document ids count)."""
        return self.val_bytes / len(self.val)

    def bpb(self, loss: float) -> float:
        """Return bits per byte: loss [nats/token] / (ln 2 * bytes_per_token)."""
        return loss / (math.log(2) * self.bytes_per_token)

    def tokens(self, split: str, seq_len: int) -> torch.Tensor:
        """Return the tokens of `split` ("train" or "val"), after checking them for length.

        Raises:
            ValueError: the split is unknown, or holds no window of seq_len + 1 tokens.
        """
        if split not in ("train", "val"):
            raise ValueError(f"split={split!r} is unknown: use 'train' or 'val'")
        tokens = self.train if split == "train" else self.val
        if seq_len < 1 or len(tokens) < seq_len + 1:
            raise ValueError(
                f"seq_len={seq_len} must be in [1, {len(tokens) - 1}]: the {split} part of "
                f"{self.name} has {len(tokens)} tokens, and a window needs "
                f"seq_len + 1 = {seq_len + 1}; add text or lower seq_len"
            )
        return tokens

    def batch(
        self, step: int, *, batch_size: int, seq_len: int, seed: int, split: str = "train"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (inputs, targets) of a step: random windows, a pure function of (seed, step).

        Both are int64 (B, T) with B = batch_size, T = seq_len and targets[b, t] the token after
        inputs[b, t]. Starts are uniform, drawn from numpy's default_rng([seed, step]).

        Raises:
            ValueError: an unknown split, or fewer than seq_len + 1 tokens in it.
        """
        tokens = self.tokens(split, seq_len)
        rng = np.random.default_rng([seed, step])
        return _windows(tokens, rng.integers(len(tokens) - seq_len, size=batch_size), seq_len)

    def val_batches(
        self, num: int, batch_size: int, seq_len: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `num` fixed validation batches: num * batch_size windows, evenly spaced.

        Neither seed nor step enters, so runs with equal num * batch_size see the same windows.
        They cover the whole part, and overlap when it is shorter than what is asked for.

        Raises:
            ValueError: fewer than seq_len + 1 validation tokens.
        """
        tokens = self.tokens("val", seq_len)
        starts = np.linspace(0, len(tokens) - seq_len - 1, num * batch_size).astype(np.int64)
        for chunk in starts.reshape(num, batch_size):
            yield _windows(tokens, chunk, seq_len)


def _windows(tokens: torch.Tensor, starts: np.ndarray, seq_len: int) -> tuple:
    index = torch.from_numpy(starts)[:, None] + torch.arange(seq_len + 1)  # (B, T + 1)
    windows = tokens[index].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def load_corpus(
    path: str | Path | None = None,
    *,
    tokenizer: str = "byte",
    vocab_size: int = 1024,
    max_bytes: int | None = None,
) -> Corpus:
    """Read, split and encode a text.

    Args:
        path: a folder (every file with a suffix in TEXT_SUFFIXES) or a file (cut at line ends
            into documents); None means K2LAB_CORPUS, or the standard library when that is unset.
        tokenizer: "byte" or "bpe"; a BPE is trained on the training part alone, and kept with
            the encoded text in the cache (K2LAB_CACHE, by default `.cache` in the project).
        vocab_size: upper bound of the BPE's vocabulary, at least 257; unused for bytes.
        max_bytes: use at most this many bytes of text: whole documents, in the order of the hash.

    Raises:
        ValueError: the path does not exist, no usable text is left, a validation part cannot be
            split off, or an argument is out of range.
    """
    if tokenizer not in ("byte", "bpe"):
        raise ValueError(f"tokenizer={tokenizer!r} is unknown: use 'byte' or 'bpe'")
    path = path or os.environ.get("K2LAB_CORPUS")
    name, files = _find_files(path)
    skipped: Counter[str] = Counter()
    documents = [text for file in files if (text := _read(file, skipped)) is not None]
    if copies := len(documents) - len(set(documents)):  # a copy could fall into the other part
        documents = list(dict.fromkeys(documents))
        skipped["duplicate"] = copies
    if path and Path(path).is_file() and documents:
        documents = _blocks(documents[0])
    if max_bytes is not None:
        documents = _limit(documents, max_bytes, skipped)
    if len(documents) < 2:
        raise ValueError(
            f"{name}: {len(documents)} usable documents, and at least 2 are needed, one for "
            f"training and one for validation (skipped: {dict(skipped) or 'none'}); add text files "
            f"of {MIN_FILE_BYTES} bytes or more, or raise max_bytes"
        )
    val = documents[::VAL_EVERY]
    train = [text for i, text in enumerate(documents) if i % VAL_EVERY]
    if tokenizer == "bpe":
        tok, ids = _fit_bpe([train, val], vocab_size)
    else:
        tok = ByteTokenizer()
        ids = [_join(tok, part) for part in (train, val)]
    return Corpus(
        name=name,
        tokenizer=tok,
        train=torch.from_numpy(ids[0]),
        val=torch.from_numpy(ids[1]),
        num_documents=len(documents),
        num_bytes=_num_bytes(documents),
        val_bytes=_num_bytes(val),
        skipped=dict(skipped),
        fingerprint=_digest(*(part.tobytes() for part in ids)),
    )


def _num_bytes(documents: list[str]) -> int:
    return sum(len(text.encode()) for text in documents)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _find_files(path: str | Path | None) -> tuple[str, list[Path]]:
    """Return the corpus's name and its files, in the order of a hash of their relative paths."""
    if not path:
        root, suffixes, excluded = Path(sysconfig.get_paths()["stdlib"]), {".py"}, STDLIB_EXCLUDED
        name = f"stdlib-{sys.version_info.major}.{sys.version_info.minor}"
    else:
        root, suffixes, excluded = Path(path), TEXT_SUFFIXES, frozenset()
        name = root.resolve().name
    if not root.exists():
        raise ValueError(f"corpus {str(root)!r} does not exist: give a text file or a folder")
    if root.is_file():
        return name, [root]
    files = [file for file in _walk(root, excluded) if file.suffix.lower() in suffixes]
    if not files:
        raise ValueError(f"corpus {str(root)!r} has no file ending in {sorted(suffixes)}: add text")
    return name, sorted(files, key=lambda f: _digest(f.relative_to(root).as_posix().encode()))


def _walk(root: Path, excluded: frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in excluded and not s.startswith(".")]
        # _sysconfigdata_*.py records how this Python was built, paths of its machine included
        yield from (Path(folder, n) for n in names if not n.startswith((".", "_sysconfigdata")))


def _read(file: Path, skipped: Counter[str]) -> str | None:
    """Return the file's text, or None after counting why it is no use."""
    try:
        content = file.read_bytes()
        if b"\0" in content:
            reason = "binary"
        elif len(content) < MIN_FILE_BYTES:
            reason = "near-empty"
        else:
            return content.decode()
    except OSError:
        reason = "unreadable"
    except UnicodeDecodeError:
        reason = "undecodable"
    skipped[reason] += 1
    return None


def _blocks(text: str) -> list[str]:
    """Cut a text at line ends into at least 40 blocks where its lines allow."""
    size = min(MAX_BLOCK_CHARS, len(text) // 40)
    blocks = [""]
    for line in text.splitlines(keepends=True):
        if len(blocks[-1]) > size:
            blocks.append("")
        blocks[-1] += line
    return blocks


def _limit(documents: list[str], max_bytes: int, skipped: Counter[str]) -> list[str]:
    """Keep each document that still fits into `max_bytes`."""
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes} must be at least 1, or None for the whole text")
    kept: list[str] = []
    for text in documents:
        if (size := len(text.encode())) <= max_bytes:
            kept.append(text)
            max_bytes -= size
    if len(kept) < len(documents):
        skipped["over max_bytes"] = len(documents) - len(kept)
    return kept


def _join(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Encode documents into one array, each followed by the end-of-document id."""
    dtype = np.int16 if tokenizer.vocab_size <= 2**15 else np.int32
    return np.concatenate([np.array([*tokenizer.encode(d), tokenizer.eod_id], dtype) for d in documents])


def _fit_bpe(parts: list[list[str]], vocab_size: int) -> tuple[BPETokenizer, list[np.ndarray]]:
    """Train on the first part and encode all, or fetch both from the cache."""
    setting = repr((CACHE_VERSION, tokenizers.__version__, vocab_size, [len(p) for p in parts]))
    key = _digest(setting.encode(), *(text.encode() for part in parts for text in part))
    file = _cache_root() / "tokenizers" / f"bpe-{key[:24]}.npz"
    with contextlib.suppress(Exception), file.open("rb") as f, np.load(f) as saved:  # or rebuild
        return BPETokenizer(str(saved["bpe"])), [saved["train"], saved["val"]]
    tokenizer = BPETokenizer.train(parts[0], vocab_size)
    train, val = (_join(tokenizer, part) for part in parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # complete before it is visible
        part = Path(folder, file.name)
        np.savez(part, bpe=np.array(tokenizer.bpe.to_str()), train=train, val=val)
        part.replace(file)
    return tokenizer, [train, val]


def _cache_root() -> Path:
    project = Path(__file__).resolve().parents[2]
    default = project / ".cache" if (project / "pyproject.toml").exists() else None
    return Path(os.environ.get("K2LAB_CACHE") or default or Path.home() / ".cache" / "k2lab")
