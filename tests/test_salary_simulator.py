"""The model of log pay against statsmodels' formulas and predictions, and on planted confounders."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats as sp
from statsmodels.formula.api import ols

from k2lab.salary import simulator, stats

LEVELS = ("EN", "MI", "SE", "EX")
TITLES = {"Data Engineer": 0.0, "Data Scientist": 0.1, "Analyst": -0.3, "Welder": 0.5, "Baker": 0.2}


def table(seed=0, *, adverts=900, effect=0.1, far=0.0):
    """Make pairs of rows; log pay adds level, title, region, `effect` of full remote work and noise.

    `far` is the chance that a remote advert is for an analyst, the worst paid title.
    """
    rng, rows = np.random.default_rng(seed), []
    names = list(TITLES)
    for _ in range(adverts):
        level, remote = (
            rng.choice(4, p=[0.15, 0.3, 0.45, 0.1]),
            int(rng.choice([0, 50, 100], p=[0.6, 0.1, 0.3])),
        )
        title = names[rng.choice(5, p=[0.35, 0.25, 0.2, 0.15, 0.05])]
        title = "Analyst" if remote == 100 and rng.random() < far else title
        country, shared = rng.choice(["US", "CA", "GB"], p=[0.7, 0.2, 0.1]), 0.2 * rng.normal()
        mean = (
            11.5 + 0.25 * level + TITLES[title] - 0.4 * (country != "US") + effect * (remote == 100) + shared
        )
        for _ in range(2):
            pay = round(np.exp(mean + 0.2 * rng.normal()))
            rows.append((2025, LEVELS[level], "FT", title, pay, "USD", pay, "US", remote, country, "M"))
    return pd.DataFrame(rows, columns=list(stats.COLUMNS))


@pytest.fixture(scope="module")
def frame():
    return table()


@pytest.fixture(scope="module")
def model(frame):
    return simulator.fit_simulator(frame, top_titles=3)


@pytest.fixture(scope="module")
def fit(frame):
    """Fit the same model from a formula; its reference values differ, its predictions must not."""
    data = frame.assign(
        log=np.log(frame["salary_in_usd"]),
        cell=frame["experience_level"] + ":" + frame["remote_ratio"].astype(str),
        title=frame["job_title"].replace({"Welder": "other", "Baker": "other"}),
        us=frame["company_location"] == "US",
    )
    groups = {"groups": stats.pair_ids(frame)}
    formula = "log ~ 0 + cell + C(title, Sum) + us"
    return ols(formula, data).fit(cov_type="cluster", cov_kwds=groups, use_t=True)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("remote", [0, 50, 100])
@pytest.mark.parametrize(
    ("title", "region"), [("Data Engineer", "US"), ("other", "other"), ("Analyst", "US")]
)
def test_predict_against_get_prediction(model, fit, level, remote, title, region):
    found = simulator.predict(model, level=level, remote=remote, title=title, region=region)
    at = pd.DataFrame({"cell": [f"{level}:{remote}"], "title": [title], "us": [region == "US"]})
    expected = fit.get_prediction(at)
    log, t = expected.predicted_mean.item(), sp.t.isf(0.025, fit.df_resid_inference)
    half, job = t * expected.se_mean.item(), t * expected.se_obs.item()
    names = ["typical_usd", "typical_low_usd", "typical_high_usd", "job_low_usd", "job_high_usd"]
    ends = np.exp([log, log - half, log + half, log - job, log + job])
    assert [found[name] for name in names] == pytest.approx(ends.tolist())
    smearing = np.exp(fit.resid).mean()
    assert found["mean_usd"] == pytest.approx(smearing * np.exp(log))


@pytest.mark.parametrize("level", LEVELS)
def test_remote_effect_against_a_contrast(frame, model, fit, level):
    found = simulator.predict(model, level=level, remote=100)
    test = fit.t_test(f"cell[{level}:100] - cell[{level}:0] = 0")
    expected = 100 * np.expm1([test.effect.item(), *test.conf_int()[0]])
    assert [found[name] for name in ("remote_percent", "remote_low", "remote_high")] == pytest.approx(
        list(expected)
    )
    chosen = frame["experience_level"] == level
    assert found["rows"] == (chosen & (frame["remote_ratio"] == 100)).sum()
    assert found["rows_onsite"] == (chosen & (frame["remote_ratio"] == 0)).sum()
    onsite = simulator.predict(model, level=level, remote=0)
    assert onsite["remote_percent"] == onsite["remote_low"] == onsite["remote_high"] == 0


def test_the_model_survives_json_and_defaults_to_the_most_common(frame, model):
    again = json.loads(json.dumps(model, allow_nan=False))
    assert again == model
    assert model["values"]["region"] == ["US", "other"]
    assert model["values"]["title"] == [
        *frame["job_title"].value_counts().index[:3][:2],
        *model["values"]["title"][2:],
    ]
    assert set(model["values"]["title"]) == {"Data Engineer", "Data Scientist", "Analyst", "other"}
    common = {name: values[0] for name, values in model["values"].items()}
    chosen = simulator.predict(again, level="SE", remote=100, **common)
    assert simulator.predict(model, level="SE", remote=100) == chosen


def test_mean_and_single_salaries_fit_the_data(frame, model):
    """Duan's mean is the average of the data, and 95% of the single salaries lie in their interval."""
    title = frame["job_title"].where(frame["job_title"].isin(model["values"]["title"]), "other")
    region = frame["company_location"].where(frame["company_location"] == "US", "other")
    keys = list(zip(frame["experience_level"], frame["remote_ratio"], title, region, strict=True))
    known = {
        key: simulator.predict(model, **dict(zip(("level", "remote", "title", "region"), key, strict=True)))
        for key in set(keys)
    }
    pay = frame["salary_in_usd"].to_numpy()
    assert np.mean([known[key]["mean_usd"] for key in keys]) == pytest.approx(pay.mean(), rel=0.01)
    inside = [
        known[key]["job_low_usd"] < y < known[key]["job_high_usd"] for key, y in zip(keys, pay, strict=True)
    ]
    assert 0.93 < np.mean(inside) < 0.97


