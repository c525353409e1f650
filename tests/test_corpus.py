"""Documents, tokenizers, split and windows, on planted folders."""

import functools
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k2lab.pretrain import corpus as corpus_module
from k2lab.pretrain.corpus import BPETokenizer, ByteTokenizer, load_corpus


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("K2LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("K2LAB_CORPUS", raising=False)


@pytest.fixture
def folder(tmp_path):
    """Forty files, each of lines that name the file."""
    root = tmp_path / "text"
    (root / "sub").mkdir(parents=True)
    for i in range(40):
        file = root / ("sub" if i % 2 else "") / f"{i}.txt"
        file.write_text("".join(f"file {i} line {j}\n" for j in range(20)))
    return root


@functools.cache
def small_bpe() -> BPETokenizer:
    return BPETokenizer.train(["the cat sat on the mat, the end. äöü 你好\n" * 5], 300)


def documents(corpus, tokens) -> list[str]:
    """Decode a part and cut it at the ends of documents."""
    ends = (tokens == corpus.tokenizer.eod_id).nonzero().flatten().tolist()
    starts = [0] + [end + 1 for end in ends[:-1]]
    return [corpus.tokenizer.decode(tokens[a:b]) for a, b in zip(starts, ends, strict=True)]


# --- tokenizers


@given(st.text())
def test_byte_tokenizer_round_trips(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@given(st.text() | st.lists(st.sampled_from(["the", " ", "\n", "cat", "\0", "你"])).map("".join))
def test_bpe_round_trips_and_never_emits_end_of_document(text):
    ids = small_bpe().encode(text)
    assert small_bpe().decode(ids) == text
    assert all(0 <= i < small_bpe().eod_id for i in ids)


def test_bpe_compresses_what_it_was_trained_on():
    text = "the cat sat on the mat"
    assert len(small_bpe().encode(text)) < len(text) / 1.5
    assert 257 < small_bpe().vocab_size <= 300


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), small_bpe()])
def test_decode_drops_ends_and_refuses_foreign_ids(tokenizer):
    ids = [tokenizer.eod_id, *tokenizer.encode("ab"), tokenizer.eod_id]
    assert tokenizer.decode(torch.tensor(ids)) == "ab"
    with pytest.raises(ValueError, match=f"id {tokenizer.vocab_size} is not in"):
        tokenizer.decode([tokenizer.vocab_size])


def test_decode_marks_broken_utf8():
    assert ByteTokenizer().decode([0xE4, 0xBD]) == "\ufffd"


def test_bpe_vocabulary_too_small_for_bytes():
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        BPETokenizer.train(["text"], 256)


def test_bpe_training_is_the_same_in_every_process(tmp_path):
    program = (
        "import hashlib; from k2lab.pretrain.corpus import BPETokenizer as B;"
        "t = [f'def f{i}(x{i % 7}): return x{i % 7} + {i * i}' for i in range(400)];"
        "print(hashlib.sha256(B.train(t, 400).bpe.to_str().encode()).hexdigest())"
    )
    # threads on, and another order of hashes: neither may show in the merges
    settings = [{}, {"TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "1"}]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **extra},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extra in settings
    ]
    assert outputs[0] == outputs[1] != ""


# --- split and encoding


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_every_file_is_whole_and_in_one_part(folder, kind):
    corpus = load_corpus(folder, tokenizer=kind, vocab_size=400)
    train, val = documents(corpus, corpus.train), documents(corpus, corpus.val)
    written = sorted(file.read_text() for file in folder.rglob("*.txt"))
    assert sorted(train + val) == written  # so none is in both, cut or lost
    assert (len(train), len(val)) == (38, 2)
    assert corpus.num_documents == 40
    assert corpus.num_bytes == sum(len(text) for text in written)
    assert corpus.val_bytes == sum(len(text) for text in val)
    assert corpus.skipped == {}


def test_loading_twice_gives_the_same_corpus_and_a_change_shows(folder):
    first, second = load_corpus(folder), load_corpus(folder)
    assert torch.equal(first.train, second.train)
    assert first.fingerprint == second.fingerprint
    (folder / "0.txt").write_text("x" * 100)
    assert load_corpus(folder).fingerprint != first.fingerprint


def test_order_does_not_follow_the_folder_listing(folder):
    """Files of one subfolder would otherwise be neighbours, and the split a folder's tail."""
    corpus = load_corpus(folder)
    numbers = [int(text.split()[1]) for text in documents(corpus, corpus.train)]
    assert numbers != sorted(numbers)
    assert [n % 2 for n in numbers] != sorted(n % 2 for n in numbers)


def test_bpe_is_trained_on_the_training_part_alone(folder):
    reference = load_corpus(folder)
    merges = BPETokenizer.train(documents(reference, reference.train), 400).bpe.to_str()
    assert load_corpus(folder, tokenizer="bpe", vocab_size=400).tokenizer.bpe.to_str() == merges


def test_text_cannot_forge_an_end_of_document(folder):
    (folder / "0.txt").write_text("<|endoftext|> <eod> \ufffd " * 20)
    for kind in ("byte", "bpe"):
        corpus = load_corpus(folder, tokenizer=kind, vocab_size=400)
        ends = sum(int((part == corpus.tokenizer.eod_id).sum()) for part in (corpus.train, corpus.val))
        assert ends == 40


def test_bits_per_byte_is_the_code_length_of_the_text(folder):
    corpus = load_corpus(folder, tokenizer="bpe", vocab_size=400)
    loss = 1.25  # nats/token
    total_bits = loss * len(corpus.val) / math.log(2)
    assert corpus.bpb(loss) == pytest.approx(total_bits / corpus.val_bytes)
    assert corpus.bytes_per_token > 1.5
    byte = load_corpus(folder)
    assert byte.bytes_per_token == pytest.approx(byte.val_bytes / (byte.val_bytes + 2))


# --- what is left out


def test_useless_files_are_counted_by_reason(folder):
    (folder / "tiny.txt").write_text("x = 1\n")
    (folder / "empty.md").write_text("")
    (folder / "image.txt").write_bytes(b"\x89PNG\0" + b"a" * 200)
    (folder / "latin.txt").write_bytes("Zürich".encode("latin-1") * 30)
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "copy.txt").write_text((folder / "0.txt").read_text())
    corpus = load_corpus(folder)
    reasons = {"near-empty": 2, "binary": 1, "undecodable": 1, "unreadable": 1, "duplicate": 1}
    assert corpus.skipped == reasons
    assert corpus.num_documents == 40


