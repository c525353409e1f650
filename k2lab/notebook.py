"""What every notebook shares: mode, threads, seeds, run cache, verdicts, exercise checks.

Environment, all optional:
    K2LAB_MODE      fast or full (default full)
    K2LAB_THREADS   CPU threads for torch, or processes of a sweep (default OMP_NUM_THREADS, else all)
    K2LAB_RERUN     1 ignores finished runs in the cache
    K2LAB_CACHE     folder of the cache (default .cache beside the package)
    K2LAB_PROGRESS  0 hides progress bars
    K2LAB_OUT       folder that holds figures/ and data/results/ (default the project root)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import os
import pickle
import statistics
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from k2lab.hashing import stable_hash

ROOT = Path(__file__).resolve().parents[1]
MODES = ("fast", "full")
VERDICTS = ("reproduced", "direction only", "not reproduced", "not testable here")
COLUMNS = ["notebook", "section", "claim", "paper", "ours", "sd", "seeds", "verdict"]

# They shape what a run shows, never what it computes, so editing them keeps the run cache.
PRESENTATION = {"__main__.py", "checks.py", "notebook.py", "plot.py", "runner.py"}


def mode() -> str:
    """Return "fast" (tests: small, numbers are not results) or "full" (the default).

    Raises ValueError when K2LAB_MODE is set to anything else.
    """
    value = os.environ.get("K2LAB_MODE", "full")
    if value not in MODES:
        raise ValueError(
            f"K2LAB_MODE={value!r} is not a mode; allowed: {', '.join(MODES)}. "
            "Set one of them, or unset it for full."
        )
    return value


def choose(*, fast: Any, full: Any) -> Any:
    """Return the settings of the current mode; a mapping comes back as a namespace.

    Both modes must have the same keys, so that a cell that runs in fast mode cannot stop in full
    mode for want of a setting. Raises ValueError that names the keys which differ.
    """
    if isinstance(fast, Mapping) != isinstance(full, Mapping):
        raise ValueError("fast= and full= are of different kinds; make both a dict or neither")
    chosen = fast if mode() == "fast" else full
    if not isinstance(chosen, Mapping):
        return chosen
    if odd := sorted(set(fast) ^ set(full)):
        raise ValueError(f"{', '.join(odd)}: only in one of fast= and full=; give it in both")
    return types.SimpleNamespace(**chosen)


def banner(title: str) -> None:
    """Pin torch's threads, tell `plot.save` where figures go, and print the mode.

    title: the notebook's name, such as "11_moe_mla". Call it once, in the set-up cell.
    """
    torch.set_num_threads(threads())
    os.environ["K2LAB_FIGURES"] = str(output_folder() / "figures") if mode() == "full" else ""
    code_version()  # read now, so that the cache is keyed by the code that was imported
    print(f"{title} | {mode()} mode | torch {torch.__version__} | {threads()} thread(s)")
    if mode() == "fast":
        print("*** FAST MODE: these numbers are not results ***")


def threads() -> int:
    """Return the number of CPU threads to use: K2LAB_THREADS, OMP_NUM_THREADS, or all cores."""
    for name in ("K2LAB_THREADS", "OMP_NUM_THREADS"):
        if value := os.environ.get(name):
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"{name}={value!r}: give a whole number, 1 or more, or unset it")
            return int(value)
    return os.cpu_count() or 1


def output_folder() -> Path:
    """Return the folder that holds figures/ and data/results/."""
    return Path(os.environ.get("K2LAB_OUT") or ROOT)


def progress(items: Iterable, desc: str = "", **options: Any) -> Iterable:
    """Iterate over items with a progress bar that disappears when done.

    `make run` and the tests hide it by K2LAB_PROGRESS=0: a bar writes to stderr, which they refuse.
    """
    hidden = os.environ.get("K2LAB_PROGRESS") == "0"
    return tqdm(items, desc=desc, leave=False, disable=hidden, **options)


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Return the NumPy generator of (seed, *stream), such as (seed, item number)."""
    return np.random.default_rng([seed, *stream])


