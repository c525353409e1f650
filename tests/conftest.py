"""Settings of every test: no window, no progress bars, none of the caller's K2LAB_ variables."""

import os

import matplotlib as mpl
import pytest

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("K2LAB_")]:
        if name != "K2LAB_CACHE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("K2LAB_PROGRESS", "0")
