"""Execute notebooks, each in its own kernel, and make the result fit for git.

A run in full mode replaces a notebook and its figures and verdicts only when every cell
succeeded. A run in fast mode changes nothing.
"""

from __future__ import annotations

import ast
import asyncio
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

from k2lab import notebook

FAST_LIMIT_S = 120
START_ATTEMPTS = 3
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_TEXT = "[interactive: run this cell in Jupyter to turn the knobs]"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one notebook."""

    name: str
    status: str  # ok, skipped or failed
    seconds: float = 0.0
    error: str = ""  # notebook, cell, source and traceback


class NotebookError(Exception):
    """A notebook that could not be executed to its end, with the text to show."""


class KernelManager(AsyncKernelManager):
    """Start kernels with the running interpreter, whatever kernels are registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        argv += ["--log-level=ERROR"]  # new kernels warn about unencrypted local sockets
        return KernelSpec(argv=argv, language="python", display_name="python3")


def select(root: Path, numbers: list[str]) -> list[Path]:
    """Return the notebooks with these numbers or names, all for none.

    Raises ValueError that lists the notebooks for one that does not exist.
    """
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    unknown = [n for n in numbers if not any(n in (p.stem[:2], p.stem) for p in paths)]
    if unknown or not paths:
        there = ", ".join(path.stem for path in paths) or "none"
        raise ValueError(f"no notebook {', '.join(unknown)}; notebooks/ has: {there}")
    return [p for p in paths if not numbers or p.stem[:2] in numbers or p.stem in numbers]


