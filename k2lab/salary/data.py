"""The public ai-jobs table of salaries: a loader that drops no row silently, and a synthetic table.

The schema is that of github.com/foorilla/ai-jobs-net-salaries (CC0 1.0): a row is one salary of a
job advert, mostly the top or the bottom of its band. The shipped `data/salaries_synthetic.csv` has
no real row; its cell counts, means and spreads give the numbers of the article that the demo checks.
"""

import csv
import hashlib
import io
import os
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize, stats
from tqdm.auto import tqdm

LEVELS = ("EN", "MI", "SE", "EX")  # entry, middle, senior, executive
REMOTE = (0, 50, 100)  # percent: on site, hybrid, remote
RULES = {  # what a cell may hold: a choice, a range, a pattern, or any text that is not blank
    "work_year": range(2000, 2100),
    "experience_level": LEVELS,
    "employment_type": ("FT", "PT", "CT", "FL"),  # full time, part time, contract, freelance
    "job_title": None,
    "salary": range(1, 10**12),  # in salary_currency; the public file has up to 30,400,000 (CLP)
    "salary_currency": "[A-Z]{3}",
    "salary_in_usd": range(1, 10**7),  # the public file has up to 800,000
    "employee_residence": "[A-Z]{2}",
    "remote_ratio": REMOTE,
    "company_location": "[A-Z]{2}",
    "company_size": ("S", "M", "L"),
}
COLUMNS = tuple(RULES)
NUMBERS = ("work_year", "salary", "salary_in_usd", "remote_ratio")
CHUNK = 20_000  # rows held as text at a time

# The public file grows every week, so the download is that of one commit (January 2025, 73,148 rows).
# Its sha256 was computed from a copy of the next week's file, whose tail it is: lengths and ends agree.
COMMIT = "0129867c5a4b9608a9440da268088294a5214bb9"
URL = f"https://raw.githubusercontent.com/foorilla/ai-jobs-net-salaries/{COMMIT}/salaries.csv"
NUM_BYTES = 4_127_365
SHA256 = "6bc224625ae98bd32da3cfc4bcf341a99c7d4262e267c842ffb7e3b50bd91ade"

ROOT = Path(__file__).resolve().parents[2]
SYNTHETIC = ROOT / "data" / "salaries_synthetic.csv"
SEED = 4

