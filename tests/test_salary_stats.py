"""The statistics of the salary table against scipy, hand-written formulas and planted effects."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as sp
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.meta_analysis import effectsize_smd
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_ind
from statsmodels.tools.sm_exceptions import SingularMatrixWarning, ValueWarning

from k2lab.salary import stats

LEVELS, REMOTE = ("EN", "MI", "SE", "EX"), (0, 50, 100)
COUNTS = {"EN": (30, 8, 20), "MI": (60, 10, 44), "SE": (80, 12, 66), "EX": (24, 6, 14)}
MEAN_USD = {"EN": 95_000, "MI": 150_000, "SE": 176_000, "EX": 212_000}
NO_EFFECT = dict.fromkeys(LEVELS, 0.0)


def table(seed=0, *, counts=COUNTS, percent=NO_EFFECT, sd=0.3, pair_sd=0.0):
    """Make adverts of two rows each; log pay has the SD `sd` and, shared by an advert, `pair_sd`."""
    rng, rows = np.random.default_rng(seed), []
    for (level, numbers), i in itertools.product(counts.items(), range(3)):
        mean = MEAN_USD[level] * (1 + percent[level] / 100 * (i == 2))
        for number in range((numbers[i] + 1) // 2):
            title = f"{('Data Engineer', 'Data Scientist', 'Analyst')[number % 3]} {number}"
            shared = pair_sd * rng.normal()
            for _ in range(min(2, numbers[i] - 2 * number)):
                salary = round(mean * np.exp(shared + sd * rng.normal() - (sd**2 + pair_sd**2) / 2))
                row = (
                    2024 + number % 2,
                    level,
                    "FT",
                    title,
                    salary,
                    "USD",
                    salary,
                    "US",
                    REMOTE[i],
                    "US",
                    "M",
                )
                rows.append(row)
    return pd.DataFrame(rows, columns=list(stats.COLUMNS))


@pytest.fixture(scope="module")
def frame():
    return table(percent={"EN": 10, "MI": -15, "SE": 0, "EX": 20}, pair_sd=0.2)


def groups(frame, level, log=False, remote=100):
    """Return the pay of remote and on-site rows of a level."""
    pay = np.log(frame["salary_in_usd"]) if log else frame["salary_in_usd"].astype(float)
    chosen = frame["experience_level"] == level
    return tuple(pay[chosen & (frame["remote_ratio"] == ratio)].to_numpy() for ratio in (remote, 0))


def designs(frame, remote=REMOTE):
    """Return the rows of `remote`, and sum-to-zero columns of the level, the ratio and their products."""
    frame = frame[frame["remote_ratio"].isin(remote)]
    parts = []
    for name, values in (("experience_level", LEVELS), ("remote_ratio", remote)):
        code = frame[name].map({value: i for i, value in enumerate(values)}).to_numpy()
        parts.append(np.vstack([np.eye(len(values) - 1), -np.ones(len(values) - 1)])[code])
    a, b = parts
    return frame, a, b, np.einsum("ni,nj->nij", a, b).reshape(len(frame), -1)


def rss(y, *parts):
    x = np.column_stack([np.ones(len(y)), *parts])
    e = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return e @ e


def test_cells_shows_all_twelve_and_takes_categories(frame):
    frame = frame[~((frame["experience_level"] == "EX") & (frame["remote_ratio"] == 50))]
    shown = stats.cells(frame.astype({"experience_level": pd.CategoricalDtype(LEVELS, ordered=True)}))
    assert list(zip(shown["experience_level"], shown["remote_ratio"], strict=True)) == list(
        itertools.product(LEVELS, REMOTE)
    )
    assert shown["n"].tolist() == [30, 8, 20, 60, 10, 44, 80, 12, 66, 24, 0, 14]
    assert shown.iloc[10, 3:].isna().all()
    remote = groups(frame, "EX")[0]
    assert shown.iloc[11, 3:].tolist() == pytest.approx(
        [remote.mean(), remote.std(ddof=1), np.median(remote)]
    )


def test_pair_ids_by_hand(frame):
    one = frame.iloc[[0]]
    kinds = [one.assign(job_title=title) for title in "aabbbcabbbb"]
    rows = pd.concat(kinds).assign(salary=range(11), salary_in_usd=range(11))
    assert stats.pair_ids(rows).tolist() == [0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 6]
    assert stats.pair_share(rows) == pytest.approx(8 / 11)
    assert stats.pair_ids(rows.assign(salary_currency=["USD"] * 4 + ["EUR"] * 7)).tolist() == [
        *(0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 6)
    ]
    assert stats.pair_ids(rows.assign(salary_currency=["USD", "EUR"] * 5 + ["USD"])).tolist() == list(
        range(11)
    )


def test_pair_ids_against_a_loop(frame):
    rng = np.random.default_rng(0)
    rows = frame.iloc[rng.integers(0, 4, 300)].assign(
        company_size=rng.choice(["S", "M"], 300, p=[0.1, 0.9]), job_title="x", experience_level="EN"
    )
    same = rows.drop(columns=["salary", "salary_in_usd"]).to_numpy().tolist()
    ids, alone = [0], True
    for before, row in itertools.pairwise(same):
        alone = not (alone and row == before)
        ids.append(ids[-1] + alone)
    assert stats.pair_ids(rows).tolist() == ids and 10 < max(ids) < 299


@pytest.mark.parametrize("remote", [REMOTE, (0, 100)])
@pytest.mark.parametrize("outcome", ["usd", "log"])
def test_anova_sums_of_squares_by_nested_models(frame, outcome, remote):
    rows, a, b, ab = designs(frame, remote)
    y = rows["salary_in_usd"].to_numpy(float)
    y = np.log(y) if outcome == "log" else y
    full = rss(y, a, b, ab)
    expected = {
        (1, stats.FACTORS): (rss(y) - rss(y, a), rss(y, a) - rss(y, a, b)),
        (1, stats.FACTORS[::-1]): (rss(y) - rss(y, b), rss(y, b) - rss(y, a, b)),
        (2, stats.FACTORS): (rss(y, b) - rss(y, a, b), rss(y, a) - rss(y, a, b)),
        (3, stats.FACTORS): (rss(y, b, ab) - full, rss(y, a, ab) - full),
    }
    df = {"experience_level": 3, "remote_ratio": len(remote) - 1}
    df_resid = len(y) - 4 * len(remote)
    for (typ, order), mains in expected.items():
        found = stats.anova(frame, typ=typ, order=order, outcome=outcome, remote=remote)
        assert found["term"].tolist() == [*order, ":".join(order)]
        sums = np.array([*mains, rss(y, a, b) - full])
        degrees = np.array([*(df[name] for name in order), 3 * (len(remote) - 1)])
        f = sums / degrees / (full / df_resid)
        assert found["df"].tolist() == degrees.tolist() and (found["df_resid"] == df_resid).all()
        np.testing.assert_allclose(found["sum_sq"], sums, rtol=1e-7)
        np.testing.assert_allclose(found["F"], f, rtol=1e-7)
        np.testing.assert_allclose(found["p"], sp.f.sf(f, degrees, df_resid), rtol=1e-6)
        np.testing.assert_allclose(found["partial_eta_sq"], sums / (sums + full), rtol=1e-7)


@pytest.mark.parametrize("covariance", ["HC3", "cluster"])
def test_robust_anova_against_the_sandwich(frame, covariance):
    rows, a, b, ab = designs(frame)
    x, y = np.column_stack([np.ones(len(rows)), a, b, ab]), np.log(rows["salary_in_usd"].to_numpy())
    bread = np.linalg.inv(x.T @ x)
    beta = bread @ x.T @ y
    e, (n, k) = y - x @ beta, x.shape
    if covariance == "HC3":
        scores, df_resid = x * (e / (1 - np.einsum("ni,ij,nj->n", x, bread, x)))[:, None], n - k
        meat = scores.T @ scores
    else:
        scores = pd.DataFrame(x * e[:, None]).groupby(rows["job_title"].to_numpy()).sum().to_numpy()
        count = len(scores)
        meat, df_resid = scores.T @ scores * count / (count - 1) * (n - 1) / (n - k), count - 1
    v = bread @ meat @ bread
    clusters = "job_title" if covariance == "cluster" else None
    found = stats.anova(frame, typ=3, outcome="log", covariance=covariance, clusters=clusters)
    for i, chosen in enumerate(np.split(np.arange(1, k), [3, 5])):
        part = beta[chosen]
        f = part @ np.linalg.solve(v[np.ix_(chosen, chosen)], part) / len(chosen)
        assert found["F"][i] == pytest.approx(f) and found["df_resid"][i] == df_resid
        assert found["p"][i] == pytest.approx(sp.f.sf(f, len(chosen), df_resid))
    two = stats.anova(frame, typ=2, outcome="log", covariance=covariance, clusters=clusters)
    assert two["F"][2] == pytest.approx(found["F"][2])
    classical = stats.anova(frame, typ=2, outcome="log")
    assert two["sum_sq"].tolist() == pytest.approx(classical["sum_sq"].tolist())
    assert two["partial_eta_sq"].tolist() == pytest.approx(classical["partial_eta_sq"].tolist())


def test_type_three_compares_unweighted_means(frame):
    """The main effect of remote is about sums of cell means; dummies would test entry level alone."""
    frame = frame[frame["remote_ratio"] != 50]
    remote, onsite = zip(*(groups(frame, level) for level in LEVELS), strict=True)
    mse = sum(len(part) * part.var() for part in remote + onsite) / (len(frame) - 8)
    difference = sum(part.mean() for part in remote) - sum(part.mean() for part in onsite)
    f = difference**2 / (mse * sum(1 / len(part) for part in remote + onsite))
    found = stats.anova(frame, typ=3, remote=(0, 100)).set_index("term")["F"]
    assert found["remote_ratio"] == pytest.approx(f)
    data = frame.rename(columns={"salary_in_usd": "y"})
    dummies = anova_lm(ols("y ~ C(experience_level) * C(remote_ratio)", data).fit(), typ=3)
    assert dummies["F"]["C(remote_ratio)"] != pytest.approx(f, rel=0.01)


def test_statsmodels_goes_on_with_an_empty_cell_and_anova_refuses():
    """Planted: huge level effects, no interaction. statsmodels loses the first or invents the second."""
    counts = {"EN": (636, 2, 108), "MI": (1884, 4, 382), "SE": (3642, 2, 978), "EX": (186, 0, 24)}
    frame = table(counts=counts, sd=0.5)
    with pytest.warns((SingularMatrixWarning, ValueWarning)):
        fit = ols("salary_in_usd ~ C(experience_level, Sum) * C(remote_ratio, Sum)", frame).fit()
        wrong = anova_lm(fit, typ=2)
    lost = wrong["F"].iloc[:2].abs().max() < 1e-3 and wrong["PR(>F)"].iloc[:2].min() > 0.999
    assert lost or wrong["PR(>F)"].iloc[2] < 1e-3
    for covariance in ("classical", "HC3", "cluster"):
        with pytest.raises(
            ValueError, match=r"EX at remote_ratio 50: 0 .*remote=\(0, 100\).*F = 0 and p = 1"
        ):
            stats.anova(frame, covariance=covariance)
    right = stats.anova(frame, remote=(0, 100)).set_index("term")["p"]
    assert right["experience_level"] < 1e-50 and right["experience_level:remote_ratio"] > 0.01


def test_cells_too_thin_for_a_robust_covariance_are_refused(frame):
    hybrid = frame[(frame["experience_level"] == "EX") & (frame["remote_ratio"] == 50)]
    one, pair = frame.drop(hybrid.index[1:]), frame.drop(hybrid.index[2:])
    assert len(stats.anova(one)) == len(stats.anova(pair, covariance="HC3")) == 3
    with pytest.raises(ValueError, match="EX at remote_ratio 50: 1 rows, but each cell needs 2"):
        stats.anova(one, covariance="HC3")
    with pytest.raises(ValueError, match="EX at remote_ratio 50: 1 clusters"):
        stats.anova(pair, covariance="cluster")
    with pytest.raises(ValueError, match="10 clusters for 12 cells"):
        stats.anova(frame, covariance="cluster", clusters=np.arange(len(frame)) % 10)
    with pytest.raises(ValueError, match="12 rows for 12 cells"):
        stats.anova(frame.drop_duplicates(["experience_level", "remote_ratio"]))


def test_a_missing_level_is_an_error_until_it_is_left_out(frame):
    three = frame[frame["experience_level"] != "SE"]  # as load_salaries gives it, with a category to spare
    three = three.astype({"experience_level": pd.CategoricalDtype(LEVELS, ordered=True)})
    calls = [
        stats.anova,
        stats.remote_effect,
        stats.assumptions,
        lambda f, **kw: stats.equivalence(f, bound_percent=5, **kw),
        lambda f, **kw: stats.resampled_effect(f, np.random.default_rng(0), num=9, **kw),
        lambda f, **kw: stats.permuted_interaction(f, np.random.default_rng(0), num=9, **kw),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="SE at remote_ratio 0: 0 rows.*levels=..."):
            call(three)
        found, expected = (call(f, levels=("EN", "MI", "EX")) for f in (three, frame))
        if isinstance(found, pd.DataFrame):
            pd.testing.assert_frame_equal(found, expected)
        else:
            assert found == expected


@pytest.mark.parametrize("remote", [100, 50])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("test", ["welch", "student"])
def test_remote_effect_against_scipy(frame, test, log, remote):
    found = stats.remote_effect(frame, test=test, outcome="log" if log else "usd", remote=remote, alpha=0.1)
    for row in found.itertuples():
        x, y = groups(frame, row.experience_level, log, remote)
        expected = sp.ttest_ind(x, y, equal_var=test == "student")
        assert (row.n_remote, row.n_onsite) == (len(x), len(y))
        assert (row.t, row.df, row.p) == pytest.approx((expected.statistic, expected.df, expected.pvalue))
        ends = np.array([x.mean() - y.mean(), *expected.confidence_interval(0.9)])
        percent = 100 * np.expm1(ends) if log else 100 * ends / y.mean()
        assert (row.percent, row.percent_low, row.percent_high) == pytest.approx(tuple(percent))
        pay = groups(frame, row.experience_level, False, remote)
        means = [sp.gmean(part) if log else part.mean() for part in pay]
        assert [row.mean_remote, row.mean_onsite] == pytest.approx(means)
        assert row.percent == pytest.approx(100 * (means[0] / means[1] - 1))
        hedges, _ = effectsize_smd(x.mean(), x.std(ddof=1), len(x), y.mean(), y.std(ddof=1), len(y))
        pooled = np.sqrt(
            ((x - x.mean()) @ (x - x.mean()) + (y - y.mean()) @ (y - y.mean())) / (len(x) + len(y) - 2)
        )
        assert (row.g, row.d) == pytest.approx((hedges, (x.mean() - y.mean()) / pooled))


def test_adjusted_p_values_by_hand(frame):
    found = stats.remote_effect(frame)
    order = np.argsort(found["p"])
    p = found["p"].to_numpy()[order]
    holm = np.minimum(1, np.maximum.accumulate(p * [4, 3, 2, 1]))
    bh = np.minimum.accumulate((p * 4 / [1, 2, 3, 4])[::-1])[::-1]
    np.testing.assert_allclose(found["p_holm"].to_numpy()[order], holm)
    np.testing.assert_allclose(found["p_bh"].to_numpy()[order], bh)


def test_simple_effects_share_the_variance_of_the_anova(frame):
    two = frame[frame["remote_ratio"] != 50].assign(
        cell=lambda f: f["experience_level"] + f["remote_ratio"].astype(str)
    )
    fit = ols("salary_in_usd ~ 0 + cell", two).fit()
    for row in stats.remote_effect(frame, test="pooled").itertuples():
        level = row.experience_level
        expected = fit.t_test(f"cell[{level}100] - cell[{level}0] = 0")
        assert (row.t, row.df) == pytest.approx((expected.tvalue.item(), fit.df_resid))


def test_clustered_effect_by_hand(frame):
    """CR1 of a difference of means: sums of residuals over the adverts, divided by the group sizes."""
    for row in stats.remote_effect(frame, test="cluster").itertuples():
        x, y = groups(frame, row.experience_level)
        scores = [(part - part.mean()).reshape(-1, 2).sum(1) / len(part) for part in (x, y)]
        n, count = len(x) + len(y), (len(x) + len(y)) // 2
        square = sum(score @ score for score in scores) * count / (count - 1) * (n - 1) / (n - 2)
        assert (row.se, row.df) == pytest.approx((np.sqrt(square), count - 1))
        assert row.p == pytest.approx(2 * sp.t.sf(abs(x.mean() - y.mean()) / row.se, count - 1))


def test_clusters_as_column_and_as_array_agree(frame):
    by_name = stats.remote_effect(frame, test="cluster", clusters="job_title")
    by_array = stats.remote_effect(frame, test="cluster", clusters=frame["job_title"].to_numpy())
    pd.testing.assert_frame_equal(by_name, by_array)
    shuffled = frame.sample(frac=1, random_state=0)  # its neighbours are strangers
    ids = pd.Series(stats.pair_ids(frame), frame.index)[shuffled.index]
    pd.testing.assert_frame_equal(
        stats.remote_effect(shuffled, test="cluster", clusters=ids),
        stats.remote_effect(frame, test="cluster"),
    )


def test_pairs_make_welch_too_sure_and_clustering_right():
    """Without any effect 5% of the tests should reject; two rows of one advert are not two observations."""
    rejected = {"welch": 0, "cluster": 0}
    for seed in range(150):
        null = table(seed, counts={"EN": (60, 0, 40)}, sd=0.1, pair_sd=0.4)
        for test in rejected:
            p = stats.remote_effect(null, test=test, outcome="log", levels=("EN",))["p"][0]
            rejected[test] += p < 0.05
    assert rejected["welch"] > 17 and 1 <= rejected["cluster"] <= 15  # 7.5 expected; 17 has p < 0.001


def test_planted_effects_are_found():
    percent = {"EN": 20, "MI": -15, "SE": 0, "EX": 10}
    frame = table(1, counts=dict.fromkeys(LEVELS, (400, 0, 300)), percent=percent, sd=0.2)
    for outcome in ("usd", "log"):
        found = stats.remote_effect(frame, outcome=outcome, alpha=0.001)
        truth = found["experience_level"].map(percent)
        assert ((found["percent_low"] < truth) & (truth < found["percent_high"])).all()
        assert stats.anova(frame, outcome=outcome, remote=(0, 100))["p"][2] < 1e-20
    assert found["p_holm"][2] > 0.05 > found["p_holm"].drop(2).max()


@pytest.mark.parametrize(("test", "variances"), [("welch", "unequal"), ("student", "pooled")])
@pytest.mark.parametrize("outcome", ["usd", "log"])
def test_equivalence_against_statsmodels(frame, outcome, test, variances):
    found = stats.equivalence(frame, bound_percent=12, outcome=outcome, test=test)
    for row in found.itertuples():
        x, y = groups(frame, row.experience_level, outcome == "log")
        bound = np.log(1.12) if outcome == "log" else 0.12 * y.mean()
        p, *_ = ttost_ind(x, y, -bound, bound, usevar=variances)
        assert row.p == pytest.approx(p)
        if outcome == "usd":
            low, high = CompareMeans(DescrStatsW(x), DescrStatsW(y)).tconfint_diff(0.1, usevar=variances)
            assert (row.percent_low, row.percent_high) == pytest.approx(
                (100 * low / y.mean(), 100 * high / y.mean())
            )
            assert (max(abs(row.percent_low), abs(row.percent_high)) < 12) == (row.p < 0.05)
    assert stats.equivalence(frame, bound_percent=90)["equivalent"].all()
    assert not stats.equivalence(frame, bound_percent=0.1)["equivalent"].any()


def test_permutation_is_exact_on_few_rows():
    """All 210 ways of choosing four of ten rows; the groups differ in size, so |t| is not |m1 - m0|."""
    frame = table(6, counts={"EN": (6, 0, 4)}, percent={"EN": 20})
    x, y = groups(frame, "EN")
    pay, t = np.concatenate([x, y]), []
    for chosen in itertools.combinations(range(10), 4):
        rest = [i for i in range(10) if i not in chosen]
        t.append(sp.ttest_ind(pay[list(chosen)], pay[rest], equal_var=False).statistic)
    t, seen = np.array(t), sp.ttest_ind(x, y, equal_var=False).statistic
    tails = (t >= seen - 1e-9).mean(), (t <= seen + 1e-9).mean()
    found = stats.resampled_effect(frame, np.random.default_rng(0), levels=("EN",))["p"][0]
    assert found == pytest.approx(min(1, 2 * min(tails)))


@pytest.mark.parametrize("average", ["mean", "geometric", "median"])
def test_resampled_effect_against_theory(frame, average):
    found = stats.resampled_effect(frame, np.random.default_rng(0), average=average, num=1999)
    again = stats.resampled_effect(frame, np.random.default_rng(0), average=average, num=1999)
    pd.testing.assert_frame_equal(found, again)
    outcome = "log" if average == "geometric" else "usd"
    for row, t in zip(
        found.itertuples(), stats.remote_effect(frame, outcome=outcome).itertuples(), strict=True
    ):
        x, y = groups(frame, row.experience_level)
        middle = {"mean": np.mean, "geometric": sp.gmean, "median": np.median}[average]
        assert row.percent == pytest.approx(100 * (middle(x) / middle(y) - 1))
        assert row.percent_low < row.percent < row.percent_high
        if average == "median":
            continue
        assert row.p == pytest.approx(t.p, abs=0.04)
        v1, v0, ratio = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y), x.mean() / y.mean()
        width = 2 * 1.96 * 100 * np.sqrt(v1 + ratio**2 * v0) / y.mean()  # the delta method
        if average == "geometric":
            width = t.percent_high - t.percent_low
        assert row.percent_high - row.percent_low == pytest.approx(width, rel=0.2)


def test_permuted_interaction_against_a_loop(frame):
    """Freedman and Lane as written: add shuffled residuals to the fit, then compare nested models."""
    found = stats.permuted_interaction(frame, np.random.default_rng(5), num=60)
    rows, a, b, ab = designs(frame.sort_values(["experience_level", "remote_ratio"], key=rank, kind="stable"))
    y = rows["salary_in_usd"].to_numpy(float)
    x = np.column_stack([np.ones(len(y)), a, b])
    fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    rng, f = np.random.default_rng(5), []
    for i in range(61):
        star = fitted + (rng.permutation(y - fitted) if i else y - fitted)
        full = rss(star, a, b, ab)
        f.append((rss(star, a, b) - full) / 6 / (full / (len(y) - 12)))
    assert found == pytest.approx({"F": f[0], "p": np.mean(np.array(f) >= f[0])})
    assert found["F"] == pytest.approx(stats.anova(frame)["F"][2])
    assert 1 < sum(np.array(f) >= f[0]) < 61 or found["p"] == pytest.approx(1 / 61)


def rank(column):
    return (
        column.map({level: i for i, level in enumerate(LEVELS)})
        if column.name == "experience_level"
        else column
    )


def test_permuted_interaction_agrees_with_f_under_the_null():
    frame = table(2)
    found = stats.permuted_interaction(frame, np.random.default_rng(0), outcome="log", num=1999)
    assert found["p"] == pytest.approx(stats.anova(frame, outcome="log")["p"][2], abs=0.05)


def test_assumptions_against_scipy(frame):
    found = stats.assumptions(frame).set_index("outcome")
    for outcome in ("usd", "log"):
        parts = [part for level in LEVELS for part in groups(frame, level, outcome == "log")]
        row, e = found.loc[outcome], np.concatenate([part - part.mean() for part in parts])
        w = sp.f_oneway(*(np.abs(part - np.median(part)) for part in parts))  # Brown and Forsythe
        assert (row["levene_W"], row["levene_p"]) == pytest.approx((w.statistic, w.pvalue))
        sd = [part.std(ddof=1) for part in parts]
        assert row["sd_ratio"] == pytest.approx(max(sd) / min(sd)) and row["n"] == len(e)
        z = (e - e.mean()) / e.std()
        assert (row["skew"], row["excess_kurtosis"]) == pytest.approx(((z**3).mean(), (z**4).mean() - 3))
    assert stats.assumptions(frame, remote=REMOTE)["n"][0] == len(frame)
    assert found["skew"]["usd"] > found["skew"]["log"]  # pay is planted as log-normal


def test_what_four_published_results_imply():
    """The article's percentages and p-values; four "different" effects are not shown to differ."""
    percent = {"EN": 8.0, "MI": -8.5, "SE": -3.5, "EX": 4.6}
    p = {"EX": 0.61, "EN": 0.20, "MI": 0.003, "SE": 0.05}
    found, test = stats.interaction_from_summary(percent, p)
    assert found["p_holm"].tolist() == pytest.approx([0.40, 0.012, 0.15, 0.61])
    assert found["percent_low"].tolist() == pytest.approx([-4.235, -14.114, -7.0, -13.076], abs=0.001)
    assert found["percent_high"].tolist() == pytest.approx([20.235, -2.886, 0.0, 22.276], abs=0.001)
    assert test == pytest.approx({"Q": 7.1506, "df": 3, "p": 0.0672}, abs=1e-4)


