"""What a committed notebook must be: each check takes a notebook and yields its problems."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat

from k2lab import runner
from k2lab.notebook import VERDICTS

MAX_BYTES = 1_000_000
CELLS, WORDS, FIGURES = (20, 45), (600, 1800), (3, 6)
MAX_LINES, MAX_CELL_LINES = 250, 25
SECTIONS = [
    "You will see",
    "You need",
    "Paper and here",
    "What reproduced",
    "Break it",
    "Exercises",
    "Discuss",
    "Limits",
]
OVERVIEW = "00"  # it holds no experiment, so it has no verdicts, labs or exercises

ABSOLUTE = re.compile(
    r"(?<![\w.])/(?:home|root|work|tmp|usr|opt|var|private|Users)/|\b[A-Z]:\\(?:Users|Windows|Temp)"
)
WARNING = re.compile(r"\b[A-Z]\w*Warning\b")
CJK = re.compile(r"[\u4e00-\u9fff]")


def check_all(root: Path) -> dict[str, list[str]]:
    """Return the problems of every committed notebook, and under "figures" those of figures/."""
    paths = sorted((root / "notebooks").glob("*.ipynb"))
    found = {path.stem: check_notebook(path) for path in paths}
    return found | {"figures": figure_problems(root)}


def check_notebook(path: Path) -> list[str]:
    """Return everything wrong with one committed notebook."""
    if not re.fullmatch(r"[0-9]{2}_[a-z0-9_]+\.ipynb", path.name):
        return [f"{path.name}: name a notebook NN_slug.ipynb in lower case"]
    try:
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
    except Exception as error:
        return [f"not a notebook that can be read: {error}"]
    checks = (_stamp, _counts, _outputs, _paths, _code, _calls, _size, _prose, _template)
    problems = [problem for check in checks for problem in check(nb, path.stem)]
    if (size := path.stat().st_size) > MAX_BYTES:
        problems.append(f"{size:,} bytes; at most {MAX_BYTES:,}")
    return problems


def code_cells(nb: nbformat.NotebookNode) -> list[tuple[int, nbformat.NotebookNode]]:
    """Return the code cells with their numbers, which count every cell from 1."""
    return [(i, cell) for i, cell in enumerate(nb.cells, 1) if cell.cell_type == "code"]


def _stamp(nb: nbformat.NotebookNode, name: str) -> Iterator[str]:
    stamp = nb.metadata.get("k2lab")
    if stamp is None:
        yield f"has no stamp: run `make run NB={name[:2]}`"
        return
    if stamp.get("mode") != "full":
        yield f"was run in {stamp.get('mode')} mode; commit a full run"
    if stamp.get("run_cache") is not False:
        yield "was run with --cache; commit a run that computed everything"
    if stamp.get("code_sha256") != runner.code_hash(nb):
        yield f"a code cell was edited after the run: run `make run NB={name[:2]}`"
    if missing := {"seconds", "python", "torch", "numpy", "k2lab_sha256"} - set(stamp):
        yield f"the stamp lacks {', '.join(sorted(missing))}"


def _counts(nb: nbformat.NotebookNode, name: str) -> Iterator[str]:
    counts = [cell.execution_count for _, cell in code_cells(nb)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}, not 1 to {len(counts)}"
    for index, cell in enumerate(nb.cells):
        if cell.get("id") != f"c{index:02d}" or "execution" in cell.metadata:
            yield f"cell {index + 1} was not normalised: id {cell.get('id')!r}"
            return


def _outputs(nb: nbformat.NotebookNode, name: str) -> Iterator[str]:
    for number, cell in code_cells(nb):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {number} has the error {output.ename}"
            if output.get("name") == "stderr":
                yield f"cell {number} wrote to stderr"
            if runner.WIDGET_VIEW in output.get("data", {}):
                yield f"cell {number} has an output that only a running widget shows"
            if found := WARNING.search(_text(output)):
                yield f"cell {number} shows the warning {found[0]}"
        yield from _widget(nb, number, cell)
    if "widgets" in nb.metadata:
        yield "holds the state of widgets"


def _widget(nb: nbformat.NotebookNode, number: int, cell: nbformat.NotebookNode) -> Iterator[str]:
    """A widget needs a static figure in its own cell or the nearest code cell on either side."""
    if not any(runner.WIDGET_TEXT in _text(output) for output in cell.outputs):
        return
    codes = code_cells(nb)
    at = [n for n, _ in codes].index(number)
    near = [output for _, c in codes[max(0, at - 1) : at + 2] for output in c.outputs]
    if not any("image/png" in output.get("data", {}) for output in near):
        yield f"cell {number} has a widget with no static figure beside it"


def _text(output: nbformat.NotebookNode) -> str:
    """Return what an output shows as text; images are left out as base64 spells any word."""
    data = output.get("data", {})
    shown = [str(value) for mime, value in data.items() if not mime.startswith("image/")]
    return "\n".join([output.get("text", ""), *shown])


def _paths(nb: nbformat.NotebookNode, name: str) -> Iterator[str]:
    for number, cell in enumerate(nb.cells, 1):
        for text in [cell.source, *map(_text, cell.get("outputs", []))]:
            if found := ABSOLUTE.search(text):
                yield f"cell {number} has an absolute path: {text[found.start() :][:40]!r}"


def _code(nb: nbformat.NotebookNode, name: str) -> Iterator[str]:
    for number, cell in code_cells(nb):
        try:
            tree = ast.parse(cell.source)
        except SyntaxError:
            yield f"cell {number} is not plain Python; shell escapes and magics are not allowed"
            continue
        if not tree.body:
            yield f"cell {number} is empty"
        for word in (r"get_ipython", r"sys\.path", r"os\.system", r"subprocess", r"\bpip\b"):
            if found := re.search(word, cell.source):
                yield f"cell {number} uses {found[0]}"


def calls(nb: nbformat.NotebookNode, function: str) -> list[ast.Call]:
    """Return the calls of a function, such as "plot.save", in cells that are plain Python."""
    found = []
    for _, cell in code_cells(nb):
        try:
            nodes = list(ast.walk(ast.parse(cell.source)))
        except SyntaxError:
            continue
        found += [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == function]
    return found


def figure_names(nb: nbformat.NotebookNode) -> list[str]:
    """Return the names that plot.save is called with; "" for one that is not a literal."""
    found = []
    for call in calls(nb, "plot.save"):
        given = call.args[1:2] + [k.value for k in call.keywords if k.arg == "name"]
        literal = given and isinstance(given[0], ast.Constant)
        found.append(given[0].value if literal else "")
    return found


def _calls(nb: nbformat.NotebookNode, name: str) -> Iterator[str]:
    for function in ("notebook.choose", "notebook.banner", "plot.use_style"):
        if (count := len(calls(nb, function))) != 1:
            yield f"calls {function} {count} times; once, in the set-up cell"
    figures = figure_names(nb)
    low, high = (1, FIGURES[1]) if name[:2] == OVERVIEW else FIGURES
    if not low <= len(figures) <= high:
        yield f"saves {len(figures)} figures with plot.save; {low} to {high}"
    for figure in figures:
        if not figure.startswith(f"{name[:2]}_"):
            yield f"saves the figure {figure!r}; write the name in the call, as {name[:2]}_slug"
    written = [ast.literal_eval(call.args[0]) for call in calls(nb, "notebook.verdicts")]
    if written != [name[:2]] and not (name[:2] == OVERVIEW and not written):
        yield f"calls notebook.verdicts for {written}; once, for {name[:2]!r}"


def _size(nb: nbformat.NotebookNode, name: str) -> Iterator[str]:
    if not CELLS[0] <= len(nb.cells) <= CELLS[1]:
        yield f"{len(nb.cells)} cells; {CELLS[0]} to {CELLS[1]}"
    lines = {n: sum(map(bool, map(str.strip, c.source.split("\n")))) for n, c in code_cells(nb)}
    if sum(lines.values()) > MAX_LINES:
        yield f"{sum(lines.values())} code lines; at most {MAX_LINES}"
    for number in [n for n, count in lines.items() if count > MAX_CELL_LINES]:
        yield f"cell {number} has {lines[number]} lines; at most {MAX_CELL_LINES}"


def count_words(markdown: str) -> int:
    """Count words of prose: no code, tables, formulas, tags or links; two hanzi are a word."""
    for pattern in (r"```.*?```", r"\$\$.*?\$\$", r"<[^>]+>", r"\$[^$\n]+\$", r"`[^`\n]*`"):
        markdown = re.sub(pattern, " ", markdown, flags=re.S)
    markdown = re.sub(r"\]\([^)]*\)|https?://\S+", " ", markdown)
    lines = [line for line in markdown.split("\n") if not line.lstrip().startswith("|")]
    text = "\n".join(lines)
    latin = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", CJK.sub(" ", text))
    return len(latin) + len(CJK.findall(text)) // 2


def _prose(nb: nbformat.NotebookNode, name: str) -> Iterator[str]:
    words = sum(count_words(cell.source) for cell in nb.cells if cell.cell_type == "markdown")
    if not WORDS[0] <= words <= WORDS[1]:
        yield f"{words} words of prose; {WORDS[0]} to {WORDS[1]}"


def _template(nb: nbformat.NotebookNode, name: str) -> Iterator[str]:
    """Headings or bold leads of the template, in its order."""
    first = nb.cells[0] if nb.cells else {"cell_type": "", "source": ""}
    if first["cell_type"] != "markdown" or not first["source"].startswith("# "):
        yield "does not begin with a title: a markdown cell with `# ...`"
    if "摘要" not in first["source"]:
        yield "has no abstract in Chinese (摘要) in the first cell"
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    sections = SECTIONS[:1] if name[:2] == OVERVIEW else SECTIONS
    leads = {s: re.search(rf"^(?:[-*>\s]*\*\*|#+ .*?){s}", text, re.M) for s in sections}
    for section in [s for s, found in leads.items() if not found]:
        yield f"has no section (a heading or a bold lead) {section!r}"
    order = [found.start() for found in leads.values() if found]
    if order != sorted(order):
        yield f"sections are not in the order {', '.join(sections)}"


def figure_problems(root: Path) -> list[str]:
    """Every committed figure has exactly one writer, and every writer's figure exists."""
    writers: dict[str, list[str]] = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        try:
            names = figure_names(nbformat.read(path, as_version=4))
        except Exception:  # check_notebook reports one that cannot be read
            continue
        for name in names:
            writers.setdefault(name, []).append(path.stem)
    problems = [
        f"{name}.png has {len(by)} writers: {', '.join(by)}" for name, by in writers.items() if len(by) > 1
    ]
    there = {path.stem for path in (root / "figures").glob("*") if path.suffix == ".png"}
    problems += [f"{p.name} is not a PNG" for p in (root / "figures").glob("*") if p.suffix != ".png"]
    problems += [f"{name}.png has no writer; delete it" for name in sorted(there - set(writers))]
    problems += [f"{name}.png is not there" for name in sorted(set(writers) - there)]
    return problems


def verdict_problems(rows: list[dict[str, str]]) -> list[str]:
    """Return rows of the scorecard whose verdict is none of the four."""
    return [f"{r['notebook']}: {r['verdict']!r}" for r in rows if r["verdict"] not in VERDICTS]