# The article's change of mean pay, remote (100) against on site (0), and the p of its Student t test.
ARTICLE = {"EN": (0.080, 0.20), "MI": (-0.085, 0.003), "SE": (-0.035, 0.05), "EX": (0.046, 0.61)}
# Rows per REMOTE, mean on site [USD], hybrid pay as a share of it, sd of noise in log pay. Rows and means
# are near those of the slice of the public file (spring 2025) that comes closest to the article: with
# them, the article's p values imply that slice's standard deviations within 1%. Hybrid pay: June 2025.
CELLS = {"EN": ((582, 4, 100), 95_600, 0.59, 0.39), "MI": ((2140, 6, 435), 150_800, 0.52, 0.36)}
CELLS |= {"SE": ((2633, 2, 707), 176_600, 0.60, 0.20), "EX": ((170, 0, 22), 212_800, 0.73, 0.20)}
# Weight, another weight for entry level (titles) or hybrid rows (countries), odds of remote work, effect
# on log pay: near those of the public file of 2025-01-19, odds between titles drawn together so that, as
# there, titles account for part of the remote gap and not for all of it.
TITLES = {"Data Scientist": (0.20, 0.09, 0.29, 0.00), "Data Engineer": (0.17, 0.06, 0.30, -0.07)}
TITLES |= {"Software Engineer": (0.15, 0.06, 0.22, 0.16), "Data Analyst": (0.09, 0.27, 0.30, -0.25)}
TITLES |= {"Machine Learning Engineer": (0.12, 0.05, 0.23, 0.21), "Engineer": (0.07, 0.05, 0.21, 0.05)}
TITLES |= {"Research Scientist": (0.03, 0.05, 0.18, 0.25), "Analytics Engineer": (0.02, 0.01, 0.38, -0.02)}
COUNTRIES = {"US": (0.91, 0.17, 1, 0.0), "CA": (0.035, 0.07, 1, -0.18), "GB": (0.03, 0.16, 1, -0.57)}
COUNTRIES |= {"DE": (0.01, 0.20, 1, -0.38), "FR": (0.01, 0.20, 1, -0.61), "IN": (0.002, 0.20, 3, -1.16)}
YEARS = {2021: (0.002, 5, -0.04), 2022: (0.012, 5, -0.12), 2023: (0.06, 2, -0.05)}
YEARS |= {2024: (0.47, 1, 0.01), 2025: (0.456, 1, -0.03)}
SIZES = {"S": (0.003, 4, -0.19), "M": (0.967, 1, 0.00), "L": (0.03, 0.6, 0.07)}
TYPES = {"FT": (0.996, 1, 0.00), "PT": (0.002, 1, -0.46), "CT": (0.002, 1, -0.18)}
TABLES = {"work_year": YEARS, "job_title": TITLES, "employee_residence": COUNTRIES}
TABLES |= {"employment_type": TYPES, "company_size": SIZES}
CURRENCIES = {"US": "USD", "CA": "USD", "GB": "GBP", "DE": "EUR", "FR": "EUR", "IN": "INR"}
# Units per USD in 2020, 2021, ..., 2025: the public file has one fixed rate a year.
RATES = {"USD": (1, 1, 1, 1, 1, 1), "EUR": (0.877, 0.846, 0.952, 0.926, 0.90, 0.95)}
RATES |= {"GBP": (0.780, 0.727, 0.812, 0.813, 0.80, 0.79), "INR": (74.1, 73.9, 78.6, 82.2, 83.3, 84.6)}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Salaries:
    """Hold a checked table, what it was read from, and the rows set aside; made by `load_salaries`."""

    frame: pd.DataFrame  # COLUMNS, then any others; numbers int64, experience_level ordered
    source: str  # what was read, in words
    rejected: pd.DataFrame  # line, column, value, reason: the first fault of each row set aside

    def __repr__(self) -> str:
        return f"{len(self.frame):,} rows from {self.source}; {len(self.rejected):,} rows rejected."


def load_salaries(
    path: str | Path | None = None, *, strict: bool = True, download: bool = False, years: range | None = None
) -> Salaries:
    """Read and check a table of salaries; printing the result says which one it is.

    The source is the first of these: `path`; the variable K2LAB_SALARIES; with download=True, a fixed
    snapshot of the public file (4 MB), kept in the cache (K2LAB_CACHE, by default `.cache` in the
    project); the shipped synthetic table. Only download=True touches the network.

    Args:
        path: a CSV in UTF-8 with COLUMNS; other columns are kept as text, blank lines passed over.
        strict: refuse a file with a bad row; False sets bad rows aside in `rejected`.
        download: use the public file, from the cache once it is there.
        years: the work years to keep, a range or another collection; None keeps all.

    Raises:
        ValueError: no such file; not UTF-8, or not a CSV; a column is missing or there twice; no good
            row; with strict, a bad row (the message has five lines and reasons; the header is line 1);
            the download fails or has another sha256; no row is of `years`.
    """
    if path := path or os.environ.get("K2LAB_SALARIES"):
        path, source = Path(path), Path(path).name
    elif download:
        path, source = _download(), f"the public ai-jobs file (CC0, commit {COMMIT[:7]})"
    else:
        path, source = SYNTHETIC, "the shipped synthetic table (no survey, no real job)"
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no file: give the path of a CSV, or unset K2LAB_SALARIES")
    frame, rejected = _read(path)
    if frame.empty or (strict and len(rejected)):
        few = rejected.head(5).itertuples()
        faults = "".join(f"; line {r.line}: {r.column} {r.value[:40]!r} {r.reason}" for r in few)
        raise ValueError(
            f"{path.name} has {len(rejected):,} bad rows and {len(frame):,} good ones{faults}. "
            "Correct it (one good row is the least), or set bad rows aside with strict=False"
        )
    if years is not None:
        every, frame = frame, frame[frame["work_year"].isin(list(years))].reset_index(drop=True)
        source += f", without {len(every) - len(frame):,} rows of other years"
        if frame.empty:
            raise ValueError(f"years={years!r} keeps no row: choose from {sorted(set(every['work_year']))}")
    return Salaries(frame=frame, source=source, rejected=rejected)