def test_two_published_results_are_a_z_test():
    _, test = stats.interaction_from_summary({"EN": 10, "EX": -4}, {"EN": 0.02, "EX": 0.3})
    se = [10 / sp.norm.isf(0.01), 4 / sp.norm.isf(0.15)]
    assert test["Q"] == pytest.approx(14**2 / (se[0] ** 2 + se[1] ** 2)) and test["df"] == 1
    assert test["p"] == pytest.approx(2 * sp.norm.sf(np.sqrt(test["Q"])))


@pytest.mark.parametrize(
    ("percent", "p"),
    [
        ({"EN": 1}, {"EN": 0.5}),
        ({"EN": 1, "MI": 2}, {"EN": 0.5, "EX": 0.5}),
        ({"EN": 0, "MI": 2}, {"EN": 0.9, "MI": 0.5}),
    ],
)
def test_published_results_that_do_not_tell(percent, p):
    with pytest.raises(ValueError, match=r"two levels or more"):
        stats.interaction_from_summary(percent, p)


BAD = {
    "typ=4: choose one of 1, 2, 3": lambda f: stats.anova(f, typ=4),
    "outcome='eur': choose one of 'usd', 'log'": lambda f: stats.anova(f, outcome="eur"),
    "covariance='HC3': choose one of 'classical'": lambda f: stats.anova(f, typ=1, covariance="HC3"),
    "order=": lambda f: stats.anova(f, order=("remote_ratio",)),
    "test='paired'": lambda f: stats.remote_effect(f, test="paired"),
    "remote=0: choose one of 50, 100": lambda f: stats.remote_effect(f, remote=0),
    "clusters with 'welch'": lambda f: stats.remote_effect(f, clusters="job_title"),
    "average='mode'": lambda f: stats.resampled_effect(f, np.random.default_rng(0), average="mode"),
    "bound_percent=0": lambda f: stats.equivalence(f, bound_percent=0),
    "every row needs a positive": lambda f: stats.anova(f.assign(salary_in_usd=-1)),
    "and one cluster": lambda f: stats.remote_effect(f, test="cluster", clusters=[1, 2]),
    "pay does not vary": lambda f: stats.remote_effect(f.assign(salary_in_usd=9)),
    "EN at remote_ratio 0: 0 rows": lambda f: stats.anova(f.iloc[:0]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_say_what_to_do(frame, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        BAD[message](frame)
