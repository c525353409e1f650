"""The loader on good and malformed tables of salaries, and the synthetic table and its generator."""

import csv
import hashlib
import io
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from k2lab.salary import data
from k2lab.salary.data import COLUMNS, LEVELS, REMOTE, load_salaries, synthetic

GOOD = ["2024", "SE", "FT", "Data Engineer", "100000", "EUR", "111111", "DE", "100", "DE", "M"]
FILES = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    """Give each test an empty cache, and no network."""
    monkeypatch.setenv("K2LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "URL", "http://127.0.0.1:9/salaries.csv")


@pytest.fixture
def table(tmp_path):
    """Return a function that writes rows, or bytes, to a file and returns its path."""

    def write(content, header=COLUMNS, **options):
        path = tmp_path / "jobs.csv"
        if not isinstance(content, bytes):
            content = as_csv([header, *content], **options)
        path.write_bytes(content)
        return path

    return write


def as_csv(rows, encoding="utf-8", **options) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows(rows)
    return text.getvalue().encode(encoding)


def altered(**cells) -> list[str]:
    """Return the good row with some cells replaced."""
    return [cells.get(name, cell) for name, cell in zip(COLUMNS, GOOD, strict=True)]


def compared(frame, level) -> tuple[float, float]:
    """Return the change of mean pay [%] and Student's p, remote against on site."""
    pay = frame[frame["experience_level"] == level].groupby("remote_ratio")["salary_in_usd"]
    onsite, remote = pay.get_group(0), pay.get_group(100)
    return 100 * (remote.mean() / onsite.mean() - 1), stats.ttest_ind(remote, onsite).pvalue


# --- the shipped table


@pytest.fixture(scope="module")
def shipped():
    return synthetic(data.SEED)


def test_the_shipped_file_is_what_the_generator_writes(shipped):
    text = shipped.to_csv(index=False, lineterminator="\n")
    assert data.SYNTHETIC.read_bytes() == text.encode()


def test_the_loader_returns_what_the_generator_made(shipped):
    pd.testing.assert_frame_equal(load_salaries().frame, shipped)


def test_every_shipped_row_is_labelled():
    head, *rows = data.SYNTHETIC.read_text().splitlines()
    assert head.endswith(",synthetic")
    assert len(rows) == 6801 and all(row.endswith(",synthetic: no real job") for row in rows)


@pytest.mark.parametrize(
    ("level", "change", "p", "digits"),
    [("EN", 8.0, 0.20, 2), ("MI", -8.5, 0.003, 3), ("SE", -3.5, 0.05, 2), ("EX", 4.6, 0.61, 2)],
)
def test_the_shipped_file_gives_the_numbers_of_the_article(level, change, p, digits):
    found = compared(load_salaries().frame, level)
    assert (round(found[0], 1), round(found[1], digits)) == (change, p)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_any_seed_gives_the_numbers_of_the_article(seed):
    frame = synthetic(seed)
    for level, (change, p) in data.ARTICLE.items():
        found = compared(frame, level)
        assert found[0] == pytest.approx(100 * change, abs=0.02)
        assert found[1] == pytest.approx(p, rel=0.01)
    assert not frame.equals(synthetic(seed + 1))


def test_rows_of_the_cells(shipped):
    counts = pd.crosstab(shipped["experience_level"], shipped["remote_ratio"])
    assert counts.to_numpy().tolist() == [[582, 4, 100], [2140, 6, 435], [2633, 2, 707], [170, 0, 22]]
    assert counts.index.tolist() == list(LEVELS) and counts.columns.tolist() == list(REMOTE)


def test_means_on_site_and_equal_spreads(shipped):
    cells = shipped.groupby(["experience_level", "remote_ratio"], observed=True)["salary_in_usd"]
    mean, sd = cells.mean(), cells.std()
    for level, usd in zip(LEVELS, (95_600, 150_800, 176_600, 212_800), strict=True):
        assert mean[level, 0] == pytest.approx(usd, rel=1e-4)
        assert sd[level, 100] == pytest.approx(sd[level, 0], rel=1e-3)
    assert sd[:, 0].round(-2).tolist() == [55_100, 82_000, 74_400, 84_600]  # of the public slice: within 1%
    assert mean["SE", 50] / mean["SE", 0] == pytest.approx(0.60, rel=1e-3)


def test_pay_is_right_skewed_and_plausible(shipped):
    cells = shipped[shipped["remote_ratio"] != 50].groupby(
        ["experience_level", "remote_ratio"], observed=True
    )
    assert (cells["salary_in_usd"].skew() > 0.4).all()
    assert shipped["salary_in_usd"].between(15_000, 900_000).all()
    assert shipped["salary"].mod(100).eq(0).all()


def test_rows_are_the_two_ends_of_a_band(shipped):
    same = shipped.drop(columns=["salary", "salary_in_usd"]).astype(str)
    top, bottom = slice(0, 6798, 2), slice(1, 6798, 2)
    assert (same[top].to_numpy() == same[bottom].to_numpy()).all()
    ratio = shipped["salary"].to_numpy()[top] / shipped["salary"].to_numpy()[bottom]
    assert ratio.min() >= 1 and np.median(ratio) == pytest.approx(1.5, abs=0.03)
    assert shipped["work_year"][6798:].tolist() == [2020] * 3  # the odd rows


def test_years_are_those_of_the_public_file(shipped):
    assert shipped["work_year"].is_monotonic_decreasing
    assert set(shipped["work_year"]) == set(range(2020, 2026))
    assert shipped["work_year"].ge(2024).mean() == pytest.approx(0.91, abs=0.02)
    remote = shipped["remote_ratio"].eq(100).groupby(shipped["work_year"]).mean()
    assert remote[2022] > 2 * remote[2025]


def test_one_exchange_rate_a_year(shipped):
    for (currency, year), rows in shipped.groupby(["salary_currency", "work_year"]):
        rate = data.RATES[currency][year - 2020]
        assert (rows["salary_in_usd"] == np.floor(rows["salary"] / rate)).all()
        assert (rate == 1) == (currency == "USD")
    assert 0.90 < shipped["salary_currency"].eq("USD").mean() < 0.97


def test_hybrid_rows_are_mostly_foreign(shipped):
    foreign = shipped["company_location"].ne("US").groupby(shipped["remote_ratio"]).mean()
    assert foreign[50] > 0.5 and foreign[0] < 0.12


def test_titles_countries_and_years_carry_pay(shipped):
    pay = np.log(shipped["salary_in_usd"]) - np.log(shipped["salary_in_usd"]).groupby(
        [shipped["experience_level"], shipped["remote_ratio"]], observed=True
    ).transform("mean")
    title = pay.groupby(shipped["job_title"]).mean()
    assert title["Research Scientist"] > title["Data Engineer"] > title["Data Analyst"] + 0.1
    country = pay.groupby(shipped["company_location"]).mean()
    assert country["US"] > country["GB"] + 0.4 > country["IN"] + 0.7
    assert pay[shipped["work_year"] == 2022].mean() < pay[shipped["work_year"] == 2024].mean() - 0.05


def test_entry_level_has_more_analysts(shipped):
    share = shipped["job_title"].eq("Data Analyst").groupby(shipped["experience_level"], observed=True).mean()
    assert share["EN"] > 0.3 and share.drop("EN").max() < 0.15


@pytest.mark.parametrize("level", ["MI", "SE"])
def test_titles_account_for_part_of_the_remote_gap(shipped, level):
    rows = shipped[(shipped["experience_level"] == level) & (shipped["remote_ratio"] != 50)]
    pay, remote = np.log(rows["salary_in_usd"]).to_numpy(), rows["remote_ratio"].eq(100).to_numpy(float)
    titles = pd.get_dummies(rows["job_title"]).to_numpy(float)
    raw = pay[remote == 1].mean() - pay[remote == 0].mean()
    adjusted = np.linalg.lstsq(np.column_stack([remote, titles]), pay)[0][0]
    assert 0.3 < adjusted / raw < 0.8


# --- sources


def test_it_says_which_source(table, monkeypatch):
    assert str(load_salaries()) == (
        "6,801 rows from the shipped synthetic table (no survey, no real job); 0 rows rejected."
    )
    path = table([GOOD] * 2)
    monkeypatch.setenv("K2LAB_SALARIES", str(path))
    assert str(load_salaries()) == repr(load_salaries()) == "2 rows from jobs.csv; 0 rows rejected."
    other = path.with_name("other.csv")
    other.write_bytes(as_csv([COLUMNS, GOOD]))
    assert load_salaries(str(other)).source == load_salaries(other, download=True).source == "other.csv"


def test_no_file(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no.csv' is no file: give the path of a CSV"):
        load_salaries(tmp_path / "no.csv")
    monkeypatch.setenv("K2LAB_SALARIES", str(tmp_path))
    with pytest.raises(ValueError, match="unset K2LAB_SALARIES"):
        load_salaries()


@pytest.fixture
def public(tmp_path, monkeypatch):
    """Stand a small file in for the public one."""
    path = tmp_path / "public.csv"
    path.write_bytes(as_csv([COLUMNS, GOOD, GOOD, GOOD]))
    monkeypatch.setattr(data, "URL", path.as_uri())
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_download_once_and_use_the_cache(public, tmp_path, capfd):
    first = load_salaries(download=True)
    assert first.source == "the public ai-jobs file (CC0, commit 0129867)" and len(first.frame) == 3
    cached = tmp_path / "cache" / "salaries" / "0129867.csv"
    assert [p.name for p in cached.parent.iterdir()] == [cached.name]
    public.unlink()
    pd.testing.assert_frame_equal(load_salaries(download=True).frame, first.frame)
    assert capfd.readouterr().err == ""
    cached.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="no download from file:.*No such file.*go online"):
        load_salaries(download=True)


def test_a_damaged_copy_is_fetched_again(public, tmp_path):
    load_salaries(download=True)
    cached = tmp_path / "cache" / "salaries" / "0129867.csv"
    cached.write_bytes(b"cut off")
    assert len(load_salaries(download=True).frame) == 3
    assert cached.read_bytes() == public.read_bytes()


def test_another_file_than_the_pinned_one_is_refused(public, tmp_path):
    public.write_bytes(as_csv([COLUMNS, GOOD]))
    with pytest.raises(ValueError, match=f"sha256 [0-9a-f]{{64}}, not {data.SHA256}: give the path"):
        load_salaries(download=True)
    assert not (tmp_path / "cache").exists()


def test_offline():
    with pytest.raises(ValueError, match=r"127.0.0.1.*go online.*path.*synthetic"):
        load_salaries(download=True)
    assert len(load_salaries().frame) == 6801


def test_download_shows_progress(public, monkeypatch, capfd):
    monkeypatch.delenv("K2LAB_PROGRESS")
    load_salaries(download=True)
    assert "%" in capfd.readouterr().err


def test_the_download_is_one_commit():
    assert re.fullmatch("[0-9a-f]{40}", data.COMMIT) and re.fullmatch("[0-9a-f]{64}", data.SHA256)


# --- types, years


def test_types_and_extra_columns(table):
    notes = {"EX": "007", "EN": "", "SE": "header"}
    rows = [[*altered(experience_level=level), note] for level, note in notes.items()]
    frame = load_salaries(table(rows, header=[*COLUMNS, "note"])).frame
    assert frame.columns.tolist() == [*COLUMNS, "note"]
    assert frame["note"].tolist() == ["007", "", "header"]
    assert frame["experience_level"].sort_values().tolist() == ["EN", "SE", "EX"]
    assert frame["experience_level"].cat.categories.tolist() == list(LEVELS)
    assert frame["experience_level"].max() == "EX"  # only an ordered one has a maximum
    numbers = frame.select_dtypes("int64").columns.tolist()
    assert numbers == ["work_year", "salary", "salary_in_usd", "remote_ratio"]
    assert frame.loc[0, numbers].tolist() == [2024, 100000, 111111, 100]


def test_columns_in_another_order(table):
    order = COLUMNS[::-1]
    frame = load_salaries(table([GOOD[::-1]], header=order)).frame
    assert frame.loc[0, "salary"] == 100000 and frame.loc[0, "job_title"] == "Data Engineer"


def test_codes_that_look_like_gaps_are_text(table):
    frame = load_salaries(table([altered(employee_residence="NA", job_title="None")])).frame
    assert frame.loc[0, ["employee_residence", "job_title"]].tolist() == ["NA", "None"]


def test_one_level_only_and_one_row(table):
    frame = load_salaries(table([altered(experience_level="EX")])).frame
    assert frame["experience_level"].value_counts().to_dict() == {"EX": 1, "EN": 0, "MI": 0, "SE": 0}


@pytest.mark.parametrize("years", [range(2021, 2023), [2022, 2021], {2021, 2022}, (2021, 2022, 2099)])
def test_years(table, years):
    path = table([altered(work_year=str(year)) for year in range(2020, 2026)])
    found = load_salaries(path, years=years)
    assert found.frame["work_year"].tolist() == [2021, 2022] and found.frame.index.tolist() == [0, 1]
    assert found.source == "jobs.csv, without 4 rows of other years"


def test_no_row_of_these_years(table):
    with pytest.raises(ValueError, match=r"years=\[2023\] keeps no row: choose from \[2024\]"):
        load_salaries(table([GOOD]), years=[2023])


# --- bad rows

BAD_CELLS = [
    ("work_year", "1999", "is no whole number from 2000 to 2099"),
    ("work_year", "24", "is no whole number from 2000 to 2099"),
    ("work_year", "2024.0", "is no whole number from 2000 to 2099"),
    ("work_year", "", "is blank"),
    ("experience_level", "en", "is not one of EN, MI, SE, EX"),
    ("experience_level", "Senior", "is not one of EN, MI, SE, EX"),
    ("experience_level", " SE", "is not one of EN, MI, SE, EX"),
    ("employment_type", "full", "is not one of FT, PT, CT, FL"),
    ("job_title", " ", "is blank"),
    ("salary", "1e5", "is no whole number from 1 to 999999999999"),
    ("salary", "9" * 5000, "is no whole number from 1 to 999999999999"),
    ("salary", "١٢٣", "is no whole number from 1 to 999999999999"),
    ("salary_currency", "EURO", "does not match [A-Z]{3}"),
    ("salary_currency", "EUR\n", "does not match [A-Z]{3}"),
    ("salary_in_usd", "0", "is no whole number from 1 to 9999999"),
    ("salary_in_usd", "-90000", "is no whole number from 1 to 9999999"),
    ("salary_in_usd", "10000000", "is no whole number from 1 to 9999999"),
    ("salary_in_usd", "100k", "is no whole number from 1 to 9999999"),
    ("salary_in_usd", "nan", "is no whole number from 1 to 9999999"),
    ("employee_residence", "USA", "does not match [A-Z]{2}"),
    ("remote_ratio", "25", "is not one of 0, 50, 100"),
    ("remote_ratio", "-50", "is not one of 0, 50, 100"),
    ("company_location", "us", "does not match [A-Z]{2}"),
    ("company_size", "XL", "is not one of S, M, L"),
]


@pytest.mark.parametrize(("column", "value", "reason"), BAD_CELLS)
def test_a_bad_cell_is_named_with_its_line(table, column, value, reason):
    path = table([GOOD, altered(**{column: value}), GOOD])
    with pytest.raises(ValueError) as error:
        load_salaries(path)
    assert f"1 bad rows and 2 good ones; line 3: {column} {value[:40]!r} {reason}." in str(error.value)
    assert "strict=False" in str(error.value)
    lenient = load_salaries(path, strict=False)
    assert lenient.rejected.to_numpy().tolist() == [[3, column, value, reason]]
    assert len(lenient.frame) == 2 and str(lenient) == "2 rows from jobs.csv; 1 rows rejected."


def test_five_bad_rows_are_listed_and_all_are_counted(table):
    path = table([altered(salary="x"), GOOD, *[altered(company_size="?", salary="y")] * 6])
    with pytest.raises(ValueError) as error:
        load_salaries(path)
    assert "7 bad rows and 1 good ones" in str(error.value)
    assert re.findall(r"line (\d+): (\w+)", str(error.value)) == [(str(n), "salary") for n in (2, 4, 5, 6, 7)]
    assert load_salaries(path, strict=False).rejected["line"].tolist() == [2, 4, 5, 6, 7, 8, 9]


def test_rows_of_another_width_and_the_header_again(table):
    path = table([GOOD[:-1], GOOD, [*GOOD, "M"], COLUMNS, GOOD])
    found = load_salaries(path, strict=False)
    assert len(found.frame) == 2
    assert found.rejected[["line", "column", "reason"]].to_numpy().tolist() == [
        [2, "row", "has 10 cells, not 11"],
        [4, "row", "has 12 cells, not 11"],
        [5, "row", "is the header again"],
    ]
    assert found.rejected["value"][0] == ",".join(GOOD[:-1])


def test_line_numbers_count_line_breaks_in_titles_and_blank_lines(table):
    rows = [altered(job_title='Data\nEngineer,\r\n"big"'), [], altered(salary="?"), GOOD, altered(salary="!")]
    found = load_salaries(table(rows), strict=False)
    assert found.rejected["line"].tolist() == [6, 8]
    assert found.frame["job_title"][0] == 'Data\nEngineer,\r\n"big"'


@pytest.mark.parametrize("rows", [[], [altered(salary="0")]])
@pytest.mark.parametrize("strict", [True, False])
def test_no_good_row(table, rows, strict):
    with pytest.raises(ValueError, match=f"{len(rows)} bad rows and 0 good ones.*one good row is the least"):
        load_salaries(table(rows), strict=strict)


# --- bad files


@pytest.mark.parametrize("strict", [True, False])
def test_header_without_or_with_doubled_columns(table, strict):
    header = [name.replace("company_size", "size").replace("salary_currency", "salary") for name in COLUMNS]
    with pytest.raises(ValueError) as error:
        load_salaries(table([GOOD], header=header), strict=strict)
    assert "'salary' 2 times, 'salary_currency' 0 times, 'company_size' 0 times in its header" in str(
        error.value
    )
    with pytest.raises(ValueError, match="'note' 2 times"):
        load_salaries(table([[*GOOD, "", ""]], header=[*COLUMNS, "note", "note"]), strict=strict)
    with pytest.raises(ValueError, match="'work_year' 0 times.*'company_size' 0 times"):
        load_salaries(table(b""), strict=strict)


def test_utf8_with_a_mark_and_any_line_ends(table):
    row = altered(job_title="Ingénieur 数据")
    for end in ("\n", "\r\n", "\r"):
        for encoding in ("utf-8", "utf-8-sig"):
            frame = load_salaries(table([row, row], encoding=encoding, lineterminator=end)).frame
            assert frame["job_title"].tolist() == ["Ingénieur 数据"] * 2


@pytest.mark.parametrize(
    ("encoding", "title", "line", "byte"),
    [
        ("latin-1", "Ingénieur", 3, "e9"),
        ("cp1252", "Data – Lead", 3, "96"),
        ("utf-16", "Engineer", 1, "ff"),
        ("utf-16-le", "Engineer", 1, "00"),
        ("utf-16-be", "Engineer", 1, "00"),
    ],
)
def test_other_encodings(table, encoding, title, line, byte):
    path = table([GOOD, altered(job_title=title)], encoding=encoding)
    with pytest.raises(ValueError, match=f"jobs.csv line {line}: byte 0x{byte} is no UTF-8 text: save it as"):
        load_salaries(path)


@pytest.mark.parametrize("title", ['"Data Engineer', '"Data" Engineer'])
def test_broken_quotes(table, title):
    good = ",".join(GOOD)
    bad = good.replace("Data Engineer", title)
    path = table("\n".join([",".join(COLUMNS), good, bad, good, good]).encode())
    with pytest.raises(ValueError, match="jobs.csv line 3: .*: correct the quotes"):
        load_salaries(path, strict=False)


# --- properties

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
VALUES = {
    "work_year": st.integers(2000, 2099),
    "experience_level": st.sampled_from(LEVELS),
    "employment_type": st.sampled_from(["FT", "PT", "CT", "FL"]),
    "job_title": CELL.filter(str.strip),
    "salary": st.integers(1, 10**12 - 1),
    "salary_currency": st.text("ABCXYZ", min_size=3, max_size=3),
    "salary_in_usd": st.integers(1, 10**7 - 1),
    "employee_residence": st.text("ABCXYZ", min_size=2, max_size=2),
    "remote_ratio": st.sampled_from(REMOTE),
    "company_location": st.text("ABCXYZ", min_size=2, max_size=2),
    "company_size": st.sampled_from("SML"),
}
ROW = st.tuples(*VALUES.values()).map(list)
BAD = st.sampled_from([(COLUMNS.index(column), value) for column, value, _ in BAD_CELLS])


@FILES
@given(
    rows=st.lists(st.tuples(ROW, st.none() | BAD), min_size=1, max_size=12),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    chunk=st.integers(1, 5),
)
def test_planted_faults_are_found_and_nothing_else(table, monkeypatch, rows, end, encoding, chunk):
    monkeypatch.setattr(data, "CHUNK", chunk)
    good, bad, line = [], [], 2
    for row, fault in rows:
        if fault:
            row[fault[0]] = fault[1]
            bad.append([line, COLUMNS[fault[0]], fault[1]])
        else:
            good.append(list(row))
        line += 1 + sum(len(re.findall("\r\n|\r|\n", str(cell))) for cell in row)
    quoted = {"quoting": csv.QUOTE_NONNUMERIC, "lineterminator": end}
    path = table([row for row, _ in rows], encoding=encoding, **quoted)
    if not good:
        with pytest.raises(ValueError, match="and 0 good ones"):
            load_salaries(path, strict=False)
        return
    found = load_salaries(path, strict=False)
    assert found.frame.astype(object).to_numpy().tolist() == good
    assert found.rejected[["line", "column", "value"]].to_numpy().tolist() == bad
    if bad:
        with pytest.raises(
            ValueError, match=f"{len(bad)} bad rows and {len(good)} good ones; line {bad[0][0]}:"
        ):
            load_salaries(path)
    else:
        pd.testing.assert_frame_equal(load_salaries(path).frame, found.frame)


@FILES
@given(cell=CELL, column=st.sampled_from(COLUMNS))
def test_any_text_in_a_cell_is_kept_or_rejected(table, cell, column):
    found = load_salaries(table([GOOD, altered(**{column: cell})]), strict=False)
    assert len(found.frame) + len(found.rejected) == 2
    if len(found.rejected):
        assert found.rejected.loc[0, ["line", "column", "value"]].tolist() == [2 + 1, column, cell]
    else:
        assert str(found.frame[column][1]) == (
            cell if found.frame[column].dtype != "int64" else str(int(cell))
        )


@FILES
@given(content=st.binary(max_size=200) | CELL.map(str.encode), header=st.booleans())
def test_any_bytes_load_or_raise_value_error(table, content, header):
    start = as_csv([COLUMNS, GOOD]) if header else b""
    try:
        found = load_salaries(table(start + content), strict=False)
    except ValueError as error:
        assert "jobs.csv" in str(error)
    else:
        assert len(found.frame) >= 1


# --- size


def test_a_long_table_over_several_chunks(table, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 30_000)
    rng = np.random.default_rng(0)
    usd = rng.integers(20_000, 400_000, 100_000)
    rows = [altered(salary=n, salary_in_usd=n, salary_currency="USD") for n in usd.astype(str)]
    for line in (2, 30_001, 30_002, 100_001):
        rows[line - 2] = altered(salary_in_usd="-1")
    found = load_salaries(table(rows), strict=False)
    assert found.rejected["line"].tolist() == [2, 30_001, 30_002, 100_001]
    kept = np.delete(usd, [0, 29_999, 30_000, 99_999])
    assert (found.frame["salary_in_usd"] == kept).all() and (found.frame["salary"] == kept).all()
    assert found.frame.index.tolist() == list(range(99_996))