def _download() -> Path:
    """Return the public file in the cache; fetch it if it is not there, or not what it should be."""
    file = Path(os.environ.get("K2LAB_CACHE") or ROOT / ".cache") / "salaries" / f"{COMMIT[:7]}.csv"
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == SHA256:
        return file
    hidden = os.environ.get("K2LAB_PROGRESS") == "0"
    otherwise = "give the path of a copy, or leave out download=True for the synthetic table"
    try:
        with (
            urllib.request.urlopen(URL, timeout=30) as reply,
            tqdm.wrapattr(reply, "read", NUM_BYTES, leave=False, disable=hidden) as stream,
        ):
            content = b"".join(iter(lambda: stream.read(2**16), b""))
    except OSError as error:
        raise ValueError(f"no download from {URL} ({error}): go online, {otherwise}") from error
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{URL} came with sha256 {found}, not {SHA256}: {otherwise}")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    return part.replace(file)  # complete before it is visible


def _read(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the good rows of a CSV file, typed, and the bad ones."""
    raw = path.read_bytes()
    try:
        raw.decode()
        at = raw.find(b"\0")  # UTF-16 is full of them
    except UnicodeDecodeError as error:
        at = error.start
    if at >= 0:
        line = raw.count(b"\n", 0, at) + 1
        raise ValueError(f"{path.name} line {line}: byte 0x{raw[at]:02x} is no UTF-8 text: save it as UTF-8")
    text = io.TextIOWrapper(io.BytesIO(raw), "utf-8-sig", newline="")
    rows = _numbered(csv.reader(text, strict=True), path.name)
    _, header = next(rows, (1, []))
    counts = {c: header.count(c) for c in (*COLUMNS, *header)}
    if wrong := [f"{c!r} {n} times" for c, n in counts.items() if n != 1]:
        raise ValueError(f"{path.name} has {', '.join(wrong)} in its header: name each column once")
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    parts = [_typed(header, chunk) for chunk in chunks] or [_typed(header, [])]
    frames, bad = zip(*parts, strict=True)
    rejected = pd.DataFrame(list(chain(*bad)), columns=["line", "column", "value", "reason"])
    return pd.concat(frames, ignore_index=True), rejected


def _numbered(reader: Iterator[list[str]], name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which it begins and the cells of each row that is not blank."""
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name} line {line}: {error}: correct the quotes of this row") from error


def _typed(header: list[str], rows: list[tuple[int, list[str]]]) -> tuple[pd.DataFrame, list]:
    """Return the good ones of some rows as typed columns, and the bad ones as in `Salaries.rejected`."""
    whole = {line: row for line, row in rows if len(row) == len(header) and row != header}
    bad, columns, good = [], {}, np.ones(len(whole), bool)
    for line, row in rows:
        if line not in whole:
            fault = "is the header again" if row == header else f"has {len(row)} cells, not {len(header)}"
            bad.append((line, "row", ",".join(row), fault))
    lines, cells = list(whole), zip(*whole.values(), strict=True)
    for name, column in zip(header, cells if whole else [()] * len(header), strict=True):
        # Each distinct text is judged, and kept, once, so that a million rows take seconds.
        codes, texts = pd.factorize(np.array(column, object))
        faults = np.array([_fault(name, text) for text in texts], object)
        wrong = (faults != "")[codes]
        first = np.flatnonzero(good & wrong)
        bad += [(lines[i], name, texts[codes[i]], faults[codes[i]]) for i in first]
        good &= ~wrong
        if name in NUMBERS:
            texts = np.array([0 if f else int(t) for t, f in zip(texts, faults, strict=True)], "int64")
        columns[name] = texts[codes]
    table = pd.DataFrame(columns)[good]
    levels = pd.Categorical(table["experience_level"], LEVELS, ordered=True)
    return table.assign(experience_level=levels), sorted(bad)


def _fault(column: str, text: str) -> str:
    """Return why `text` cannot stand in `column`, or an empty string."""
    rule = RULES.get(column)
    if column in RULES and not text.strip():
        return "is blank"
    if isinstance(rule, range):
        fine = text.isascii() and text.isdigit() and len(text) < 16 and int(text) in rule
        return "" if fine else f"is no whole number from {rule[0]} to {rule[-1]}"
    if isinstance(rule, tuple):
        return "" if text in map(str, rule) else f"is not one of {', '.join(map(str, rule))}"
    return "" if rule is None or re.fullmatch(rule, text) else f"does not match {rule}"