def test_hidden_and_foreign_files_are_no_part_of_a_folder(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "a.txt").write_text("h" * 100)
    (folder / "weights.bin").write_text("b" * 100)
    assert load_corpus(folder).num_documents == 40


def test_max_bytes_keeps_whole_documents(folder):
    whole = load_corpus(folder)
    part = load_corpus(folder, max_bytes=3000)
    kept = documents(part, part.train) + documents(part, part.val)
    assert part.num_bytes <= 3000 < part.num_bytes + 400
    assert set(kept) < set(documents(whole, whole.train) + documents(whole, whole.val))
    assert part.skipped == {"over max_bytes": 40 - part.num_documents}


# --- sources


def test_a_single_file_is_cut_at_line_ends(tmp_path):
    file = tmp_path / "poem.anything"
    lines = [f"line {i} äö\n" for i in range(500)]
    file.write_text("".join(lines))
    corpus = load_corpus(file)
    train, val = documents(corpus, corpus.train), documents(corpus, corpus.val)
    assert len(val) >= 2
    assert all(text.endswith("\n") for text in train + val)
    assert sorted("".join(train + val).splitlines(keepends=True)) == sorted(lines)
    assert corpus.name == "poem.anything"


def test_environment_names_the_corpus_and_the_argument_wins(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("K2LAB_CORPUS", str(folder))
    assert load_corpus().fingerprint == load_corpus(folder).fingerprint
    other = tmp_path / "other.txt"
    other.write_text("one line\n" * 100)
    assert load_corpus(other).name == "other.txt"


def test_standard_library_is_python_text_without_its_tests():
    corpus = load_corpus(max_bytes=1_500_000)
    assert re.fullmatch(r"stdlib-3\.\d+", corpus.name)
    assert corpus.num_bytes > 1_400_000
    text = corpus.tokenizer.decode(corpus.train[:200_000])
    assert "import " in text
    assert "def " in text
    _, files = corpus_module._find_files(None)
    assert 400 < len(files) < 1500
    assert {file.suffix for file in files} == {".py"}
    assert not [f for f in files if {"test", "tests", "site-packages"} & set(f.parts[-4:])]
    assert not [f for f in files if f.name.startswith("_sysconfigdata")]


@pytest.mark.parametrize("kind", ["missing", "empty", "binary", "one", "line"])
def test_a_corpus_without_text_is_an_error_that_names_it(tmp_path, kind):
    path = tmp_path / f"{kind}-corpus"
    if kind == "line":
        path.write_text("x" * 1000)
    elif kind != "missing":
        path.mkdir()
    if kind == "binary":
        (path / "a.txt").write_bytes(b"\0" * 100)
    if kind == "one":
        (path / "a.txt").write_text("a" * 100)
    message = {
        "missing": "does not exist: give a text file or a folder",
        "empty": r"has no file ending in .*\.txt",
        "binary": r"0 usable documents, .*skipped: \{'binary': 1\}",
        "one": "1 usable documents, and at least 2",
        "line": "1 usable documents, and at least 2",
    }[kind]
    with pytest.raises(ValueError, match=f"{kind}-corpus.*{message}"):
        load_corpus(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "words"}, "tokenizer='words' is unknown: use 'byte' or 'bpe'"),
        ({"max_bytes": 0}, "max_bytes=0 must be at least 1"),
        ({"max_bytes": 500}, r"1 usable documents.*'over max_bytes': 39"),
        ({"tokenizer": "bpe", "vocab_size": 200}, "vocab_size=200 must be at least 257"),
    ],
)
def test_bad_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(folder, **arguments)


