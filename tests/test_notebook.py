"""Modes, seeds, run cache, verdicts and exercise checks."""

import asyncio
import dataclasses
import inspect
import os
import pickle
import time
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from joblib.externals.loky import process_executor
from nbformat.v4 import new_code_cell, new_notebook

from k2lab import notebook, runner


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


@pytest.fixture(params=["1", "2"])
def threads(request, monkeypatch):
    """Run a sweep in this process, and in two others."""
    monkeypatch.setenv("K2LAB_THREADS", request.param)
    return int(request.param)


def waiter(out):
    """Return a function that waits until a run is in the cache."""

    def wait(pattern, limit_s=30):
        end = time.monotonic() + limit_s
        while not list((out / "cache" / "runs").glob(pattern)):
            if time.monotonic() > end:
                raise TimeoutError(f"{pattern} did not come")
            time.sleep(0.01)

    return wait


def test_sweep_runs_every_arm_and_seed_that_is_missing(out, threads):
    wait = waiter(out)

    def multiply(config, seed):
        if threads > 1 and seed == 0:
            wait("s-1-*")  # a later job ends before
        return config["lr"] * seed, os.getpid()

    arms = {"a": {"lr": 1}, ("b", 2): {"lr": 2}, "like a": {"lr": 1}}
    found = notebook.sweep("s", multiply, arms, iter([2, 0, 1]))
    assert list(found) == [(arm, seed) for arm in arms for seed in (2, 0, 1)]
    assert [result for result, _ in found.values()] == [2, 0, 1, 4, 0, 2, 2, 0, 1]
    assert (os.getpid() in {process for _, process in found.values()}) == (threads == 1)
    assert len(list((out / "cache" / "runs").iterdir())) == 6  # an equal config is the same run
    assert notebook.sweep("s", multiply, {"a": arms["a"]}, range(4))["a", 3] == (3, os.getpid())


def test_sweep_takes_finished_runs_from_the_cache(out, threads):
    def once(folder, seed):
        Path(folder, str(seed)).mkdir(parents=True)  # an error the second time
        return seed

    arms = {arm: str(out / arm) for arm in "ab"}
    assert notebook.cached("s", once, arms["a"], 0) == 0
    first, again = (notebook.sweep("s", once, arms, range(3)) for _ in range(2))
    assert first == again == {(arm, seed): seed for arm in arms for seed in range(3)}


def test_a_result_does_not_depend_on_the_number_of_processes(out, monkeypatch):
    def descend(rates, seed):
        """Take steps from an unseeded start; products this large would be split over threads."""
        x = torch.randn(300, 300, requires_grad=True)
        for _ in range(3):
            (slope,) = torch.autograd.grad((x @ x.T).tanh().sum(), x)
            x = (x - rates[0] * slope).detach().requires_grad_()
        return x.detach(), torch.get_num_threads(), notebook.mode(), rates.flags.writeable

    monkeypatch.setenv("K2LAB_RERUN", "1")
    before, state = torch.get_num_threads(), torch.random.get_rng_state()
    found = {}
    for mode, threads in [("full", "1"), ("full", "2"), ("fast", "2")]:
        monkeypatch.setenv("K2LAB_MODE", mode)
        monkeypatch.setenv("K2LAB_THREADS", threads)
        torch.set_num_threads(2)
        found[mode, threads] = notebook.sweep("s", descend, {"a": np.full(200_000, 1e-3)}, range(2))
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.random.get_rng_state(), state)
        assert [result[1:] for result in found[mode, threads].values()] == [(1, mode, True)] * 2
    torch.set_num_threads(before)
    here, there, _ = found.values()
    assert all(torch.equal(here[pair][0], there[pair][0]) for pair in here)
    assert not torch.equal(here["a", 0][0], here["a", 1][0])


def test_a_sweep_that_fails_keeps_what_has_finished(out, threads):
    wait = waiter(out)

    def fail(log, seed):
        """Fail for seed 1 as soon as seed 0 is in the cache, and only until the repair."""
        with open(log, "a") as file:
            file.write(f"{seed}\n")
        if seed == 1:
            wait("s-0-*")
            if not (out / "repaired").exists():
                raise KeyError(f"seed {seed} diverged")
        return seed

    log = out / "log"
    with pytest.raises(KeyError, match="seed 1 diverged"):
        notebook.sweep("s", fail, {"a": str(log)}, [0, 1])
    (out / "repaired").touch()
    assert notebook.sweep("s", fail, {"a": str(log)}, [0, 1]) == {("a", 0): 0, ("a", 1): 1}
    assert sorted(log.read_text().split()) == ["0", "1", "1"]


def test_a_worker_refuses_to_run_another_version_of_the_library():
    job = (lambda config, seed: seed, Path("s"), None, 3)
    assert notebook._in_worker({}, notebook.code_version(), *job) == (Path("s"), 3)
    with pytest.raises(ValueError, match="edited .* restart the kernel"):
        notebook._in_worker({}, "the version before an edit", *job)


def test_the_replacement_of_a_grown_worker_is_no_news(out, monkeypatch):
    news = "A worker stopped while some jobs were given to the executor"

    def parallel(workers, **options):
        """Replace joblib, and say what it says when a worker has grown by 300 MB."""
        return lambda tasks: (warnings.warn(news, stacklevel=1) or fn(*args) for fn, args, _ in tasks)

    source = "".join(inspect.getsource(process_executor).split()).replace('""', "")
    assert news.replace(" ", "") in source  # still what joblib says
    monkeypatch.setattr(notebook, "Parallel", parallel)
    monkeypatch.setenv("K2LAB_MODE", "full")
    monkeypatch.setenv("K2LAB_THREADS", "2")
    assert notebook.sweep("s", lambda c, s: s, {"a": 1}, range(2)) == {("a", 0): 0, ("a", 1): 1}
    with pytest.raises(UserWarning, match="careful"):
        notebook.sweep("t", lambda c, s: warnings.warn("careful", stacklevel=1), {"a": 1}, range(2))


NOTEBOOK = """
from dataclasses import dataclass
import torch
from k2lab import notebook
notebook.banner("11_x")

@dataclass(frozen=True)
class Arm:
    lr: float
    start: torch.Tensor

text = torch.arange(3_000_000)
def total(x): return int(x.sum())
def run(arm, seed): return arm, total(text), notebook.mode(), seed
arms = {lr: Arm(lr, torch.ones(300_000)) for lr in (0.1, 0.2)}

found = notebook.sweep("s", run, arms, range(2))
print([(arm.lr, type(arm) is Arm, n == total(text), *rest) for arm, n, *rest in found.values()])
"""


def test_a_sweep_in_a_kernel_over_what_the_notebook_defines(out, monkeypatch):
    monkeypatch.setenv("K2LAB_THREADS", "2")
    cells = [new_code_cell(text) for text in NOTEBOOK.split("\n\n")]
    nbformat.write(new_notebook(cells=cells), out / "11_x.ipynb")
    env = runner.kernel_environment(out, str(out), "fast", 1, True)
    del env["PYTEST_CURRENT_TEST"]  # with it a kernel does not watch what its workers write
    nb = asyncio.run(runner.execute(out / "11_x.ipynb", "fast", env))  # refuses stderr
    (output,) = nb.cells[-1].outputs
    assert output.text == f"{[(lr, True, True, 'fast', seed) for lr in (0.1, 0.2) for seed in range(2)]}\n"


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b"])
def test_cached_refuses_a_name_that_is_no_file_name(out, name):
    with pytest.raises(ValueError, match="name a run"):
        notebook.cached(name, train, {}, 0)


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
