"""Modes, seeds, run cache, verdicts and exercise checks."""

import dataclasses
import pickle
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k2lab import notebook


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Send outputs and cache to a temporary folder."""
    monkeypatch.setenv("K2LAB_OUT", str(tmp_path))
    monkeypatch.setenv("K2LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_mode_defaults_to_full_and_names_a_bad_value(monkeypatch):
    assert notebook.mode() == "full"
    monkeypatch.setenv("K2LAB_MODE", "fast")
    assert notebook.mode() == "fast"
    monkeypatch.setenv("K2LAB_MODE", "quick")
    with pytest.raises(ValueError, match="'quick'.*fast, full.*unset"):
        notebook.mode()


def test_choose_takes_the_settings_of_the_mode(monkeypatch):
    both = {"fast": {"steps": 2}, "full": {"steps": 300}}
    assert notebook.choose(**both).steps == 300
    monkeypatch.setenv("K2LAB_MODE", "fast")
    assert notebook.choose(**both).steps == 2
    assert notebook.choose(fast=1, full=9) == 1


def test_choose_refuses_modes_that_differ():
    with pytest.raises(ValueError, match="lr, seeds"):
        notebook.choose(fast={"steps": 1, "lr": 1}, full={"steps": 2, "seeds": 3})
    with pytest.raises(ValueError, match="different kinds"):
        notebook.choose(fast={"steps": 1}, full=2)


def test_banner_is_one_stable_line_and_shouts_in_fast_mode(monkeypatch, capsys):
    monkeypatch.setenv("K2LAB_FIGURES", "")  # restored after the test
    monkeypatch.setenv("K2LAB_THREADS", "1")
    torch.set_num_threads(2)
    notebook.banner("11_moe")
    full = capsys.readouterr().out
    assert full == f"11_moe | full mode | torch {torch.__version__} | 1 thread(s)\n"
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("K2LAB_MODE", "fast")
    notebook.banner("11_moe")
    assert "FAST MODE: these numbers are not results" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_threads_refuses_what_is_no_count(monkeypatch, value):
    monkeypatch.setenv("K2LAB_THREADS", value)
    with pytest.raises(ValueError, match="K2LAB_THREADS"):
        notebook.threads()


def test_threads_order(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert notebook.threads() == 3
    monkeypatch.setenv("K2LAB_THREADS", "2")
    assert notebook.threads() == 2


def test_progress_is_silent_when_asked(capsys, monkeypatch):
    assert list(notebook.progress(range(3), "x")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("K2LAB_PROGRESS", "1")
    list(notebook.progress(range(3), "x"))
    assert capsys.readouterr().err != ""


def test_generators_depend_on_seed_and_item_only():
    draws = [notebook.generator(s, i).random() for s in (0, 1) for i in (0, 1)]
    assert len(set(draws)) == 4
    assert draws[1] == np.random.default_rng([0, 1]).random()
    torch_draws = [torch.rand(1, generator=notebook.torch_generator(0, i)) for i in (0, 1, 0)]
    assert torch_draws[0] == torch_draws[2] != torch_draws[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 1
    betas: tuple = (0.9, 0.95)


def train(config, seed):
    """Leave a line in a file, so that a test can count the runs."""
    with open(config["log"], "a") as file:
        file.write(f"{seed}\n")
    return {"loss": torch.tensor([float(seed)]), "history": pd.DataFrame({"step": [1]})}


def runs(config):
    return len(Path(config["log"]).read_text().splitlines())


def test_a_finished_run_is_not_repeated(out, monkeypatch):
    config = {"log": str(out / "log"), "model": Config()}
    first = notebook.cached("a", train, config, 0)
    again = notebook.cached("a", train, dict(reversed(config.items())), 0)
    assert runs(config) == 1
    assert torch.equal(first["loss"], again["loss"])
    assert first["history"].equals(again["history"])
    notebook.cached("a", train, config, 1)
    notebook.cached("b", train, config, 1)
    notebook.cached("a", train, config | {"model": Config(steps=2)}, 1)
    assert runs(config) == 4
    monkeypatch.setenv("K2LAB_RERUN", "1")
    notebook.cached("a", train, config, 0)
    assert runs(config) == 5


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"junk"])
def test_a_truncated_entry_is_run_again(out, damage):
    config = {"log": str(out / "log")}
    notebook.cached("a", train, config, 0)
    (entry,) = (out / "cache" / "runs").iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert notebook.cached("a", train, config, 0)["loss"].item() == 0
    assert runs(config) == 2
    assert pickle.loads(entry.read_bytes())["loss"].item() == 0


def test_nothing_half_written_is_left(out):
    with pytest.raises(ZeroDivisionError):
        notebook.cached("a", lambda config, seed: 1 / seed, {}, 0)
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        notebook.cached("a", lambda config, seed: (x for x in ()), {}, 0)
    target = out / "file"
    target.mkdir()  # os.replace cannot put a file here
    with pytest.raises(OSError):
        notebook.write_atomically(target, b"data")
    assert [path for path in out.rglob("*") if path.is_file()] == []


def test_sweep_runs_every_arm_and_seed(out):
    arms = {"a": {"log": str(out / "a")}, "b": {"log": str(out / "b")}}
    found = notebook.sweep("s", train, arms, range(3))
    assert list(found) == [(arm, seed) for arm in "ab" for seed in range(3)]
    assert [runs(arm) for arm in arms.values()] == [3, 3]
    assert found["b", 2]["loss"].item() == 2


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b"])
def test_cached_refuses_a_name_that_is_no_file_name(out, name):
    with pytest.raises(ValueError, match="name a run"):
        notebook.cached(name, train, {}, 0)


def test_functions_of_other_packages_and_fingerprints_have_a_hash():
    corpus = types.SimpleNamespace(fingerprint="a", tokenizer=object())
    other = types.SimpleNamespace(fingerprint="b", tokenizer=object())
    assert notebook.stable_hash(patch) == notebook.stable_hash(patch)
    assert notebook.stable_hash(patch) != notebook.stable_hash(patch.object)
    assert notebook.stable_hash(corpus) != notebook.stable_hash(other)


@pytest.mark.parametrize("value", [object(), iter([1]), np.array([object()])])
def test_a_config_without_stable_hash_is_refused(value):
    with pytest.raises(ValueError, match="no stable hash"):
        notebook.stable_hash({"x": value})


def test_hash_covers_source_defaults_closure_and_globals():
    def make(k):
        return lambda config, seed: k + FACTOR

    def change(body, **namespace):
        return types.FunctionType(body.__code__, body.__globals__ | namespace, "f", (1,))

    base = make(1)
    assert notebook.stable_hash(base) == notebook.stable_hash(make(1))
    assert notebook.stable_hash(base) != notebook.stable_hash(make(2))
    with_default = lambda config, seed=1: FACTOR  # noqa: E731
    assert notebook.stable_hash(change(with_default)) != notebook.stable_hash(change(with_default, FACTOR=3))


FACTOR = 2
SAME = [1, 1.0, True, "1", b"1", (1,), [1], {1: 1}, {1}, np.array([1]), torch.tensor([1]), None]


def test_values_that_compare_equal_but_differ_in_kind_have_different_hashes():
    hashes = [notebook.stable_hash(value) for value in SAME]
    assert len(set(hashes)) == len(SAME)
    assert notebook.stable_hash(["ab", "c"]) != notebook.stable_hash(["a", "bc"])
    assert notebook.stable_hash([["a"], "b"]) != notebook.stable_hash([["a", "b"]])
    assert notebook.stable_hash(Config()) != notebook.stable_hash(Config(steps=2))
    assert notebook.stable_hash(torch.zeros(2)) != notebook.stable_hash(torch.zeros(2, 1))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_like)
def test_hash_is_stable_and_survives_a_copy(value):
    assert notebook.stable_hash(value) == notebook.stable_hash(pickle.loads(pickle.dumps(value)))


def test_hash_is_the_same_in_another_process():
    value = {"b": {"x", "y", "z"}, "a": (1, 2.5)}
    code = f"from k2lab.notebook import stable_hash; print(stable_hash({value!r}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == notebook.stable_hash(value)


ROW = {"section": "2.1", "claim": "c", "paper": 1.5, "verdict": "reproduced"}


def test_verdict_summarises_seeds():
    row = notebook.verdict(**ROW, ours=[1.0, 2.0, 3.0])
    assert (row["ours"], row["sd"], row["seeds"]) == ("2", "1", "3")
    assert notebook.verdict(**ROW, ours=[2.0])["sd"] == ""
    assert notebook.verdict(**ROW, ours=torch.tensor([1.0, 3.0]))["ours"] == "2"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1_026_408_232_448, "1,026,408,232,448"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (-0.00001234, "-1.234e-05"),
        (np.float32(0.5), "0.5"),
        (np.int64(7), "7"),
        ("1.04T", "1.04T"),
    ],
)
def test_numbers_are_written_with_sensible_digits(value, text):
    assert notebook.verdict(**ROW, ours=value)["ours"] == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "mostly"}, "'mostly' is not one of: reproduced"),
        ({"ours": float("nan")}, "not a result"),
        ({"ours": []}, "empty"),
        ({"ours": [1.0, 2.0], "sd": 1.0}, "leave out sd= and seeds="),
    ],
)
def test_verdict_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        notebook.verdict(**(ROW | {"ours": 1} | change))


def test_verdicts_are_written_in_full_mode_only(out, monkeypatch):
    rows = [notebook.verdict(**ROW, ours=[1, 2, 4]), notebook.verdict(**ROW, ours="none, yet")]
    monkeypatch.setenv("K2LAB_MODE", "fast")
    assert list(notebook.verdicts("11", rows)) == notebook.COLUMNS
    assert list(out.iterdir()) == []
    monkeypatch.setenv("K2LAB_MODE", "full")
    for _ in range(2):
        notebook.verdicts("11", rows)
    (path,) = (out / "data" / "results").iterdir()
    assert path.name == "11.csv"
    assert path.read_text() == (
        "notebook,section,claim,paper,ours,sd,seeds,verdict\n"
        "11,2.1,c,1.5,2.333,1.528,3,reproduced\n"
        '11,2.1,c,1.5,"none, yet",,,reproduced\n'
    )


@pytest.mark.parametrize("number", ["1", "11_moe", "xx", "../1"])
def test_verdicts_refuses_a_number_of_another_form(out, number):
    with pytest.raises(ValueError, match="two-digit"):
        notebook.verdicts(number, [notebook.verdict(**ROW, ours=1)])
    with pytest.raises(ValueError, match="no verdicts"):
        notebook.verdicts("11", [])


def stub(x): ...


def stub_with_doc(x):
    """Say what to do."""
    ...


def test_exercises(capsys):
    for answer in (..., stub, stub_with_doc):
        notebook.check(answer, lambda answer: 1 / 0, "hint")
    assert capsys.readouterr().out == "not attempted yet\n" * 3
    notebook.check(3, lambda answer: answer == 3, "hint")
    notebook.check(lambda x: x, lambda f: f(2) == 2, "hint")
    assert capsys.readouterr().out == "ok\n" * 2
    for answer in (4, None):
        with pytest.raises(AssertionError, match="a hint"):
            notebook.check(answer, lambda answer: answer == 3, "a hint")
    with pytest.raises(AssertionError, match="a hint"):
        notebook.check(lambda x: 5, lambda f: f(2) == 2, "a hint")