def run(root: Path, paths: list[Path], *, mode: str, jobs: int, all_: bool, cache: bool) -> list:
    """Execute notebooks, `jobs` at a time, and return a Result for each.

    mode: full or fast. all_: also those that have not changed since their last run here.
    cache: take finished training runs from .cache (the stamp records it).
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: give 1 or more")
    all_ = all_ or mode == "fast" or os.environ.get("K2LAB_RERUN") == "1"
    fresh = [] if all_ else [path for path in paths if unchanged(root, path)]
    todo = [path for path in paths if path not in fresh]
    skipped = [Result(name=path.stem, status="skipped") for path in fresh]
    return skipped + asyncio.run(_run_all(root, todo, mode, min(jobs, max(1, len(todo))), cache))


async def _run_all(root: Path, paths: list[Path], mode: str, jobs: int, cache: bool) -> list:
    """Run notebooks side by side under one progress bar."""
    slots, running = asyncio.Semaphore(jobs), []
    expected = sum(stamp_of(path).get("seconds", 0) for path in paths) / jobs
    bar = tqdm(total=len(paths), unit="notebook", disable=None, dynamic_ncols=True)
    start = time.monotonic()

    async def one(path: Path) -> Result:
        async with slots:
            running.append(path.stem)
            result = await _run_one(root, path, mode, jobs, cache)
            running.remove(path.stem)
            bar.update()
            tqdm.write(f"{result.name}: {result.status}, {result.seconds:.0f} s", file=sys.stderr)
            return result

    async def show() -> None:
        about = f"about {_clock(expected)}" if expected and mode == "full" else "unknown"
        while True:
            elapsed = _clock(time.monotonic() - start)
            bar.set_description(f"{', '.join(running)} | {elapsed}, expected {about}")
            await asyncio.sleep(1)

    ticker = asyncio.create_task(show())
    try:
        return await asyncio.gather(*map(one, paths))
    finally:
        ticker.cancel()
        bar.close()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


async def _run_one(root: Path, path: Path, mode: str, jobs: int, cache: bool) -> Result:
    """Run one notebook; in full mode put its outputs in place if it succeeded."""
    start = time.monotonic()
    stage = root / ".cache" / "stage"
    stage.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stage) as out:
        try:
            nb = await execute(path, mode, kernel_environment(root, out, mode, jobs, cache))
            seconds = time.monotonic() - start
            if mode == "full":
                normalise(nb)
                nb.metadata["k2lab"] = stamp(root, nb, mode, seconds, cache)
                _put_in_place(root, path, nb, Path(out))
        except NotebookError as error:
            seconds = time.monotonic() - start
            return Result(name=path.stem, status="failed", seconds=seconds, error=str(error))
    return Result(name=path.stem, status="ok", seconds=seconds)


def kernel_environment(root: Path, out: str, mode: str, jobs: int, cache: bool) -> dict[str, str]:
    """Return the environment of a kernel that shares the machine with jobs - 1 others."""
    threads = str(max(1, notebook.threads() // jobs))
    env = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    return env | {
        "K2LAB_MODE": mode,
        "K2LAB_OUT": out,
        "K2LAB_CACHE": os.environ.get("K2LAB_CACHE", str(root / ".cache")),
        "K2LAB_RERUN": "0" if cache else "1",
        "K2LAB_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "K2LAB_PROGRESS": "0",
        "TQDM_DISABLE": "1",  # bars of other libraries
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # the kernel's debugger warns on stderr without it
    }


async def execute(path: Path, mode: str, env: dict[str, str]) -> nbformat.NotebookNode:
    """Return the notebook executed from top to bottom; raise NotebookError if it cannot be.

    A cell that writes to stderr, or a widget that holds an error, counts as failed.
    """
    for attempt in range(START_ATTEMPTS):
        try:
            nb = nbformat.read(path, as_version=4)
        except Exception as error:
            raise NotebookError(f"{path.stem} is not a notebook that can be read: {error}") from error
        try:
            await _execute_cells(path, nb, FAST_LIMIT_S if mode == "fast" else math.inf, env)
            break
        except RuntimeError as error:  # two kernels that start at once can pick the same port
            if attempt == START_ATTEMPTS - 1:
                raise NotebookError(f"{path.stem}: the kernel did not start: {error}") from error
    _refuse_stderr(path, nb)
    return nb


async def _execute_cells(path: Path, nb: nbformat.NotebookNode, limit: float, env: dict) -> None:
    """Run every cell in place; RuntimeError means that the kernel did not start."""
    at = [0]
    client = NotebookClient(
        nb,
        kernel_manager_class=KernelManager,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,  # else stdout is cut at random places
        on_cell_start=lambda cell, cell_index: at.__setitem__(0, cell_index),
    )
    start = time.monotonic()
    run = client.async_execute(env=env, cwd=str(path.parent))
    try:
        await asyncio.wait_for(run, None if limit == math.inf else limit)
    except CellExecutionError as error:
        raise NotebookError(_report(path, nb, at[0], error.traceback)) from error
    except (TimeoutError, DeadKernelError, AssertionError) as error:
        # nbclient takes a Ctrl-C for itself, stops the kernel, and trips over having done so
        if hasattr(client, "_async_cleanup_kernel_future"):
            raise KeyboardInterrupt from error
        why = "the kernel died, perhaps for want of memory"
        if time.monotonic() - start >= limit:
            why = f"took more than the {limit} s that fast mode allows"
        raise NotebookError(_report(path, nb, at[0], why)) from error


def _report(path: Path, nb: nbformat.NotebookNode, index: int, why: str) -> str:
    """Name the notebook and the cell, and show its source and what went wrong."""
    source = nb.cells[index].source.replace("\n", "\n    ")
    return f"{path.stem} failed in cell {index + 1}:\n    {source}\n{ANSI.sub('', why)}"


def _refuse_stderr(path: Path, nb: nbformat.NotebookNode) -> None:
    for index, cell in enumerate(nb.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise NotebookError(_report(path, nb, index, f"wrote to stderr: {output.text}"))
    states = nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for output in [o for s in states.values() for o in s["state"].get("outputs", ())]:
        if output["output_type"] == "error" or output.get("name") == "stderr":
            text = "\n".join(output.get("traceback", [])) or output["text"]
            raise NotebookError(f"{path.stem}: error in a widget\n{ANSI.sub('', text)}")


def normalise(nb: nbformat.NotebookNode) -> None:
    """Make a notebook depend on nothing but its cells and their results, in place."""
    nb.nbformat, nb.nbformat_minor = 4, 5
    spec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata = nbformat.from_dict({"kernelspec": spec, "language_info": {"name": "python"}})
    count = 0
    for index, cell in enumerate(nb.cells):
        cell.id = f"c{index:02d}"
        cell.metadata = {key: cell.metadata[key] for key in ("tags",) if key in cell.metadata}
        if cell.cell_type != "code":
            continue
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = cell.execution_count
            if output.get("data", {}).pop(WIDGET_VIEW, None) is not None:
                output.data = {"text/plain": WIDGET_TEXT}


def stamp(root: Path, nb: nbformat.NotebookNode, mode: str, seconds: float, cache: bool) -> dict:
    """Return what a committed notebook says about its run."""
    return {
        "mode": mode,
        "code_sha256": code_hash(nb),
        "k2lab_sha256": library_hash(root, nb),
        "run_cache": cache,
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "matplotlib")},
    }


def code_hash(nb: nbformat.NotebookNode) -> str:
    """Return the hash of a notebook's code cells."""
    sources = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def imports(source: str) -> set[str]:
    """Return the modules that source imports, and each name a from-import may take as module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def library_hash(root: Path, nb: nbformat.NotebookNode) -> str:
    """Return the hash of the library's files that a notebook imports, directly or not."""
    todo = ["\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")]
    files: dict[str, str] = {}
    while todo:
        for module in imports(todo.pop()):
            parts = module.split(".")
            for path in [root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]:
                for file in (path.with_suffix(".py"), path / "__init__.py"):
                    name = file.relative_to(root).as_posix()
                    if parts[0] == "k2lab" and name not in files and file.is_file():
                        files[name] = file.read_text(encoding="utf-8")
                        todo.append(files[name])
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def stamp_of(path: Path) -> dict:
    """Return a notebook's stamp, empty for one without or one that cannot be read."""
    try:
        return nbformat.read(path, as_version=4).metadata.get("k2lab", {})
    except Exception:
        return {}


def _record(root: Path, path: Path) -> Path:
    return root / ".cache" / "ran" / f"{path.stem}.json"


def unchanged(root: Path, path: Path) -> bool:
    """Tell whether this machine ran exactly this notebook, in full mode, on exactly this code.

    The stamp alone will not do: in a fresh clone it matches, and nothing has been run there.
    """
    old = stamp_of(path)
    if not old or not _record(root, path).is_file() or old["run_cache"]:
        return False
    new = stamp(root, nbformat.read(path, as_version=4), "full", old["seconds"], False)
    return new == old == json.loads(_record(root, path).read_text(encoding="utf-8"))


def _put_in_place(root: Path, path: Path, nb: nbformat.NotebookNode, out: Path) -> None:
    """Move figures and verdicts out of the staging folder, then replace the notebook."""
    for file in sorted(file for file in out.rglob("*") if file.is_file()):
        target = root / file.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, target)
    notebook.write_atomically(path, (nbformat.writes(nb) + "\n").encode())
    record = json.dumps(nb.metadata["k2lab"])
    notebook.write_atomically(_record(root, path), record.encode())
