"""The conformance table: ours passes, and faults found in public code, planted here, do not."""

import sys
from functools import partial

import pytest
import torch

from k2lab.model import MLA, TINY
from k2lab.optim import Muon, muon
from k2lab.optim.conformance import CHECKS, SETTINGS, Implementation, implementations, reference, report

CHECKS_OF = {field: [check for f, check, *_ in CHECKS if f == field] for field, *_ in CHECKS}
STEPS = {"5 steps off float64, momentum", "5 steps off float64, Nesterov"}


def failures(candidate):
    """Return the failed checks of a candidate and their errors."""
    rows = report({"x": candidate})
    return rows[~rows["passed"]].set_index("check")["error"].to_dict()


@pytest.fixture(scope="module")
def table():
    return report(implementations(MLA(TINY)))


def test_ours_passes_every_check(table):
    rows = table[table["implementation"] == "k2lab"]
    assert rows["check"].tolist() == [check for _, check, *_ in CHECKS]
    assert rows["passed"].all(), rows[~rows["passed"]]


def test_torchs_muon_keeps_its_documented_contract(table):
    rows = table[table["implementation"] == "torch.optim.Muon"].set_index("check")
    assert set(rows.index) == set(CHECKS_OF["muon"])
    assert rows.loc[[*STEPS, "update: RMS", "gradient 0: off weight decay"], "passed"].all()


def test_the_table_is_tidy_and_deterministic(table):
    columns = ["implementation", "check", "measured", "limit", "passed", "error"]
    assert table.columns.tolist() == columns
    assert table["passed"].dtype == bool and table["measured"].dtype == float
    assert not table.duplicated(["implementation", "check"]).any()
    assert set(table.loc[table["check"] == "update: RMS", "limit"]) == {"0.132 to 0.234"}
    torch.manual_seed(1)
    assert report(implementations(MLA(TINY))).equals(table)


def test_peers_are_reported_where_installed_and_absent_where_not(monkeypatch, table):
    pytest.importorskip("pytorch_optimizer")
    peers = table[table["implementation"].str.startswith("pytorch_optimizer")].groupby("implementation")
    missing = {name: set(table["check"]) - set(rows["check"]) for name, rows in peers}
    assert missing["pytorch_optimizer.Muon"] == {*CHECKS_OF["clip_mha"], *CHECKS_OF["clip_mla"]}
    assert missing["pytorch_optimizer.MuonClip"] == {"5 steps off float64, Nesterov"}
    assert (table["error"] == "").all()
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert list(implementations()) == ["k2lab", "torch.optim.Muon"]
    small = report()
    assert set(small["implementation"]) == {"k2lab", "torch.optim.Muon"}
    assert not small["check"].isin(CHECKS_OF["clip_mla"]).any()  # no layer was lent


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_the_reference_equals_our_muon_in_float64(shape, nesterov):
    torch.manual_seed(0)
    weight, *grads = torch.randn(5, *shape, dtype=torch.float64)
    p = torch.nn.Parameter(weight.clone())
    optimizer = Muon([p], **SETTINGS, nesterov=nesterov, dtype=torch.float64)
    for p.grad in grads:
        optimizer.step()
    torch.testing.assert_close(p.detach(), reference(weight, grads, **SETTINGS, nesterov=nesterov))


class Faulty(torch.optim.Optimizer):
    """Muon written out, with at most one fault."""

    def __init__(self, params, *, fault="", **settings):
        super().__init__(params, settings)
        self.fault = fault

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, **{k: v for k, v in group.items() if k != "params"})

    def update(self, p, lr, weight_decay, momentum, nesterov):
        grad, state, fault, side = p.grad, self.state[p], self.fault, max(p.shape)
        if fault == "coupled decay":
            grad = grad + weight_decay * p
        state["m"] = momentum * state.get("m", 0.0) + grad
        look = grad + momentum * state["m"] if nesterov and fault != "Nesterov after" else state["m"]
        x = self.orthogonalise(look.double() if fault != "bfloat16 Gram" else look.bfloat16())
        if nesterov and fault == "Nesterov after":
            x = grad + momentum * x
        scales = {"sqrt(0.2 max)": (0.2 * side) ** 0.5, "rows": 0.2 * p.shape[0] ** 0.5, "none": 1.0}
        p.mul_(1 if fault in ("coupled decay", "no decay") else 1 - lr * weight_decay)
        p.add_(x, alpha=-lr * scales.get(fault, 0.2 * side**0.5))

    def orthogonalise(self, x):
        if self.fault == "bfloat16 Gram":
            wide = x if x.shape[0] < x.shape[1] else x.T
            out = muon._gram(wide[None] / wide.norm().clamp_min(1e-7), muon.NS_COEFFICIENTS, 5)[0]
            return out if wide is x else out.T
        steps = 4 if self.fault == "4 steps" else 5
        eps = 0.0 if self.fault == "no eps" else 1e-7
        return muon.newton_schulz(x, eps=eps, ns_steps=steps, dtype=torch.float64)


