"""The runner and the command line, on small notebooks in a temporary project."""

import json
import shutil

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from k2lab import __main__ as cli
from k2lab import notebook, runner

SETUP = "from k2lab import notebook, plot\nplot.use_style()\nnotebook.banner('{name}')"
FIGURE = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot([1, 2])"
GOOD = [
    SETUP,
    "import time\nprint('one', flush=True); time.sleep(0.3); print('two')\n6 * 7",
    FIGURE + "\nplot.save(fig, '11_line')",
    "import ipywidgets\nipywidgets.interact(lambda k: print(k), k=(0, 3));",
    "for _ in notebook.progress(range(3)): pass",
    "row = notebook.verdict(section='1', claim='c', paper=1, ours=[1, 2], verdict='reproduced')\n"
    "notebook.verdicts('11', [row])",
]
FAULTS = {
    "error": ["x = 1", "1 / 0"],
    "stderr": ["import sys", "print('careful', file=sys.stderr)"],
    "warning": ["import warnings", "warnings.warn('careful')"],
    "widget": ["import ipywidgets", "ipywidgets.interact(lambda k: 1 / 0, k=(0, 3));"],
    "death": ["import os", "os._exit(1)"],
}


@pytest.fixture
def root(tmp_path):
    """Make a project with READMEs and no notebooks."""
    (tmp_path / "notebooks").mkdir()
    for name in cli.HEADS:
        (tmp_path / name).write_text(f"# Title\n\n{markers('scorecard')}\n\n{markers('bench')}\n\nEnd.\n")
    return tmp_path


def markers(part, between="\nold\n"):
    return f"<!-- {part}:start -->{between}<!-- {part}:end -->"


def add(root, name, sources):
    """Write a notebook that has not been run."""
    sources = [source.format(name=name) if source is SETUP else source for source in sources]
    cells = [new_markdown_cell(f"# {name}"), *map(new_code_cell, sources)]
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def written(root):
    """Return what a run may change, with its bytes."""
    places = ("notebooks", "figures", "data")
    files = [p for place in places for p in (root / place).rglob("*") if p.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_a_full_run_normalises_stamps_and_is_skipped_until_something_changes(root, capsys):
    path = add(root, "11_good", GOOD)
    assert cli.main(["run", "11"], root) == 0
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert [cell.id for cell in nb.cells] == [f"c{i:02d}" for i in range(len(GOOD) + 1)]
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(GOOD) + 1))
    assert all(cell.metadata == {} for cell in nb.cells)
    assert set(nb.metadata) == {"kernelspec", "language_info", "k2lab"}
    stream, value = code[1].outputs
    assert (stream.text, value.data["text/plain"]) == ("one\ntwo\n", "42")
    (image,) = code[2].outputs  # shown once
    assert "image/png" in image.data
    assert [o.data for o in code[3].outputs] == [{"text/plain": runner.WIDGET_TEXT}]
    assert code[4].outputs == []
    assert set(written(root)) == {
        "notebooks/11_good.ipynb",
        "figures/11_line.png",
        "data/results/11.csv",
    }

    stamp = nb.metadata["k2lab"]
    assert stamp["mode"] == "full" and stamp["run_cache"] is False and stamp["seconds"] > 0
    assert stamp["code_sha256"] == runner.code_hash(nb)
    assert {"python", "torch", "numpy", "matplotlib", "k2lab_sha256"} < set(stamp)

    before = written(root)
    capsys.readouterr()
    assert cli.main(["run", "11"], root) == 0
    assert "1 skipped" in capsys.readouterr().out
    assert written(root) == before
    shutil.rmtree(root / ".cache" / "ran")  # as in a fresh clone, where nothing has been run
    assert not runner.unchanged(root, path)


