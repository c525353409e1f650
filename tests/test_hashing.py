"""The hash that keys the run cache: equal for equal runs, in every process."""

import dataclasses
import pickle
import subprocess
import sys
import types
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k2lab.hashing import stable_hash


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 1
    betas: tuple = (0.9, 0.95)


def test_functions_of_other_packages_and_fingerprints_have_a_hash():
    corpus = types.SimpleNamespace(fingerprint="a", tokenizer=object())
    other = types.SimpleNamespace(fingerprint="b", tokenizer=object())
    assert stable_hash(patch) == stable_hash(patch)
    assert stable_hash(patch) != stable_hash(patch.object)
    assert stable_hash(corpus) != stable_hash(other)


@pytest.mark.parametrize("value", [object(), iter([1]), np.array([object()])])
def test_a_config_without_stable_hash_is_refused(value):
    with pytest.raises(ValueError, match="no stable hash"):
        stable_hash({"x": value})


def test_hash_covers_source_defaults_closure_and_globals():
    def make(k):
        return lambda config, seed: k + FACTOR

    def change(body, **namespace):
        return types.FunctionType(body.__code__, body.__globals__ | namespace, "f", (1,))

    base = make(1)
    assert stable_hash(base) == stable_hash(make(1))
    assert stable_hash(base) != stable_hash(make(2))
    with_default = lambda config, seed=1: FACTOR  # noqa: E731
    assert stable_hash(change(with_default)) != stable_hash(change(with_default, FACTOR=3))


FACTOR = 2
SAME = [1, 1.0, True, "1", b"1", (1,), [1], {1: 1}, {1}, np.array([1]), torch.tensor([1]), None]


def test_values_that_compare_equal_but_differ_in_kind_have_different_hashes():
    hashes = [stable_hash(value) for value in SAME]
    assert len(set(hashes)) == len(SAME)
    assert stable_hash(["ab", "c"]) != stable_hash(["a", "bc"])
    assert stable_hash([["a"], "b"]) != stable_hash([["a", "b"]])
    assert stable_hash(Config()) != stable_hash(Config(steps=2))
    assert stable_hash(torch.zeros(2)) != stable_hash(torch.zeros(2, 1))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_like)
def test_hash_is_stable_and_survives_a_copy(value):
    assert stable_hash(value) == stable_hash(pickle.loads(pickle.dumps(value)))


def test_hash_is_the_same_in_another_process():
    value = {"b": {"x", "y", "z"}, "a": (1, 2.5)}
    code = f"from k2lab.hashing import stable_hash; print(stable_hash({value!r}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == stable_hash(value)
