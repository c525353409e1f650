"""The command line: python -m k2lab run | scorecard | check."""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path

from k2lab import checks, runner
from k2lab.notebook import COLUMNS, MODES, ROOT, VERDICTS, mode, write_atomically

CHINESE = dict(zip(VERDICTS, ("已复现", "仅方向一致", "未复现", "此处无法检验"), strict=True))
HEADS = {
    "README.md": ["Notebook", "Paper", "Claim", "Paper's value", "Ours", "Verdict"],
    "README.zh.md": ["笔记本", "论文", "论断", "论文数值", "本项目", "结论"],
}


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run one command; return 0, 1 for something that failed, 2 for a bad request."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args, root)
    except ValueError as error:
        print(f"k2lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("k2lab: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m k2lab", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="execute notebooks")
    run.add_argument("notebooks", nargs="*", metavar="NB", help="numbers, such as 11; default all")
    run.add_argument("--mode", choices=MODES, help="default: K2LAB_MODE, else full")
    run.add_argument("--jobs", type=int, default=1, help="how many side by side; they share threads")
    run.add_argument("--all", action="store_true", help="also those unchanged since their last run")
    run.add_argument("--cache", action="store_true", help="reuse finished runs; not for git")
    run.set_defaults(command=run_command)
    card = commands.add_parser("scorecard", help="write data/results/ into the README's table")
    card.add_argument("--check", action="store_true", help="only compare")
    card.set_defaults(command=scorecard_command)
    check = commands.add_parser("check", help="check the committed notebooks and figures")
    check.set_defaults(command=check_command)
    return parser


def run_command(args: argparse.Namespace, root: Path) -> int:
    """Execute notebooks and show what failed; the others still run."""
    paths = runner.select(root, args.notebooks)
    options = {"mode": args.mode or mode(), "jobs": args.jobs, "cache": args.cache}
    results = runner.run(root, paths, all_=args.all, **options)
    for result in results:
        if result.error:
            print(f"\n{result.error}\n", file=sys.stderr)
    counts = Counter(result.status for result in results)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if counts["skipped"]:
        print("skipped: unchanged since the last run here; --all (make run ALL=1) runs them too")
    return int(counts["failed"] > 0)


def check_command(args: argparse.Namespace, root: Path) -> int:
    """Print the problems of the committed notebooks."""
    found = checks.check_all(root)
    for name, problems in found.items():
        for problem in problems:
            print(f"{name}: {problem}")
    print(f"{len(found) - 1} notebooks, {sum(map(len, found.values()))} problems")
    return int(any(found.values()))


def scorecard_command(args: argparse.Namespace, root: Path) -> int:
    """Write the scorecard into both READMEs, or only compare."""
    texts = scorecard(root)
    old = {path: path.read_text(encoding="utf-8") for path in texts}
    stale = [path for path in texts if texts[path] != old[path]]
    for path in stale:
        if args.check:
            print(f"{path.name}: the scorecard differs from data/results/; run `make run`")
        else:
            write_atomically(path, texts[path].encode())
    return int(args.check and bool(stale))


def scorecard(root: Path) -> dict[Path, str]:
    """Return the text of each README with its scorecard made from data/results/NN.csv.

    Raises ValueError for a README without the two markers and a file with other columns.
    """
    rows = read_verdicts(root)
    links = {p.stem[:2]: p.name for p in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    texts = {}
    for name, head in HEADS.items():
        path = root / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        table = _table(rows, head, links, CHINESE if name == "README.zh.md" else {})
        text = _fill(name, text, "scorecard", table)
        texts[path] = _fill(name, text, "bench", _bench_table(root / "data" / "results" / "bench.csv"))
    return texts


def _fill(name: str, text: str, part: str, table: str) -> str:
    """Put a table between the two markers of a part."""
    start, end = f"<!-- {part}:start -->", f"<!-- {part}:end -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{name} lacks {start} or, after it, {end}; put each on its own line")
    return f"{before}{start}\n{table}\n{end}{after}"


def _bench_table(path: Path) -> str:
    """Return the benchmark's rows, with the machine below."""
    if not path.is_file():
        return "`make bench`"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| | k2lab | peer | unit | ratio | threads | beside |", "|---|---|---|---|---|---|---|"]
    columns = ("name", "ours", "peer", "unit", "ratio", "threads", "peer_name")
    lines += ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]
    return "\n".join([*lines, "", f"{rows[0]['machine']}."])


def read_verdicts(root: Path) -> list[dict[str, str]]:
    """Return the rows of every data/results/NN.csv, by notebook."""
    rows = []
    for path in sorted((root / "data" / "results").glob("[0-9][0-9].csv")):
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                raise ValueError(f"{path.name} has columns {reader.fieldnames}; they are {COLUMNS}")
            rows += list(reader)
    if wrong := checks.verdict_problems(rows):
        raise ValueError(f"verdicts that are none of {', '.join(VERDICTS)}: {', '.join(wrong)}")
    return rows


def _table(rows: list[dict[str, str]], head: list[str], links: dict[str, str], words: dict[str, str]) -> str:
    """Return a line that counts the verdicts, and the table."""
    counts = Counter(row["verdict"] for row in rows)
    total = " · ".join(f"{words.get(v, v)} {counts[v]}" for v in VERDICTS)
    lines = [f"**{total}**", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        link = links.get(row["notebook"])
        where = f"[{row['notebook']}](notebooks/{link})" if link else row["notebook"]
        spread = f" ± {row['sd']}" if row["sd"] else ""
        ours = row["ours"] + spread + (f" (n={row['seeds']})" if row["seeds"] else "")
        verdict = words.get(row["verdict"], row["verdict"])
        cells = [where, row["section"], row["claim"], row["paper"], ours, verdict]
        lines.append("| " + " | ".join(c.replace("|", "\\|").strip() for c in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
