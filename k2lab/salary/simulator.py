"""A model of log pay in plain numbers: fit it here, evaluate it here or on a web page."""

import math

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.regression.linear_model import OLS

from k2lab.salary.data import LEVELS
from k2lab.salary.stats import cells, choose, effects, pair_ids

COVARIATES = {"year": "work_year", "title": "job_title", "region": "company_location"}
COVARIATES |= {"size": "company_size", "type": "employment_type"}


def fit_simulator(frame: pd.DataFrame, *, covariates=("title", "region"), top_titles=12, min_rows=10) -> dict:
    """Fit log(salary_in_usd) = a[level, remote] + sum_k c_k[value of covariate k] + e, in plain numbers.

    covariates are year, title (the `top_titles` most common, else "other"), region (of the company: "US" or
    "other"), size and type. The most common value of each is the reference, which has no term. Cells of
    fewer than `min_rows` rows are left out. The keys of the result are

    terms, coefficients, covariance  of least squares, CR1 over the adverts of `pair_ids`
    residual_sd, smearing            s, and the mean of exp(e) (Duan 1983)
    df, t                            adverts - 1, and the 97.5% quantile of Student's t on it
    values, rows                     each covariate's values, the reference first; the rows of all 12 cells

    Raises `ValueError` for an unknown covariate, without any cell to fit, and for covariates that determine
    each other.
    """
    for name in covariates:
        choose(covariates=(name, *COVARIATES))
    rows = {f"{row.experience_level}:{row.remote_ratio}": row.n for row in cells(frame).itertuples()}
    cell = frame["experience_level"].astype(str) + ":" + frame["remote_ratio"].astype(str)
    keep = cell.map(rows).to_numpy() >= min_rows
    if min_rows < 3 or not keep.any():  # a cell of one advert would seem to have no error
        raise ValueError(f"min_rows={min_rows}: 3 or more, and no more than the largest cell of {rows}")
    values = {name: _values(frame[keep], name, top_titles) for name in covariates}
    dummies = [pd.get_dummies(v, prefix=name, prefix_sep=" ").iloc[:, 1:] for name, v in values.items()]
    design = pd.concat([pd.get_dummies(cell[keep]), *dummies], axis=1).astype(float)
    if (rank := np.linalg.matrix_rank(design.T @ design, hermitian=True)) < design.shape[1]:
        raise ValueError(f"covariates={covariates}: {design.shape[1]} terms of rank {rank}, leave one out")
    log, groups = np.log(frame["salary_in_usd"][keep]), {"groups": pair_ids(frame)[keep]}
    fit = OLS(log, design).fit(cov_type="cluster", cov_kwds=groups, use_t=True)
    return {
        "terms": list(design),
        "coefficients": fit.params.tolist(),
        "covariance": fit.cov_params().to_numpy().tolist(),
        "residual_sd": math.sqrt(fit.mse_resid),
        "smearing": float(np.exp(fit.resid).mean()),
        "df": int(fit.df_resid_inference),
        "t": float(stats.t.isf(0.025, fit.df_resid_inference)),
        "values": {name: v.cat.categories.tolist() for name, v in values.items()},
        "rows": rows,
    }


def predict(model: dict, *, level: str, remote: int, **values) -> dict:
    """Evaluate a `fit_simulator` at a cell and at values of its covariates, the references by default.

    With v the sum of the terms, V its variance and t, s, smearing of the model:

    typical_usd, _low, _high     exp(v), a median, and exp(v -+ t sqrt(V)), its 95% interval
    job_low_usd, job_high_usd    exp(v -+ t sqrt(V + s^2)), where 95% of the single salaries fall
    mean_usd                     smearing exp(v), the expected salary
    remote_percent, _low, _high  100 (exp(a[level, remote] - a[level, 0]) - 1) and its 95% interval
    rows, rows_onsite            the rows of the two cells

    Raises `ValueError` for a cell that is not in the model, or has no on-site cell, and for unknown values.
    """
    effect, se = _contrast(model, level, remote)
    choose(**{name: (values.get(name, known[0]), *known) for name, known in model["values"].items()})
    if unknown := values.keys() - model["values"].keys():
        raise ValueError(
            f"{sorted(unknown)}: not in this model, whose covariates are {list(model['values'])}"
        )
    chosen = {f"{name} {values.get(name, known[0])}" for name, known in model["values"].items()}
    used = [i for i, term in enumerate(model["terms"]) if term in chosen | {f"{level}:{remote}"}]
    v, t = sum(model["coefficients"][i] for i in used), model["t"]
    variance = sum(model["covariance"][i][j] for i in used for j in used)
    half, job = t * math.sqrt(variance), t * math.sqrt(variance + model["residual_sd"] ** 2)
    ends = {"typical_usd": 0, "typical_low_usd": -half, "typical_high_usd": half}
    ends |= {"job_low_usd": -job, "job_high_usd": job, "mean_usd": math.log(model["smearing"])}
    moved = {"remote_percent": 0, "remote_low": -t * se, "remote_high": t * se}
    result = {name: math.exp(v + end) for name, end in ends.items()}
    result |= {name: 100 * math.expm1(effect + end) for name, end in moved.items()}
    return result | {"rows": model["rows"][f"{level}:{remote}"], "rows_onsite": model["rows"][f"{level}:0"]}


def adjusted_effect(
    frame: pd.DataFrame,
    *,
    covariates=tuple(COVARIATES),
    top_titles=60,
    min_rows=10,
    remote=100,
    levels=LEVELS,
) -> pd.DataFrame:
    """Return each level's effect at equal covariates, 100 (exp(a[level, remote] - a[level, 0]) - 1) percent.

    The model, its other arguments and its errors are those of `fit_simulator`. With few rows and many titles
    a level is overfitted: read n_remote first.
    """
    model = fit_simulator(frame, covariates=covariates, top_titles=top_titles, min_rows=min_rows)
    difference, se = np.transpose([_contrast(model, level, remote) for level in levels])
    n0, n1 = ([model["rows"][f"{level}:{ratio}"] for level in levels] for ratio in (0, remote))
    return effects(levels, difference, se, model["df"], n_onsite=n0, n_remote=n1)


def _values(frame, name, top_titles):
    """Return a covariate as a Categorical, the most common value first."""
    values = frame[COVARIATES[name]]
    if name in ("title", "region"):
        kept = values.value_counts().index[:top_titles] if name == "title" else ["US"]
        values = values.where(values.isin(kept), "other")
    return values.astype(pd.CategoricalDtype(values.value_counts().index))


def _contrast(model, level, remote):
    """Return a[level, remote] - a[level, 0] and its standard error."""
    for cell in (f"{level}:{remote}", f"{level}:0"):
        if cell not in model["terms"]:
            raise ValueError(f"{cell}: too few rows to be in the model, or no cell: {model['rows']}")
    i, j = (model["terms"].index(f"{level}:{ratio}") for ratio in (remote, 0))
    covariance = model["covariance"]
    variance = covariance[i][i] + covariance[j][j] - 2 * covariance[i][j]
    return model["coefficients"][i] - model["coefficients"][j], math.sqrt(variance)