def synthetic(seed: int) -> pd.DataFrame:
    """Return a made-up table of 6,801 rows with the article's four percentages and p values.

    Per level, Student's t for remote against on site is exact before rounding: the cells have means
    m0 and m1 = m0 (1 + pct) and one standard deviation

        s = |m1 - m0| / (t_p sqrt(1/n0 + 1/n1)),   t_p = the two-sided p quantile of t(n0 + n1 - 2).

    A salary is exp(a + b z); z adds noise and the effects of title, country, year, size and contract,
    and a and b give the cell its mean and s. Remote cells have other titles and years, hybrid ones
    other countries, and executives no hybrid row. As in the public file, rows are the top and bottom
    of a band, one after the other (those of 2020 are single), newest first; salaries are rounded to
    100 of their currency, and USD are cut to whole numbers after division by the rate of the year.

    seed: any; SEED gives the shipped file.
    """
    cells = [(level, remote) for level in LEVELS for remote in REMOTE if CELLS[level][0][remote // 50]]
    parts = [_cell(np.random.default_rng([seed, i]), *cell) for i, cell in enumerate(cells)]
    frame = pd.concat(parts).sort_values(["work_year", "order"], ascending=[False, True], ignore_index=True)
    frame["company_location"] = frame["employee_residence"]
    frame["salary_currency"] = frame["employee_residence"].map(CURRENCIES)
    pairs = zip(frame["salary_currency"], frame["work_year"], strict=True)
    rate = np.array([RATES[currency][year - 2020] for currency, year in pairs])
    frame["salary"] = (frame["pay"] * rate / 100).round().astype("int64") * 100
    frame["salary_in_usd"] = (frame["salary"] / rate).astype("int64")
    frame["experience_level"] = pd.Categorical(frame["experience_level"], LEVELS, ordered=True)
    return frame.assign(synthetic="synthetic: no real job")[[*COLUMNS, "synthetic"]]


def _cell(rng: np.random.Generator, level: str, remote: int) -> pd.DataFrame:
    """Return the rows of a level and remote ratio, with `pay` in USD and the `order` of their adverts."""
    n, noise = CELLS[level][0][remote // 50], CELLS[level][-1]
    ads = (n + 1) // 2
    mid, half = rng.normal(0, noise, ads), rng.gamma(3.3, 0.125, ads) / 2  # median top / bottom 1.5
    columns = {"order": rng.random(ads)}
    for name, table in TABLES.items():
        second = (level == "EN" and name == "job_title") or (remote == 50 and name == "employee_residence")
        rows = np.array(list(table.values()))
        weight = rows[:, int(second)] * rows[:, -2] ** (remote == 100)
        picks = rng.choice(len(rows), ads, p=weight / weight.sum())
        columns[name], mid = np.array(list(table))[picks], mid + rows[picks, -1]
    columns["work_year"][n // 2 :] = 2020  # the single row of an odd count
    z = np.column_stack([mid + half, mid - half]).ravel()[:n]
    frame = pd.DataFrame(columns).loc[np.arange(n) // 2]
    return frame.assign(experience_level=level, remote_ratio=remote, pay=_pay(z, level, remote))


def _pay(z: np.ndarray, level: str, remote: int) -> np.ndarray:
    """Return exp(a + b z) with the mean and standard deviation of its cell (hybrid: the mean, b = 1)."""
    (n0, _, n1), onsite, hybrid, _ = CELLS[level]
    change, p = ARTICLE[level]
    mean = onsite * {0: 1, 50: hybrid, 100: 1 + change}[remote]
    sd = abs(onsite * change) / stats.t.isf(p / 2, n0 + n1 - 2) / np.sqrt(1 / n0 + 1 / n1)
    b = 1
    if remote != 50:
        b = optimize.brentq(lambda b: stats.variation(np.exp(b * z), ddof=1) - sd / mean, 0.1, 5)
    pay = np.exp(b * z)
    return pay * mean / pay.mean()


if __name__ == "__main__":  # `python -m k2lab.salary.data` remakes the shipped file
    synthetic(SEED).to_csv(SYNTHETIC, index=False, lineterminator="\n")