def adam(params, *, momentum, nesterov, **settings):
    return torch.optim.AdamW(params, betas=(momentum, 0.95), **settings)


MUON_FAULTS = {
    "": set(),
    "Nesterov after": {"5 steps off float64, Nesterov"},
    "sqrt(0.2 max)": {"update: RMS", *STEPS},
    "rows": {"update: smallest singular value", "tall off wide", *STEPS},
    "none": {"update: RMS", *STEPS},
    "coupled decay": {"gradient 0: off weight decay", *STEPS},
    "no decay": {"gradient 0: off weight decay", *STEPS},
    "no eps": {"gradient 0: off weight decay"},
    "4 steps": STEPS,
    "bfloat16 Gram": {"rank 3 of 24: largest singular value", *STEPS},
}


@pytest.mark.parametrize("fault", MUON_FAULTS)
def test_planted_fault_in_muon(fault):
    found = failures(partial(Faulty, fault=fault))
    assert set(found) >= MUON_FAULTS[fault]
    assert bool(found) == bool(fault)
    assert not any(found.values())  # wrong, but no crash


def test_adam_called_muon():
    assert set(failures(adam)) >= {"update: RMS", "update: largest singular value", *STEPS}


def clip(weights, max_logits, threshold, fault=""):
    """Clip by the report's formulas, with at most one fault."""
    gamma = threshold / max_logits.clamp_min(threshold)
    if fault == "one factor":
        gamma = gamma.amin().expand_as(gamma)
    if fault == "no minimum":
        gamma = threshold / max_logits
    powers = {"query": 0.5, "key": 0.5, "query_rotary": 0.5 if fault == "all alike" else 1.0}
    if fault == "key alone":
        powers |= {"query": 0.0, "key": 0.5}
    for name in weights.keys() & powers:
        factors = [float(g) ** powers[name] for g in gamma]  # complex where g < 0
        weights[name].unflatten(0, (len(gamma), -1)).mul_(torch.tensor(factors)[:, None, None])
    if fault == "rotary key" and "key_rotary" in weights:
        weights["key_rotary"] *= gamma.amin()


def test_a_right_clip_passes():
    assert failures(Implementation(clip_mha=clip, clip_mla=clip)) == {}


CLIP_FAULTS = {
    "one factor": {
        *("MHA: logits off gamma", "MHA: other heads, change"),
        *("MLA: content logits off gamma", "MLA: rotary logits off gamma", "MLA: other heads, change"),
    },
    "rotary key": {"MLA: rotary key, change", "MLA: rotary logits off gamma"},
    "all alike": {"MLA: rotary logits off gamma"},
    "key alone": {"MHA: logits off gamma", "MLA: content logits off gamma"},
    "no minimum": {*CHECKS_OF["clip_mha"], *CHECKS_OF["clip_mla"]} - {"MLA: rotary key, change"},
}


@pytest.mark.parametrize("fault", CLIP_FAULTS)
def test_planted_fault_in_the_clip(fault):
    faulty = partial(clip, fault=fault)
    found = failures(Implementation(clip_mha=faulty, clip_mla=faulty))
    assert set(found) >= CLIP_FAULTS[fault]
    crashes = {check: error for check, error in found.items() if error}
    assert bool(crashes) == (fault == "no minimum")
    assert all("complex" in error or "Complex" in error for error in crashes.values()), crashes
