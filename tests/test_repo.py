"""The repository itself: layering, budgets, notebooks, scorecard, figures, data, names.

Each rule is a function that returns problems, so that a planted fault can show that it works.
"""

import ast
import hashlib
import itertools
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from k2lab import __main__ as cli
from k2lab import checks, runner

ROOT = Path(__file__).resolve().parents[1]

# What each part of the library may import of ours. Nothing imports plot: notebooks do.
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"checks", "notebook", "runner"},
    "checks": {"notebook", "runner"},
    "runner": {"notebook"},
    "notebook": {"hashing"},
    "hashing": set(),
    "plot": set(),
    "model": set(),
    "optim": set(),
    "pretrain": {"model", "optim"},
    "agentic": {"model"},
    "rl": {"agentic", "model", "optim"},
    "salary": set(),
}
MAX_LIBRARY, MAX_PACKAGE, MAX_FILE, MAX_FUNCTION = 6000, 1400, 350, 60
TOP_LEVEL = {
    *("README.md", "README.zh.md", "LICENSE", "Makefile", "pyproject.toml", "requirements.txt"),
    *("notebooks", "k2lab", "data", "figures", "tests", ".ci", ".github", ".gitignore"),
}


def sources(root):
    """Return {dotted module name: path} of the library; a package has the name of its folder."""
    files = sorted((root / "k2lab").rglob("*.py"))
    return {".".join(f.relative_to(root).with_suffix("").parts): f for f in files}


def imported(path, modules):
    """Return the modules of ours that a file imports."""
    names = runner.imports(path.read_text(encoding="utf-8"))
    return {m for n in names for m in (n, f"{n}.__init__") if m in modules and "k2lab" in m}


def layering_problems(root):
    modules, problems = sources(root), []
    for name, path in modules.items():
        part = name.split(".")[1]
        if part not in MAY_IMPORT:
            problems.append(f"{name} is in no part that has a rule")
            continue
        for other in imported(path, modules) - {"k2lab.__init__"}:
            if other.split(".")[1] not in {part} | MAY_IMPORT[part]:
                problems.append(f"{name} imports {other}")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                problems.append(f"{name} has a relative import, which the rules cannot see")
    return problems


def cycle_problems(root):
    modules = sources(root)
    graph = {name: imported(path, modules) - {"k2lab.__init__"} for name, path in modules.items()}
    while free := [name for name, needs in graph.items() if not needs & set(graph)]:
        for name in free:
            del graph[name]
    return [f"import cycle among or above {', '.join(sorted(graph))}"] if graph else []