def torch_generator(seed: int, *stream: int) -> torch.Generator:
    """Return the CPU torch generator of (seed, *stream), independent of every other stream."""
    entropy = np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))


def cached(name: str, fn: Callable[[Any, int], Any], config: Any, seed: int) -> Any:
    """Return fn(config, seed), from the cache when the same run has finished before.

    A run is the same when these are: name, mode, config, seed, the library's code, torch, and the
    source of fn with its defaults and every notebook variable or function that it reads.

    name: letters, digits, "_", "-" or "."; it only makes the file in the cache easy to find.
    config: dataclasses, mappings, sequences, numbers, strings, arrays, tensors, a corpus.
    Raises ValueError for a config (or a variable read by fn) that has no stable hash.
    """
    path = _entry(name, fn, config, seed)
    if found := _finished(path):
        return found[0]
    result = fn(config, seed)
    write_atomically(path, pickle.dumps(result))
    return result


def sweep(
    name: str, fn: Callable[[Any, int], Any], arms: Mapping[str, Any], seeds: Iterable[int]
) -> dict[tuple[str, int], Any]:
    """Return {(arm, seed): fn(config, seed)} over every arm (a label and its config) and seed.

    Finished runs come from the cache, as in `cached`. The others run side by side in `threads()`
    processes of one torch thread each (in this process where that is 1, or one run is missing), so
    that no result depends on the number of cores; each is kept as soon as it is there.

    fn: returns all that it finds. In another process it has copies of its arguments and of what it
    reads in the notebook, so it must not change them. torch's random state starts from the seed.
    Raises what fn raises, and stops the runs that have not finished; ValueError as `cached` does,
    and for a library edited between the start of the notebook and that of a worker.
    """
    paths = {(a, s): _entry(name, fn, arms[a], s) for a, s in itertools.product(arms, seeds)}
    found = {path: result for path in paths.values() for result in _finished(path)}
    jobs = {path: (arms[a], s) for (a, s), path in paths.items() if path not in found}
    total, done = len(found) + len(jobs), len(found)
    for path, result in progress(_run(fn, jobs), desc=name, total=total, initial=done):
        write_atomically(path, pickle.dumps(result))
        found[path] = result
    return {pair: found[path] for pair, path in paths.items()}


def _entry(name: str, fn: Callable, config: Any, seed: int) -> Path:
    """Return the file of a run in the cache."""
    if not name or not all(c.isalnum() or c in "_-." for c in name):
        raise ValueError(f"{name!r}: name a run with letters, digits, '_', '-' or '.'")
    key = stable_hash([name, mode(), config, seed, fn, code_version(), torch.__version__])
    folder = Path(os.environ.get("K2LAB_CACHE") or ROOT / ".cache") / "runs"
    return folder / f"{name}-{seed}-{key[:16]}.pkl"


def _finished(path: Path) -> tuple:
    """Return (result,) of a run that has finished before, else ()."""
    if os.environ.get("K2LAB_RERUN") != "1":
        # absent, truncated, or of another library version: run it again
        with contextlib.suppress(Exception):
            return (pickle.loads(path.read_bytes()),)
    return ()


def _run(fn: Callable, jobs: Mapping[Path, tuple[Any, int]]) -> Iterator[tuple[Path, Any]]:
    """Yield (path, fn(config, seed)) of each job as it finishes."""
    workers = min(threads(), len(jobs))
    if workers < 2:
        yield from (_one_thread(fn, path, *job) for path, job in jobs.items())
        return
    # Workers stay for the next sweep, and in it they have the settings of then.
    env = {k: v for k, v in os.environ.items() if k.startswith("K2LAB_")} | {"K2LAB_MODE": mode()}
    tasks = (delayed(_in_worker)(env, code_version(), fn, path, *job) for path, job in jobs.items())
    run = Parallel(workers, return_as="generator_unordered", batch_size=1, max_nbytes=None)
    with warnings.catch_warnings():
        # a worker that has grown by 300 MB is replaced by a fresh one, which is no news
        warnings.filterwarnings("ignore", "A worker stopped", UserWarning)
        yield from run(tasks)