def test_adjustment_removes_a_planted_confounder():
    """Remote adverts look for the worst paid title, and at an equal title nothing differs."""
    frame = table(1, adverts=2500, effect=0.0, far=0.6)
    raw = simulator.adjusted_effect(frame, covariates=())
    adjusted = simulator.adjusted_effect(frame, covariates=("title", "region"))
    assert (raw["percent_high"] < 0).all()
    assert ((adjusted["percent_low"] < 0) & (adjusted["percent_high"] > 0)).all()
    assert (adjusted["percent"].abs() < raw["percent"].abs() / 2).all()


def test_intervals_cover_a_planted_effect():
    truth, covered = 100 * np.expm1(0.1), 0
    for seed in range(25):
        found = simulator.adjusted_effect(
            table(seed, adverts=400), covariates=("title", "region"), min_rows=4
        )
        covered += ((found["percent_low"] < truth) & (truth < found["percent_high"])).sum()
    assert 89 <= covered <= 99  # of 100, 95 expected


def test_a_row_per_level_with_its_counts(frame):
    found = simulator.adjusted_effect(frame)
    assert found["experience_level"].tolist() == list(LEVELS)
    assert found["n_remote"].sum() == (frame["remote_ratio"] == 100).sum()
    assert found["n_onsite"].sum() == (frame["remote_ratio"] == 0).sum()
    two = simulator.adjusted_effect(frame, levels=("SE", "EN"))
    assert two["percent"].tolist() == pytest.approx(found["percent"].iloc[[2, 0]].tolist())


def test_without_covariates_it_is_the_difference_of_log_means(frame):
    found = simulator.adjusted_effect(frame, covariates=(), remote=50)
    expected = stats.remote_effect(frame, outcome="log", remote=50)
    names = ["n_onsite", "n_remote", "difference", "percent"]
    np.testing.assert_allclose(found[names], expected[names])
    clustered = stats.remote_effect(frame, outcome="log", remote=50, test="cluster")
    np.testing.assert_allclose(
        found["se"], clustered["se"], rtol=0.01
    )  # one df for all levels, or one for each


def test_every_covariate_enters(frame):
    rng = np.random.default_rng(0)
    varied = frame.assign(
        work_year=2024 + rng.integers(0, 2, len(frame)),
        company_size=rng.choice(["S", "M", "L"], len(frame), p=[0.2, 0.5, 0.3]),
        employment_type=rng.choice(["FT", "CT"], len(frame), p=[0.8, 0.2]),
    )
    names = ("year", "title", "region", "size", "type")
    model = simulator.fit_simulator(varied, covariates=names)
    terms = [term for term in model["terms"] if ":" not in term]
    titles = varied["job_title"].value_counts().index[1:]
    year = varied["work_year"].value_counts().index[1]
    assert terms == [
        f"year {year}",
        *(f"title {t}" for t in titles),
        "region other",
        "size L",
        "size S",
        "type CT",
    ]
    values = {"year": year, "title": titles[0], "region": "other", "size": "S", "type": "CT"}
    found = simulator.predict(model, level="MI", remote=0, **values)
    terms = ["MI:0", *(f"{name} {value}" for name, value in values.items())]
    log = sum(model["coefficients"][model["terms"].index(term)] for term in terms)
    assert found["typical_usd"] == pytest.approx(np.exp(log))


def test_small_cells_are_left_out_and_named(frame):
    hybrid = frame[(frame["experience_level"] == "EX") & (frame["remote_ratio"] == 50)]
    few = frame.drop(hybrid.index[4:])
    model = simulator.fit_simulator(few, min_rows=5)
    assert "EX:50" not in model["terms"] and model["rows"]["EX:50"] == 4 and len(model["rows"]) == 12
    assert "EX:50" in simulator.fit_simulator(few, min_rows=4)["terms"]
    with pytest.raises(ValueError, match=r"EX:50: too few rows"):
        simulator.predict(model, level="EX", remote=50)
    without = simulator.fit_simulator(few.drop(hybrid.index[:4]), min_rows=5)
    assert without["coefficients"] == pytest.approx(model["coefficients"])
    with pytest.raises(ValueError, match=r"EX:100: too few"):
        simulator.adjusted_effect(frame[frame["experience_level"] != "EX"])


def test_bad_arguments_say_what_to_do(frame, model):
    for min_rows in (2, 9999):
        with pytest.raises(ValueError, match=f"min_rows={min_rows}: 3 or more, and no more than the largest"):
            simulator.fit_simulator(frame, min_rows=min_rows)
    with pytest.raises(ValueError, match="covariates='age': choose one of 'year', 'title'"):
        simulator.fit_simulator(frame, covariates=("age",))
    same = frame.assign(company_size=np.where(frame["company_location"] == "US", "M", "S"))
    with pytest.raises(ValueError, match=r"14 terms of rank 13, leave one out"):
        simulator.fit_simulator(same, covariates=("region", "size"))
    with pytest.raises(ValueError, match="title='Smith': choose one of"):
        simulator.predict(model, level="EN", remote=0, title="Smith")
    with pytest.raises(ValueError, match=r"\['size'\]: not in this model"):
        simulator.predict(model, level="EN", remote=0, size="S")
    with pytest.raises(ValueError, match="XX:0: too few rows"):
        simulator.predict(model, level="XX", remote=0)