# --- windows


def test_targets_are_inputs_shifted_by_one_and_come_from_the_text(folder):
    corpus = load_corpus(folder)
    inputs, targets = corpus.batch(3, batch_size=5, seq_len=17, seed=0)
    assert inputs.shape == targets.shape == (5, 17)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    windows = corpus.train.unfold(0, 18, 1)
    for row in torch.cat([inputs, targets[:, -1:]], dim=1):
        assert (windows == row).all(dim=1).any()


def test_a_batch_depends_on_seed_and_step_alone(folder):
    corpus = load_corpus(folder)

    def batch(step, seed, split="train"):
        return corpus.batch(step, batch_size=4, seq_len=8, seed=seed, split=split)[0]

    forwards = [batch(step, 0) for step in range(5)]
    torch.manual_seed(123)
    np.random.default_rng(5).random(10)
    backwards = [batch(step, 0) for step in reversed(range(5))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not torch.equal(batch(0, 0), batch(1, 0))
    assert not torch.equal(batch(0, 0), batch(0, 1))
    assert not torch.equal(batch(0, 0), batch(0, 0, "val"))


def test_every_window_is_reached_and_the_last_token_too(folder):
    """Shortest possible text: a window too few or too many would show at once."""
    corpus = load_corpus(folder)
    seq_len = len(corpus.val) - 3  # leaves three windows
    starts = set()
    for step in range(40):
        inputs, targets = corpus.batch(step, batch_size=2, seq_len=seq_len, seed=0, split="val")
        for row, target in zip(inputs, targets, strict=True):
            whole = torch.cat([row, target[-1:]])
            starts |= {s for s in range(3) if torch.equal(whole, corpus.val[s : s + seq_len + 1])}
    assert starts == {0, 1, 2}


def test_validation_windows_are_fixed_and_span_the_part(folder):
    corpus = load_corpus(folder)
    first = list(corpus.val_batches(3, 4, 16))
    again = list(corpus.val_batches(6, 2, 16))
    assert [x.shape for x, _ in first] == [(4, 16)] * 3
    assert torch.equal(torch.cat([x for x, _ in first]), torch.cat([x for x, _ in again]))
    assert torch.equal(first[0][0][0], corpus.val[:16].long())
    assert torch.equal(first[-1][1][-1], corpus.val[-16:].long())
    assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in first)


def test_context_longer_than_the_text_is_an_error_with_numbers(folder):
    corpus = load_corpus(folder)
    n = len(corpus.val)
    assert next(corpus.val_batches(1, 1, n - 1))[0].shape == (1, n - 1)
    message = rf"seq_len={n} must be in \[1, {n - 1}\].*has {n} tokens.*{n + 1}; add text or lower"
    with pytest.raises(ValueError, match=message):
        next(corpus.val_batches(1, 1, n))
    with pytest.raises(ValueError, match="the train part of text has"):
        corpus.batch(0, batch_size=1, seq_len=10**6, seed=0)
    with pytest.raises(ValueError, match="split='test' is unknown"):
        corpus.batch(0, batch_size=1, seq_len=4, seed=0, split="test")


# --- cache


def test_bpe_is_fetched_from_the_cache(folder, monkeypatch):
    first = load_corpus(folder, tokenizer="bpe", vocab_size=400)
    monkeypatch.setattr(BPETokenizer, "train", None)  # a second training would fail
    second = load_corpus(folder, tokenizer="bpe", vocab_size=400)
    assert second.fingerprint == first.fingerprint
    assert second.tokenizer.bpe.to_str() == first.tokenizer.bpe.to_str()
    with pytest.raises(TypeError):
        load_corpus(folder, tokenizer="bpe", vocab_size=401)


@pytest.mark.parametrize("damage", [b"", b"nonsense", "half"])
def test_an_unreadable_cache_is_built_again(folder, tmp_path, damage):
    first = load_corpus(folder, tokenizer="bpe", vocab_size=400)
    (cached,) = (tmp_path / "cache" / "tokenizers").iterdir()  # and nothing half-written beside it
    whole = cached.read_bytes()
    cached.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    assert load_corpus(folder, tokenizer="bpe", vocab_size=400).fingerprint == first.fingerprint
    assert len(cached.read_bytes()) == len(whole)


def test_cache_is_in_the_checkout_unless_told_otherwise(monkeypatch, tmp_path):
    assert corpus_module._cache_root() == tmp_path / "cache"
    monkeypatch.delenv("K2LAB_CACHE")
    assert corpus_module._cache_root().name == ".cache"
    monkeypatch.setattr(corpus_module, "__file__", str(tmp_path / "site/k2lab/pretrain/corpus.py"))
    assert corpus_module._cache_root().parts[-2:] == (".cache", "k2lab")