def _in_worker(env: Mapping[str, str], version: str, *job: Any) -> tuple[Path, Any]:
    """Do a job with the notebook's settings and its version of the library."""
    os.environ.update(env)
    if code_version() != version:
        raise ValueError("k2lab has been edited since this notebook imported it; restart the kernel")
    return _one_thread(*job)


def _one_thread(fn: Callable, path: Path, config: Any, seed: int) -> tuple[Path, Any]:
    """Return (path, fn(config, seed)), computed by one torch thread from a fixed random state."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return path, fn(config, seed)
    finally:
        torch.set_num_threads(before)
        sys.stdout.flush()  # else a worker prints into a later cell


@functools.cache
def code_version() -> str:
    """Return a hash of the library's sources, leaving out those that only present results."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        relative = path.relative_to(Path(__file__).parent).as_posix()
        if relative not in PRESENTATION:
            digest.update(f"{relative}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write data to path, whole or not at all; make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def verdict(
    *,
    section: str,
    claim: str,
    paper: str | float,
    ours: str | float | Sequence[float],
    verdict: str,
    sd: float | None = None,
    seeds: int | None = None,
) -> dict[str, str]:
    """Return one row of the scorecard.

    section: section or figure of the paper. claim: one sentence. paper: its value.
    ours: text, a number, or one number per seed, from which mean, sd and seeds follow.
    verdict: reproduced, direction only, not reproduced, or not testable here.
    Raises ValueError for another verdict and for numbers that are not finite.
    """
    if verdict not in VERDICTS:
        raise ValueError(f"verdict={verdict!r} is not one of: {', '.join(VERDICTS)}")
    if not isinstance(ours, (str, int, float, np.generic)):
        if sd is not None or seeds is not None:
            raise ValueError("ours= has a value per seed; leave out sd= and seeds=")
        values = [float(value) for value in ours]
        if not values:
            raise ValueError("ours= is empty; give a value per seed, a number or text")
        ours, seeds = statistics.fmean(values), len(values)
        sd = statistics.stdev(values) if seeds > 1 else None
    numbers = {"paper": paper, "ours": ours, "sd": sd, "seeds": seeds}
    text = {key: "" if value is None else number(value) for key, value in numbers.items()}
    return {"section": section, "claim": claim, **text, "verdict": verdict}


def number(value: str | float) -> str:
    """Write a number with four significant digits, an integer in full; text passes unchanged."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a result; write what happened, such as 'diverged'")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def verdicts(notebook: str, rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """Return the notebook's verdicts as a table; in full mode write data/results/NN.csv.

    notebook: its two-digit number. The file is written whole, so a second call replaces it.
    """
    if not (len(notebook) == 2 and notebook.isdecimal()):
        raise ValueError(f"{notebook!r} is not a two-digit notebook number such as '11'")
    if not rows:
        raise ValueError("no verdicts; give at least one row made by notebook.verdict(...)")
    frame = pd.DataFrame([{"notebook": notebook, **row} for row in rows], columns=COLUMNS)
    if mode() == "full":
        path = output_folder() / "data" / "results" / f"{notebook}.csv"
        write_atomically(path, frame.to_csv(index=False, lineterminator="\n").encode())
    return frame


def check(answer: Any, test: Callable[[Any], bool], hint: str) -> None:
    """Check an exercise: print "ok", or "not attempted yet" for `...`, or raise with the hint.

    answer: a value, or a function; `...` as value or body means not attempted.
    test: takes the answer, returns whether it is right. Raises AssertionError when it is not.
    """
    if answer is ... or _is_stub(answer):
        print("not attempted yet")
        return
    if not bool(test(answer)):
        raise AssertionError(hint)
    print("ok")


def _is_stub(answer: Any) -> bool:
    """Tell whether a function's body is only `...`, perhaps under a docstring."""
    if not isinstance(answer, types.FunctionType):
        return False
    empty = {_ellipsis.__code__.co_code, _ellipsis_with_doc.__code__.co_code}
    consts = set(answer.__code__.co_consts) - {None, answer.__doc__}
    return answer.__code__.co_code in empty and not consts


def _ellipsis(): ...


def _ellipsis_with_doc():
    """Stand for a stub that has a docstring."""