def budget_problems(root):
    lines, problems = {}, []
    for name, path in sources(root).items():
        text = path.read_text(encoding="utf-8")
        lines[name] = len(text.splitlines())
        if lines[name] > MAX_FILE:
            problems.append(f"{name} has {lines[name]} lines; at most {MAX_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION:
                    problems.append(f"{name}.{node.name} has {length} lines; at most {MAX_FUNCTION}")
    for part in {name.split(".")[1] for name in lines if name.count(".") > 1}:
        total = sum(n for name, n in lines.items() if name.startswith(f"k2lab.{part}."))
        if total > MAX_PACKAGE:
            problems.append(f"{part} has {total} lines; at most {MAX_PACKAGE}")
    if sum(lines.values()) > MAX_LIBRARY:
        problems.append(f"the library has {sum(lines.values())} lines; at most {MAX_LIBRARY}")
    return problems


def init_problems(root):
    """Return __init__ files that hold more than a docstring, imports, __all__ and __version__."""
    problems = []
    for name, path in sources(root).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if name.endswith("__init__"):
            body = tree.body[1:] if ast.get_docstring(tree) else tree.body
            fine = (ast.Import, ast.ImportFrom)
            named = [n for n in body if isinstance(n, ast.Assign)]
            odd = [n for n in body if not isinstance(n, fine) and n not in named]
            odd += [n for n in named if ast.unparse(n.targets[0]) not in ("__all__", "__version__")]
            problems += [f"{name} line {node.lineno} is no import" for node in odd]
        if not ast.get_docstring(tree):
            problems.append(f"{name} has no docstring")
    return problems


def name_problems(root):
    """Return bare taus, which could be a clip threshold or a regulariser, and absolute paths."""
    problems = []
    for name, path in sources(root).items():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [getattr(node, field, None) for field in ("id", "arg", "attr", "name")]
            if "tau" in names:
                problems.append(f"{name} line {node.lineno}: qk_clip_threshold or rl_tau, not tau")
        if found := checks.ABSOLUTE.search(text):
            problems.append(f"{name} has the absolute path {found[0]}")
    return problems


def top_level_problems(root):
    """Return what git tracks, or would, beside the files and folders of the design."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted({file.split("/")[0] for file in files.splitlines()} - TOP_LEVEL)


def data_problems(root):
    """Compare the inputs in data/ with the checksums in data/README.md, both ways."""
    readme = root / "data" / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    listed = dict(re.findall(r"`([\w./-]+)`[^\n]*?\b([0-9a-f]{64})\b", text))
    there = {p.relative_to(root / "data").as_posix(): p for p in (root / "data").rglob("*")}
    files = {name: path for name, path in there.items() if path.is_file() and name != "README.md"}
    results = {name for name in files if name.startswith("results/")}
    problems = [
        f"{name} is no verdict file"
        for name in results
        if not re.fullmatch(r"results/([0-9]{2}|bench)\.csv", name)
    ]
    for name in files.keys() - results:
        if listed.get(name) != hashlib.sha256(files[name].read_bytes()).hexdigest():
            problems.append(f"{name}: data/README.md has {listed.get(name, 'no checksum')}")
    return problems + [f"{name} is listed but not there" for name in listed.keys() - files.keys()]


def verdict_file_problems(root):
    """Return verdict files without the notebook that writes them, and the reverse."""
    there = {p.stem for p in (root / "data" / "results").glob("[0-9][0-9].csv")}
    notebooks = [nbformat.read(p, as_version=4) for p in (root / "notebooks").glob("*.ipynb")]
    calls = [call for nb in notebooks for call in checks.calls(nb, "notebook.verdicts")]
    return sorted(there ^ {ast.literal_eval(call.args[0]) for call in calls})


def requirement_problems(text, bounds=()):
    """Each line is a pin and says who needs it; ours comes last; every bound has its pin."""
    *pins, last = text.splitlines()
    problems = [pin for pin in pins if not re.fullmatch(r"[\w-]+==[\w.]+ +# \S.*", pin)]
    problems += [] if last.split("#")[0].strip() == "-e ." else [last]
    names = {re.split(r"[=<> ]", pin)[0] for pin in pins}
    return problems + [b for b in bounds if re.split(r"[=<> ]", b)[0] not in names]


RULES = [
    layering_problems,
    cycle_problems,
    budget_problems,
    init_problems,
    name_problems,
    top_level_problems,
    data_problems,
    verdict_file_problems,
    checks.figure_problems,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    assert rule(ROOT) == []


def test_requirements_are_pinned_and_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"].values()
    bounds = [*project["dependencies"], *itertools.chain(*groups)]
    assert requirement_problems((ROOT / "requirements.txt").read_text(), bounds) == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*")), ids=lambda path: path.stem)
def test_committed_notebook(path):
    assert checks.check_notebook(path) == []


def test_readme_tables_equal_the_verdict_files(capsys):
    assert cli.main(["scorecard", "--check"]) == 0, capsys.readouterr().out


# From here on, planted faults.

FAULTS = [
    (layering_problems, "model/a.py", "from k2lab.optim import b", "imports k2lab.optim.b"),
    (layering_problems, "model/a.py", "import k2lab.optim", "imports k2lab.optim.__init__"),
    (layering_problems, "optim/b.py", "def f():\n    from k2lab.model import a", "k2lab.model.a"),
    (layering_problems, "rl/c.py", "from k2lab import plot", "imports k2lab.plot"),
    (layering_problems, "salary/d.py", "from k2lab.rl.x import y\nfrom . import z", "relative"),
    (layering_problems, "new/e.py", "", "no part that has a rule"),
    (cycle_problems, "model/a.py", "from k2lab.model import a2", "k2lab.model.a"),
    (cycle_problems, "model/a.py", "from k2lab.model import X", "k2lab.model.__init__"),
    (budget_problems, "model/a.py", "x = 1\n" * 351, "351 lines"),
    (budget_problems, "model/a.py", "def f():\n" + "    x = 1\n" * 60, "61 lines"),
    (init_problems, "rl/__init__.py", '"""D."""\nx = 1', "line 2"),
    (init_problems, "rl/__init__.py", "import os", "no docstring"),
    (name_problems, "rl/c.py", "def f(tau): return 1", "line 1"),
    (name_problems, "rl/c.py", "class C:\n    tau: float = 1", "line 2"),
    (name_problems, "rl/c.py", "f(tau=1)", "line 1"),
    (name_problems, "rl/c.py", "open('/home/me/x')", "absolute path"),
]


@pytest.fixture
def tree(tmp_path):
    """Make a small library that obeys every rule."""
    files = {
        "__init__.py": '"""D."""\n__version__ = "1"\n',
        "plot.py": '"""D."""\n',
        "model/__init__.py": '"""D."""\nfrom k2lab.model.a import X\n',
        "model/a.py": '"""D."""\nX = 1\n',
        "model/a2.py": '"""D."""\nfrom k2lab.model.a import X\n',
        "optim/__init__.py": '"""D."""\n',
        "optim/b.py": '"""D."""\n',
        "rl/x.py": '"""D."""\nfrom k2lab.model.a import X\nrl_tau = X\n',
    }
    for name, text in files.items():
        (tmp_path / "k2lab" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "k2lab" / name).write_text(text)
    return tmp_path


def test_the_small_library_obeys_the_rules(tree):
    assert [rule(tree) for rule in RULES[:5]] == [[]] * 5


@pytest.mark.parametrize(("rule", "file", "text", "message"), FAULTS)
def test_planted_fault_in_the_library(tree, rule, file, text, message):
    (tree / "k2lab" / file).parent.mkdir(exist_ok=True)
    (tree / "k2lab" / file).write_text(text)
    assert any(message in problem for problem in rule(tree))


def test_package_and_library_budgets(tree):
    for part, count in (("model", 5), ("rl", 4), ("optim", 4), ("pretrain", 4), ("salary", 4)):
        (tree / "k2lab" / part).mkdir(exist_ok=True)
        for i in range(count):
            (tree / "k2lab" / part / f"f{i}.py").write_text("x = 1\n" * 300)
    problems = budget_problems(tree)
    assert len(problems) == 2
    assert "model has 15" in problems[0] and "the library has 63" in problems[1]


def test_planted_file_at_the_top_level(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("cache\n")
    (tmp_path / "cache").write_text("")
    assert top_level_problems(tmp_path) == []
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "x.py").write_text("")
    assert top_level_problems(tmp_path) == ["scratch"]


def test_planted_faults_in_the_data(tmp_path):
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "data" / "results" / "11.csv").write_text("")
    data = tmp_path / "data" / "jobs.csv"
    data.write_text("a\n")
    assert data_problems(tmp_path) == ["jobs.csv: data/README.md has no checksum"]
    digest = hashlib.sha256(b"a\n").hexdigest()
    (tmp_path / "data" / "README.md").write_text(f"| `jobs.csv` | a source | {digest} |\n")
    assert data_problems(tmp_path) == []
    data.write_text("b\n")
    assert data_problems(tmp_path) == [f"jobs.csv: data/README.md has {digest}"]
    data.unlink()
    (tmp_path / "data" / "results" / "notes.txt").write_text("")
    assert len(data_problems(tmp_path)) == 2
    assert verdict_file_problems(tmp_path) == ["11"]


@pytest.mark.parametrize("line", ["torch>=2 # model", "torch==2.13.0", "torch==2.13.0 #", "torch"])
def test_planted_requirement(line):
    good = "numpy==2.0  # arrays\n-e .  # ours\n"
    assert requirement_problems(good, ["numpy>=1"]) == []
    assert requirement_problems(good, ["torch>=2"]) == ["torch>=2"]
    assert requirement_problems(f"{line}\n{good}") == [line]
    assert requirement_problems("-e .\nnumpy==2.0  # arrays\n") != []


def valid_notebook():
    """Return a notebook in which check_notebook finds nothing."""
    sections = [f"## {name}\n\n" + "some words of prose " * 20 for name in checks.SECTIONS]
    title = "# Keep a test honest\n\n摘要：一句话。\n\n"
    markdown = [new_markdown_cell(text) for text in (title, *sections)]
    setup = "cfg = notebook.choose(fast=1, full=2)\nnotebook.banner('11_x')\nplot.use_style()"
    saves = [f"plot.save(fig, '11_f{i}')" for i in range(3)]
    code = [new_code_cell(s) for s in (setup, *saves, "notebook.verdicts('11', rows)", "interact()")]
    for cell in code[1:4]:
        cell.outputs = [new_output("display_data", {"image/png": "iVBOR/tmp/w0KGgo="})]
    code[4].outputs = [new_output("display_data", {"image/png": "iVBORw0KGgo="})]
    code[5].outputs = [new_output("display_data", {"text/plain": runner.WIDGET_TEXT})]
    code += [new_code_cell(f"x = {i}") for i in range(6)]
    nb = new_notebook(cells=[*markdown, *code])
    runner.normalise(nb)
    nb.metadata["k2lab"] = runner.stamp(ROOT, nb, "full", 1.0, False)
    return nb


def write(nb, path, restamp=True):
    if restamp and "k2lab" in nb.metadata:
        nb.metadata["k2lab"]["code_sha256"] = runner.code_hash(nb)
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)
    return path


def set_source(index, text):
    return lambda nb: nb.cells[index].__setitem__("source", text)


def add_output(*args, **kwargs):
    return lambda nb: nb.cells[-1].outputs.append(new_output(*args, **kwargs))


NOTEBOOK_FAULTS = {
    "no stamp": lambda nb: nb.metadata.pop("k2lab"),
    "fast mode": lambda nb: nb.metadata["k2lab"].update(mode="fast"),
    "--cache": lambda nb: nb.metadata["k2lab"].update(run_cache=True),
    "stamp lacks torch": lambda nb: nb.metadata["k2lab"].pop("torch"),
    "execution counts": lambda nb: nb.cells[-1].update(execution_count=99),
    "not normalised": lambda nb: nb.cells[3].update(id="abc"),
    "error KeyError": add_output("error", ename="KeyError", evalue="", traceback=[]),
    "wrote to stderr": add_output("stream", name="stderr", text="x"),
    "running widget": add_output("display_data", {runner.WIDGET_VIEW: {}}),
    "UserWarning": add_output("stream", text="x.py: UserWarning: careful"),
    "no static figure": lambda nb: nb.cells[-7 - 1].update(outputs=[]),
    "'/home/me": add_output("execute_result", {"text/plain": "/home/me/x"}, execution_count=12),
    "'/work/x": set_source(5, "see /work/x"),
    "not plain Python": set_source(-1, "!ls"),
    "uses sys.path": set_source(-1, "sys.path.append('x')"),
    "is empty": set_source(-1, "# nothing"),
    "notebook.choose 2 times": set_source(-1, "notebook.choose(fast=1, full=1)"),
    "notebook.banner 2 times": set_source(-1, "notebook.banner('x')"),
    "figure '12_x'": set_source(-1, "plot.save(fig, '12_x')"),
    "figure ''": set_source(-1, "plot.save(fig, name)"),
    "saves 2 figures": lambda nb: nb.cells.pop(10),
    "notebook.verdicts for ['11', '12']": set_source(-1, "notebook.verdicts('12', rows)"),
    "19 cells": lambda nb: [nb.cells.pop() for _ in range(2)],
    "26 lines": set_source(-1, "x = 1\n" * 26),
    "code lines": lambda nb: [c.update(source="x = 1\n" * 25) for c in nb.cells[9:]],
    "words of prose": lambda nb: [c.update(source="few") for c in nb.cells[:9]],
    "title": set_source(0, "no title 摘要"),
    "摘要": set_source(0, "# Title"),
    "no section": lambda nb: nb.cells.pop(6),
    "not in the order": lambda nb: nb.cells.insert(1, nb.cells.pop(8)),
    "state of widgets": lambda nb: nb.metadata.update(widgets={}),
    "bytes": add_output("display_data", {"image/png": "A" * checks.MAX_BYTES}),
}


def test_the_valid_notebook_has_no_problem(tmp_path):
    assert checks.check_notebook(write(valid_notebook(), tmp_path / "11_x.ipynb")) == []


@pytest.mark.parametrize("message", NOTEBOOK_FAULTS)
def test_planted_fault_in_a_notebook(tmp_path, message):
    nb = valid_notebook()
    NOTEBOOK_FAULTS[message](nb)
    problems = checks.check_notebook(write(nb, tmp_path / "11_x.ipynb"))
    assert any(message in problem for problem in problems), problems


def test_an_edited_code_cell_a_bad_name_and_an_unreadable_file(tmp_path):
    nb = valid_notebook()
    nb.cells[-1].source += "  # edited"
    (problem,) = checks.check_notebook(write(nb, tmp_path / "11_x.ipynb", restamp=False))
    assert "a code cell was edited after the run: run `make run NB=11`" in problem
    assert "NN_slug" in checks.check_notebook(tmp_path / "Untitled.ipynb")[0]
    (tmp_path / "12_x.ipynb").write_text("{")
    assert "not a notebook that can be read" in checks.check_notebook(tmp_path / "12_x.ipynb")[0]


def test_figures_have_one_writer_each(tmp_path):
    for name in ("11_x", "12_x"):
        write(valid_notebook(), tmp_path / "notebooks" / f"{name}.ipynb")
    (tmp_path / "figures").mkdir()
    for name in ("11_f0.png", "11_f1.png", "11_old.png", "11_f2.svg"):
        (tmp_path / "figures" / name).write_bytes(b"")
    problems = checks.figure_problems(tmp_path)
    assert "11_f0.png has 2 writers: 11_x, 12_x" in problems
    assert "11_old.png has no writer; delete it" in problems
    assert "11_f2.svg is not a PNG" in problems and "11_f2.png is not there" in problems


@pytest.mark.parametrize(
    ("markdown", "words"),
    [
        ("one two three", 3),
        ("$a + b$ and `code here` [a link](http://x.y/z)", 3),
        ("```\ncode\n```\n| a | table |\n<details>fold</details>", 1),
        ("用一句话说明四个字啊", 5),
        ("well-known K2's 1.5", 4),
    ],
)
def test_count_words(markdown, words):
    assert checks.count_words(markdown) == words