def test_what_counts_as_a_change(root, monkeypatch):
    (root / "k2lab" / "part").mkdir(parents=True)
    for name in ("__init__", "notebook", "part/__init__", "part/used", "part/other"):
        (root / "k2lab" / f"{name}.py").write_text("")
    (root / "k2lab" / "part" / "mid.py").write_text("from k2lab.part.used import f\n")
    path = add(root, "11_good", ["from k2lab.part import mid"])
    nb = nbformat.read(path, as_version=4)
    runner.normalise(nb)
    nb.metadata["k2lab"] = runner.stamp(root, nb, "full", 1.0, False)
    (root / "out").mkdir()
    runner._put_in_place(root, path, nb, root / "out")
    assert runner.unchanged(root, path)

    (root / "k2lab" / "part" / "other.py").write_text("x = 1\n")  # nothing imports it
    assert runner.unchanged(root, path)
    (root / "k2lab" / "part" / "used.py").write_text("x = 1\n")  # imported by what is imported
    assert not runner.unchanged(root, path)
    (root / "k2lab" / "part" / "used.py").write_text("")
    assert runner.unchanged(root, path)
    nb.cells[1].source += "\n"
    nbformat.write(nb, path)
    assert not runner.unchanged(root, path)


def test_a_failure_is_shown_leaves_everything_as_it_was_and_the_others_run(root, capsys):
    bad = [SETUP, FIGURE + "\nplot.save(fig, '12_line')", "x = 1\nraise KeyError('planted')"]
    add(root, "12_bad", bad)
    good = add(root, "13_good", ["print('fine')"])
    before = written(root)["notebooks/12_bad.ipynb"]
    assert cli.main(["run", "--jobs", "2"], root) == 1
    captured = capsys.readouterr()
    assert "12_bad failed in cell 4" in captured.err
    assert "raise KeyError('planted')" in captured.err and "Traceback" in captured.err
    assert "\x1b" not in captured.err
    assert "1 failed" in captured.out and "1 ok" in captured.out
    assert runner.stamp_of(good)["mode"] == "full"
    assert written(root)["notebooks/12_bad.ipynb"] == before
    assert not (root / "figures").exists()
    assert list((root / ".cache" / "stage").iterdir()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_notebook(root, capsys, fault):
    add(root, "11_bad", FAULTS[fault])
    before = written(root)
    assert cli.main(["run", "11", "--mode", "fast"], root) == 1
    error = capsys.readouterr().err
    where = "11_bad: error in a widget" if fault == "widget" else "11_bad failed in cell 3"
    assert where in error
    expected = {"error": "ZeroDivisionError", "widget": "ZeroDivisionError", "death": "kernel died"}
    assert expected.get(fault, "careful") in error
    assert written(root) == before


def test_a_kernel_that_does_not_start_is_tried_again(root, capsys, monkeypatch):
    add(root, "11_good", ["1"])
    starts = []

    async def execute(self, **_):
        starts.append(1)
        raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(runner.NotebookClient, "async_execute", execute)
    assert cli.main(["run", "11"], root) == 1
    assert "11_good: the kernel did not start" in capsys.readouterr().err
    assert len(starts) == runner.START_ATTEMPTS


def test_fast_mode_changes_nothing_and_has_a_time_limit(root, capsys, monkeypatch):
    spec = root / "kernels" / "python3" / "kernel.json"  # a kernel of some other Python
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(root))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    add(root, "11_good", [*GOOD, "assert notebook.mode() == 'fast'"])
    before = written(root)
    assert cli.main(["run", "11", "--mode", "fast"], root) == 0
    assert written(root) == before
    monkeypatch.setattr(runner, "FAST_LIMIT_S", 2)
    add(root, "12_slow", ["import time", "time.sleep(60)"])
    assert cli.main(["run", "12", "--mode", "fast"], root) == 1
    assert "12_slow failed in cell 3" in (error := capsys.readouterr().err)
    assert "took more than the 2 s" in error


