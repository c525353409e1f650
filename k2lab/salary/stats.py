"""Does remote work pay differently at each experience level? Tests, intervals, effect sizes.

A frame has data.COLUMNS, newest rows first; an effect compares one `remote_ratio` with on-site (0). Most rows
come in pairs, top and bottom of one advert's band, so rows are not independent: what takes `clusters` can
allow for that (None means `pair_ids(frame)`, a string a column, else one id per row). `outcome` is "usd" or
"log", the natural logarithm. p-values are two-sided, p_holm and p_bh adjusted over the levels (Holm 1979,
Benjamini and Hochberg 1995), intervals 95% unless `alpha` says otherwise. Rows outside `levels` and `remote`
are left out. A bad argument, or a cell with too few rows, raises `ValueError`.
"""

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from k2lab.salary.data import COLUMNS, LEVELS, REMOTE

FACTORS = ("experience_level", "remote_ratio")


def cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Return n, mean_usd, sd_usd and median_usd of the 12 cells, level by remote ratio, empty ones too."""
    salary = frame.groupby(list(FACTORS), observed=True)["salary_in_usd"]
    table = salary.agg(n="size", mean_usd="mean", sd_usd="std", median_usd="median")
    table = table.reindex(pd.MultiIndex.from_product([LEVELS, REMOTE], names=FACTORS))
    return table.assign(n=table["n"].fillna(0).astype(int)).reset_index()


def pair_ids(frame: pd.DataFrame) -> np.ndarray:
    """Number the adverts: a row joins the one before if all but the salary is equal and that one is alone.

    A run of m equal rows makes ceil(m / 2) adverts. Needs the file's own order: number first, then filter.
    """
    same = [name for name in COLUMNS if name not in ("salary", "salary_in_usd")]
    codes, row = [pd.factorize(frame[name])[0] for name in same], np.arange(len(frame))
    first = np.append(True, np.diff(codes).any(0))
    return ((row - np.maximum.accumulate(row * first)) % 2 == 0).cumsum() - 1


def pair_share(frame: pd.DataFrame) -> float:
    """Return the share of the rows that are in a pair of `pair_ids`, in [0, 1]."""
    return 2 * float((np.bincount(pair_ids(frame)) == 2).sum()) / len(frame)


def anova(
    frame: pd.DataFrame,
    *,
    typ: int = 2,
    outcome: str = "usd",
    covariance: str = "classical",
    clusters=None,
    remote=REMOTE,
    levels=LEVELS,
    order=FACTORS,
) -> pd.DataFrame:
    """Analyse the variance of salary by level, remote ratio and their interaction, one row per term.

    y = X b + e, X with sum-to-zero contrasts. A term is a hypothesis L b = 0 of df rows, tested by
    F = (L b)' (L V L')^-1 (L b) / df on (df, df_resid), Wald's. `typ` chooses L: 1 adds the terms in `order`;
    2 adjusts each main effect for the other, not for the interaction; 3 compares unweighted means of the
    cells, which needs these contrasts (with dummies it would test the reference level alone). The three
    share the interaction. `covariance` chooses V: "classical" s^2 (X'X)^-1, the textbook's F; "HC3" for
    unequal variances (MacKinnon and White 1985); "cluster" CR1, with df_resid = clusters - 1; the last two
    for types 2 and 3, where in type 2 "adjusted" is in the metric of V, as in statsmodels and R's car.
    sum_sq and partial_eta_sq = sum_sq / (sum_sq + residual sum_sq) are always the classical ones.

    An empty cell is an error, with the reasons in its message.
    """
    choose(typ=(typ, 1, 2, 3), order=(tuple(order), FACTORS, FACTORS[::-1]))
    choose(covariance=(covariance, "classical", "HC3", "cluster")[: 2 if typ == 1 else 4])
    data = _select(frame, outcome, levels, remote, 1 + (covariance != "classical"), clusters, covariance)
    model = ols("y ~ " + " * ".join(f"C({name}, Sum)" for name in order), data)
    classical, fit = model.fit(), model.fit(**_robust(covariance, data))
    table = anova_lm(classical, typ=typ)[["sum_sq", "df"]]
    table[["F", "p"]] = anova_lm(fit, typ=typ)[["F", "PR(>F)"]]
    table.insert(2, "df_resid", getattr(fit, "df_resid_inference", fit.df_resid))
    table["partial_eta_sq"] = table["sum_sq"] / (table["sum_sq"] + classical.ssr)
    table.index = table.index.str.replace(r"C\((\w+), Sum\)", r"\1", regex=True)
    table = table.drop(["Intercept", "Residual"], errors="ignore").rename_axis("term").reset_index()
    return table.astype({"df": int, "df_resid": int})


def remote_effect(
    frame: pd.DataFrame, *, test="welch", outcome="usd", clusters=None, remote=100, levels=LEVELS, alpha=0.05
) -> pd.DataFrame:
    """Compare the mean pay of `remote` with on-site within each level: t test, interval, effect size.

    t = difference / se on df degrees of freedom, difference = m1 - m0 of the means of the outcome. `test`:
    "welch" unequal variances, Satterthwaite's df; "student" equal ones, n0 + n1 - 2; "pooled" one variance
    for all cells used, the simple effects of the ANOVA; "cluster" CR1, clusters - 1. percent is
    100 (m1 / m0 - 1) in usd and 100 (exp(difference) - 1), of geometric means, in log. Its interval is in
    log the t interval, mapped alike; in usd 100 (difference -+ t se) / m0, which takes m0 as known, so that
    it excludes 0 exactly when p < alpha (the delta method would use se^2 = v1 + (m1 / m0)^2 v0 instead of
    v1 + v0). Cohen's d = difference / pooled SD; Hedges' g = (1 - 3 / (4 (n0 + n1) - 9)) d.
    """
    choose(test=(test, "welch", "student", "pooled", "cluster"), remote=(remote, *REMOTE[1:]))
    data = _select(frame, outcome, levels, (0, remote), 2, clusters, test)
    cell = data.groupby("cell")["y"]
    (n0, n1), (m0, m1), (s0, s1) = (cell.agg(f).to_numpy().reshape(-1, 2).T for f in ("size", "mean", "var"))
    square, df = (n0 - 1) * s0 + (n1 - 1) * s1, n0 + n1 - 2
    if not (square > 0).all():
        raise ValueError("at some level pay does not vary within the groups: leave it out (levels=...)")
    sd, unit = np.sqrt(square / df), np.sqrt(1 / n0 + 1 / n1)
    d, g, se = (m1 - m0) / sd, (1 - 3 / (4 * df - 1)) * (m1 - m0) / sd, sd * unit
    if test == "welch":
        v0, v1 = s0 / n0, s1 / n1
        se, df = np.sqrt(v0 + v1), (v0 + v1) ** 2 / (v0**2 / (n0 - 1) + v1**2 / (n1 - 1))
    elif test == "pooled":
        se, df = unit * np.sqrt(square.sum() / df.sum()), np.full(len(df), df.sum())
    elif test == "cluster":
        parts = [part for _, part in data.groupby(data["cell"] // 2)]
        fits = [ols("y ~ C(remote_ratio)", part).fit(**_robust(test, part)) for part in parts]
        se, df = np.transpose([(fit.bse.iloc[1], fit.df_resid_inference) for fit in fits])
    mean = np.exp if outcome == "log" else np.asarray
    sizes = {"n_onsite": n0, "n_remote": n1, "mean_onsite": mean(m0), "mean_remote": mean(m1), "d": d, "g": g}
    return effects(levels, m1 - m0, se, df, None if outcome == "log" else 100 / m0, alpha, **sizes)


def equivalence(frame: pd.DataFrame, *, bound_percent: float, alpha: float = 0.05, **kwargs) -> pd.DataFrame:
    """Test within each level that the effect is below `bound_percent` in size: two one-sided t tests (TOST).

    p is the larger of theirs, P(T < (|difference| - b) / se) with Student's t; b is bound_percent of the
    on-site mean, taken as known, in usd, and log(1 + bound_percent / 100) in log (Schuirmann 1987). The
    interval is of 1 - 2 alpha; `equivalent` is p_holm < alpha. kwargs are those of `remote_effect`.
    """
    if not bound_percent > 0:
        raise ValueError(f"bound_percent={bound_percent}: give the smallest percentage that matters, above 0")
    table, share = remote_effect(frame, alpha=2 * alpha, **kwargs), bound_percent / 100
    bound = np.log1p(share) if kwargs.get("outcome") == "log" else share * table["mean_onsite"]
    p = stats.t.cdf((table["difference"].abs() - bound) / table["se"], table["df"])
    table = adjusted(table.drop(columns=["t", "d", "g"]).assign(bound_percent=bound_percent, p=p))
    return table.assign(equivalent=table["p_holm"] < alpha)


def resampled_effect(
    frame: pd.DataFrame, rng: np.random.Generator, *, average="mean", num=999, remote=100, levels=LEVELS
) -> pd.DataFrame:
    """Return each level's effect in percent with a bootstrap interval and a permutation p-value.

    average: the "mean", "median" or "geometric" mean A of pay. The interval has the bootstrap's percentiles
    of 100 (A1 / A0 - 1), each group resampled by itself. The permutation shuffles who is remote and compares
    Welch's t, which stays valid under unequal variances (Janssen 1997), or the difference of the medians,
    which need not. Both take rows as independent and draw `num` times.
    """
    choose(average=(average, "mean", "median", "geometric"), remote=(remote, *REMOTE[1:]))
    data = _select(frame, "log" if average == "geometric" else "usd", levels, (0, remote), 2)
    middle = np.median if average == "median" else np.mean

    def percent(x, y, axis):
        x, y = middle(x, axis=axis), middle(y, axis=axis)
        return 100 * (np.expm1(x - y) if average == "geometric" else x / y - 1)

    def distance(x, y, axis):
        se = 1 if average == "median" else np.hypot(stats.sem(x, axis), stats.sem(y, axis))
        return (middle(x, axis=axis) - middle(y, axis=axis)) / se

    rows = []
    for _, part in data.groupby(data["cell"] // 2):
        both = [part["y"][part["remote_ratio"] == ratio].to_numpy() for ratio in (remote, 0)]
        options = {"n_resamples": num, "batch": 1 + 10**6 // len(part), "vectorized": True, "rng": rng}
        low, high = stats.bootstrap(both, percent, method="percentile", **options).confidence_interval
        p = stats.permutation_test(both, distance, **options).pvalue
        rows.append((percent(*both, 0), low, high, p))
    table = pd.DataFrame(rows, columns=["percent", "percent_low", "percent_high", "p"])
    table.insert(0, "experience_level", levels)
    return adjusted(table)


def permuted_interaction(
    frame: pd.DataFrame, rng: np.random.Generator, *, outcome="usd", num=999, remote=REMOTE, levels=LEVELS
) -> dict:
    """Return {"F", "p"} of the interaction, p by shuffling the residuals e of the model without it.

    A shuffle needs only its cell sums S: with n the counts, z = S / sqrt(n) and Q an orthonormal basis of the
    additive model's columns, the interaction's sum of squares is |z|^2 - |Q'z|^2 and the residual's
    |e|^2 - |z|^2. p = (1 + #{F* >= F}) / (1 + num) takes errors as exchangeable: neither pairs nor unequal
    variances (Freedman and Lane 1983).
    """
    data = _select(frame, outcome, levels, remote).sort_values("cell", kind="stable")
    model, n = ols("y ~ C(experience_level) + C(remote_ratio)", data), np.bincount(data["cell"])
    e, start = model.fit().resid.to_numpy(), n.cumsum() - n
    q = np.linalg.qr(np.sqrt(n)[:, None] * model.exog[start])[0]
    draws = (rng.permutation(e) if i else e for i in range(num + 1))
    z = np.stack([np.add.reduceat(draw, start) for draw in draws]) / np.sqrt(n)
    between, additive = (z**2).sum(1), ((z @ q) ** 2).sum(1)
    f = (between - additive) / (len(n) - q.shape[1]) / (e @ e - between) * (len(e) - len(n))
    return {"F": float(f[0]), "p": float((f >= f[0] * (1 - 1e-9)).mean())}


def assumptions(frame: pd.DataFrame, *, remote=(0, 100), levels=LEVELS) -> pd.DataFrame:
    """Measure how far usd and log, one row each, depart from what an ANOVA assumes.

    levene_W, levene_p: Brown and Forsythe's test of equal variances, about the cells' medians; sd_ratio: the
    largest over the smallest SD of a cell; skew and excess_kurtosis of the residuals from the cells' means.
    """
    rows = []
    for outcome in ("usd", "log"):
        cell = _select(frame, outcome, levels, remote, 2).groupby("cell")["y"]
        w, p = stats.levene(*(y for _, y in cell), center="median")
        e, sd = cell.transform(lambda y: y - y.mean()), cell.std()
        row = {"outcome": outcome, "n": len(e), "levene_W": w, "levene_p": p, "sd_ratio": sd.max() / sd.min()}
        rows.append(row | {"skew": stats.skew(e), "excess_kurtosis": stats.kurtosis(e)})
    return pd.DataFrame(rows)


def interaction_from_summary(percent: dict, p: dict) -> tuple[pd.DataFrame, dict]:
    """Return what published effects and p-values, by level, imply: a row per level, and {"Q", "df", "p"}.

    se_i = |percent_i| / z(1 - p_i / 2); Cochran's Q = sum_i (percent_i - m)^2 / se_i^2, m the mean weighted
    by 1 / se_i^2, is chi-squared on levels - 1 if all effects are equal. An approximation: normal and
    independent effects, on-site means taken as known. No percent may be 0, and each p lies in (0, 1).
    """
    x, p = (pd.Series(values, dtype=float) for values in (percent, p))
    if len(x) < 2 or not ((x != 0) & (p > 0) & (p < 1)).all():
        raise ValueError(f"percent={percent}, p={dict(p)}: two levels or more, no percent of 0, p in (0, 1)")
    p = p[x.index]
    se, df = x.abs() / stats.norm.isf(p / 2), len(x) - 1
    q = float((((x - np.average(x, weights=se**-2)) / se) ** 2).sum())
    return effects(x.index, x, se, np.inf, 1), {"Q": q, "df": df, "p": float(stats.chi2.sf(q, df))}


def effects(levels, difference, se, df, unit=None, alpha=0.05, **columns) -> pd.DataFrame:
    """Return a row per level: columns, then percent with its t interval, the t test of 0 and adjusted p.

    percent is difference * unit, or 100 (exp(difference) - 1) without a unit; df = inf is the normal law.
    """
    difference, se = np.asarray(difference), np.asarray(se)
    half, t = stats.t.isf(alpha / 2, df) * se, difference / se
    ends = {"percent": difference, "percent_low": difference - half, "percent_high": difference + half}
    ends = {name: 100 * np.expm1(end) if unit is None else end * unit for name, end in ends.items()}
    rest = {"difference": difference, "se": se, "df": df, "t": t, "p": 2 * stats.t.sf(np.abs(t), df)}
    return adjusted(pd.DataFrame({"experience_level": list(levels)} | columns | ends | rest))


def adjusted(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with p_holm and p_bh, its p adjusted over its rows.

    Holm by hand: statsmodels' multipletests collects all garbage at each call, 20 ms in a simulation.
    """
    p = table["p"].to_numpy()
    rank = p.argsort(kind="stable")  # the smallest of k times k, the next one times k - 1, ..., never falling
    holm = np.minimum(1, np.maximum.accumulate(p[rank] * np.arange(len(p), 0, -1)))[rank.argsort()]
    return table.assign(p_holm=holm, p_bh=stats.false_discovery_control(p))


def choose(**choices):
    """Refuse a value, the first of its tuple, that is none of the others."""
    for name, (value, *allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")


def _robust(covariance, data):
    """Return the options of statsmodels' `fit` for a covariance."""
    if covariance == "cluster":
        return {"cov_type": "cluster", "cov_kwds": {"groups": data["cluster"]}, "use_t": True}
    return {} if covariance == "classical" else {"cov_type": covariance, "use_t": True}


def _select(frame, outcome, levels, remote, least=1, clusters=None, covariance=""):
    """Return y, factors, cell (by level, then ratio) and cluster (else row) of the cells, if none is thin."""
    choose(outcome=(outcome, "usd", "log"))
    data = frame[list(FACTORS)].reset_index(drop=True).astype({FACTORS[0]: str})
    y, ids, unit = frame["salary_in_usd"].to_numpy(float), data.index, "rows"
    if covariance == "cluster":
        clusters = pair_ids(frame) if clusters is None else clusters
        ids, unit = frame[clusters] if isinstance(clusters, str) else clusters, "clusters"
    elif clusters is not None:
        raise ValueError(f"clusters with {covariance!r}: choose 'cluster', or leave them out")
    ids = pd.factorize(np.asarray(ids))[0]
    if len(ids) != len(y) or (ids < 0).any() or not (y > 0).all():
        raise ValueError("every row needs a positive salary_in_usd and one cluster")
    index = pd.MultiIndex.from_product([levels, remote])
    cell = index.get_indexer(pd.MultiIndex.from_frame(data))
    data = data.assign(y=np.log(y) if outcome == "log" else y, cluster=ids, cell=cell)[cell >= 0]
    counts = data.groupby("cell")["cluster"].nunique().reindex(range(len(index)), fill_value=0)
    if thin := [
        f"{index[i][0]} at remote_ratio {index[i][1]}: {n} {unit}" for i, n in counts.items() if n < least
    ]:
        raise ValueError(
            f"{', '.join(thin)}, but each cell needs {least} or more: leave its column out, as in "
            "remote=(0, 100), or its level (levels=...), or test within levels (remote_effect). An empty "
            "cell takes a rank from the design; statsmodels' anova_lm goes on and prints F = 0 and p = 1 for "
            "main effects or an interaction that is not there, depending on type, contrasts and counts"
        )
    if (units := data["cluster"].nunique()) <= len(index):
        raise ValueError(f"{units} {unit} for {len(index)} cells leave no degrees of freedom: add some")
    return data
