"""Every notebook runs in fast mode, through nbmake, in time and without leaving a trace."""

import hashlib
import resource
from pathlib import Path

import pytest
from nbmake.nb_run import NotebookRun

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LIMIT_S = 60  # of processor time: twice what fast mode may take, for slower machines
TIMEOUT_S = 240  # of a cell, by the clock


def snapshot():
    """Return what fast mode may not change, with its hashes."""
    files = [*NOTEBOOKS, *(ROOT / "figures").glob("*"), *(ROOT / "data").rglob("*")]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


def processor_s():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_fast_mode(path, monkeypatch, tmp_path):
    settings = {"K2LAB_MODE": "fast", "K2LAB_THREADS": "1", "K2LAB_RERUN": "1"}
    quiet = {"TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    kernel = {"JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1"}  # the kernel of this Python
    for name, value in {**settings, **quiet, **kernel}.items():
        monkeypatch.setenv(name, value)
    before, start = snapshot(), processor_s()
    try:
        result = NotebookRun(path, TIMEOUT_S).execute()
    except RuntimeError:  # two kernels that start at once can pick the same port
        result = NotebookRun(path, TIMEOUT_S).execute()
    if result.error:
        pytest.fail(f"cell {result.error.failing_cell_index + 1}:\n{result.error.trace}")
    outputs = [o for cell in result.nb.cells for o in cell.get("outputs", [])]
    stderr = [o.text for o in outputs if o.get("name") == "stderr"]
    assert not stderr, f"wrote to stderr: {stderr}"
    assert any("FAST MODE" in o.get("text", "") for o in outputs), "no banner"
    assert snapshot() == before
    assert processor_s() - start <= LIMIT_S