def test_kernels_share_the_threads_and_compute_everything(root, monkeypatch):
    monkeypatch.setenv("K2LAB_THREADS", "8")
    monkeypatch.setenv("MPLBACKEND", "agg")
    env = runner.kernel_environment(root, "out", "full", 3, False)
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == env["K2LAB_THREADS"] == "2"
    assert env["K2LAB_RERUN"] == "1" and "MPLBACKEND" not in env
    assert runner.kernel_environment(root, "out", "full", 16, True)["K2LAB_THREADS"] == "1"
    assert runner.kernel_environment(root, "out", "full", 1, True)["K2LAB_RERUN"] == "0"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "99"], "no notebook 99; notebooks/ has: 11_good"),
        (["run", "../11"], "no notebook ../11"),
        (["run", "11", "--jobs", "0"], "--jobs 0: give 1 or more"),
    ],
)
def test_a_bad_request_says_what_is_allowed(root, capsys, argv, message):
    add(root, "11_good", ["1"])
    assert cli.main(argv, root) == 2
    assert message in capsys.readouterr().err


def test_a_bad_mode_or_unreadable_notebook(root, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "--mode", "quick"], root)
    path = add(root, "11_good", ["1"])
    path.write_text("{")
    assert cli.main(["run", "11"], root) == 1
    assert "11_good is not a notebook that can be read" in capsys.readouterr().err
    monkeypatch.setenv("K2LAB_MODE", "quick")
    assert cli.main(["run", "11"], root) == 2
    assert "'quick' is not a mode" in capsys.readouterr().err


def results(root, number, **change):
    row = {"section": "2", "claim": "a | b", "paper": "1", "ours": [1.0, 2.0, 4.0]}
    row = notebook.verdict(**(row | {"verdict": "direction only"} | change))
    notebook.verdicts(number, [row])


def test_scorecard_round_trip(root, capsys, monkeypatch):
    monkeypatch.setenv("K2LAB_OUT", str(root))
    add(root, "11_good", ["1"])
    results(root, "11")
    results(root, "12", ours="text", verdict="reproduced")
    head = "name,ours,peer,peer_name,unit,ratio,threads,runs,machine"
    bench = "train,6926,4294,a peer 1.0,tokens/s,1.613,1,9,a chip"
    (root / "data" / "results" / "bench.csv").write_text(f"{head}\n{bench}\n")
    assert cli.main(["scorecard", "--check"], root) == 1
    assert "README.md: the scorecard differs" in capsys.readouterr().out
    assert "old" in (root / "README.md").read_text()
    assert cli.main(["scorecard"], root) == 0
    english, chinese = ((root / name).read_text() for name in cli.HEADS)
    row = "| [11](notebooks/11_good.ipynb) | 2 | a \\| b | 1 | 2.333 ± 1.528 (n=3) | direction only |"
    assert row in english and row.replace("direction only", "仅方向一致") in chinese
    assert "| 12 | 2 | a \\| b | 1 | text | reproduced |" in english
    for text in (english, chinese):
        assert "| train | 6926 | 4294 | tokens/s | 1.613 | 1 | a peer 1.0 |\n\na chip." in text
    assert english.startswith("# Title\n\n") and english.endswith("\n\nEnd.\n")
    assert cli.main(["scorecard", "--check"], root) == 0
    assert cli.main(["scorecard"], root) == 0
    assert (root / "README.md").read_text() == english


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("README.md", "no markers", "README.md lacks <!-- scorecard:start -->"),
        ("README.md", markers("scorecard"), "README.md lacks <!-- bench:start -->"),
        ("README.zh.md", "<!-- scorecard:end --> <!-- scorecard:start -->", "README.zh.md lacks"),
        ("data/results/11.csv", "a,b\n1,2\n", "11.csv has columns"),
        ("data/results/11.csv", ",".join(notebook.COLUMNS) + "\n11,1,c,1,1,,,mostly\n", "'mostly'"),
    ],
)
def test_scorecard_refuses(root, capsys, file, text, message):
    (root / "data" / "results").mkdir(parents=True)
    (root / file).write_text(text)
    before = (root / "README.md").read_text()
    assert cli.main(["scorecard"], root) == 2
    assert message in capsys.readouterr().err
    assert (root / "README.md").read_text() == before


def test_check_lists_problems(root, capsys):
    assert cli.main(["check"], root) == 0
    path = add(root, "11_good", ["1"])
    assert cli.main(["check"], root) == 1
    assert "11_good: has no stamp: run `make run NB=11`" in capsys.readouterr().out
    path.write_text(json.dumps({}))
    assert cli.main(["check"], root) == 1
