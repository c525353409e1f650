"""Own the conformance table: does an implementation of Muon and QK-Clip do what the report says?

    report({"mine": my_muon})             my_muon(params, *, lr, weight_decay, momentum, nesterov)
    report(implementations(MLA(TINY)))    ours, and what else is installed

A check measures one number on small matrices, from the weights before and after alone. Its limits follow
from the formulas and from bfloat16, which costs a few percent, not from what some implementation reaches.
Sources: Moonlight (arXiv 2502.16982, section 2.2); Kimi K2 report, section 2.1 and Algorithm 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pandas as pd
import torch
from torch import nn

from k2lab.optim.muon import Muon
from k2lab.optim.qk_clip import qk_clip_, scale_mha_qk_

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
SHAPES = [(24, 40), (40, 24), (32, 32), (24, 40)]  # wide, tall, square, and one shape twice
HEADS, NOPE, LATENT = 4, 16, 8  # the sizes of TINY; the parts of its MLA as (rows, D) follow
PARTS = {"query": (64, 16), "key": (64, 8), "query_rotary": (32, 16), "key_rotary": (8, 64)}
THRESHOLD, MAX_LOGITS = 2.0, torch.tensor([8.0, 1.0, 4.0, -3.0])
GAMMA = torch.tensor([0.25, 1.0, 0.5, 1.0])[:, None, None]  # what heads with these logits must take


@dataclass(frozen=True)
class Implementation:
    """Name what is to be checked; None leaves its checks out.

    Args:
        muon: (params, *, lr, weight_decay, momentum, nesterov) -> optimizer with `step()`, of (n, m)
            parameters, whose update is 0.2 sqrt(max(n, m)) O per unit of lr.
        nesterov: the values of `nesterov` that `muon` offers.
        clip_mha, clip_mla: (weights, max_logits (H,), threshold) -> None. Scales the `weights` in place:
            "query" and "key" (H d, D); in MLA, where these are the content parts, also "query_rotary"
            (H R, D) and "key_rotary" (R, D), shared by all heads.
    """

    muon: Callable | None = None
    nesterov: tuple[bool, ...] = (False, True)
    clip_mha: Callable | None = None
    clip_mla: Callable | None = None


def implementations(mla: nn.Module | None = None) -> dict[str, Implementation]:
    """Return ours, torch's and, if installed, pytorch_optimizer's, by name.

    `mla` is a layer of the sizes of TINY, `k2lab.model.MLA(TINY)`, that lends its weights to the checks of
    our clip in MLA; without it they are left out, because this package knows no model.
    """
    ours = Implementation(Muon, clip_mha=_clip_mha, clip_mla=mla and partial(_clip_mla, mla))
    torchs = Implementation(partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"))
    found = {"k2lab": ours, "torch.optim.Muon": torchs}
    try:
        import pytorch_optimizer as po
    except ImportError:
        return found

    def muon(params, **settings):
        return po.Muon([{"params": params, "use_muon": True}], use_adjusted_lr=True, **settings)

    def muon_clip(params, nesterov, **settings):  # without Nesterov alone
        return po.MuonClip([{"params": params, "use_muon": True}], **settings)

    def clip(weights, max_logits, threshold):
        label = {"use_muon": True, "attention_name": "a"}
        groups = [label | {"params": [nn.Parameter(w)], "qk_clip": part} for part, w in weights.items()]
        po.MuonClip(groups, qk_clip_threshold=threshold).step(attention_max_logits={"a": max_logits})

    found["pytorch_optimizer.Muon"] = Implementation(muon)
    return found | {"pytorch_optimizer.MuonClip": Implementation(muon_clip, (False,), clip, clip)}


def _clip_mha(weights, max_logits, threshold):
    layer = SimpleNamespace(max_logits=max_logits, scale_qk_=partial(scale_mha_qk_, *weights.values()))
    qk_clip_([layer], qk_clip_threshold=threshold)


def _clip_mla(layer, weights, max_logits, threshold):
    query, key = (p.weight.data.unflatten(0, (HEADS, -1)) for p in (layer.q_b_proj, layer.kv_b_proj))
    own = (query[:, :NOPE], key[:, :NOPE], query[:, NOPE:], layer.kv_a_proj.weight.data[LATENT:])
    for part, weight in zip(own, weights.values(), strict=True):
        part.copy_(weight.view_as(part))
    layer.max_logits = max_logits
    qk_clip_([layer], qk_clip_threshold=threshold)
    for part, weight in zip(own, weights.values(), strict=True):
        weight.copy_(part.reshape_as(weight))


def reference(weight, grads, *, lr, weight_decay, momentum, nesterov):
    """Return `weight` after a Muon step per gradient: the formulas alone, in float64."""
    weight, m = weight.double(), 0.0
    for grad in grads:
        m = momentum * m + grad.double()
        x = momentum * m + grad.double() if nesterov else m
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        weight = weight - lr * (0.2 * math.sqrt(max(weight.shape)) * x + weight_decay * weight)
    return weight


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _distance(x, expected):
    return ((x - expected).norm() / expected.norm()).item()


def _changes(it, weights, grads, nesterov):
    """Return what the steps, a list in `grads` for each, add to `weights`, in float64."""
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = it.muon(params, nesterov=nesterov, **SETTINGS)
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach().double() - w.double() for p, w in zip(params, weights, strict=True)]


def _five_steps(nesterov, it):
    """Return the largest relative error of what five steps change, None where this form is not offered."""
    if nesterov not in it.nesterov:
        return None
    weights = [_random(*s, seed=i) for i, s in enumerate(SHAPES)]
    grads = [[_random(*s, seed=10 * t + i) for i, s in enumerate(SHAPES)] for t in range(1, 6)]
    own = zip(*grads, strict=True)
    ends = [reference(w, g, nesterov=nesterov, **SETTINGS) for w, g in zip(weights, own, strict=True)]
    changes = _changes(it, weights, grads, nesterov)
    return max(_distance(c, e - w) for c, e, w in zip(changes, ends, weights, strict=True))


def _zero_gradient(it):
    (change,) = _changes(it, [WIDE], [[torch.zeros_like(WIDE)]], it.nesterov[0])
    return _distance(change, -SETTINGS["lr"] * SETTINGS["weight_decay"] * WIDE)


def _update(it, grad):
    """Return the first update of a zero weight, in units of 0.2 lr sqrt(max(n, m))."""
    (change,) = _changes(it, [torch.zeros_like(grad)], [[grad]], it.nesterov[0])
    return change / (-SETTINGS["lr"] * 0.2 * math.sqrt(max(grad.shape)))


def _values(it, grad):
    return torch.linalg.svdvals(_update(it, grad))


def _clip(field, it, max_logits):
    """Return the parts by name, (H, rows, D) each, the shared one (1, R, D), before and after a clip."""
    before = {n: _random(*s) for n, s in PARTS.items() if field == "clip_mla" or "rotary" not in n}
    after = {name: weight.clone() for name, weight in before.items()}
    getattr(it, field)(after, max_logits.clone(), THRESHOLD)
    heads = {name: 1 if name == "key_rotary" else HEADS for name in before}
    return [{n: w.unflatten(0, (heads[n], -1)) for n, w in x.items()} for x in (before, after)]


def _logits(field, part, it):
    """Return how far the logits of all pairs of unit vectors are from gamma times what they were."""
    before, after = (w["query" + part].mT @ w["key" + part] for w in _clip(field, it, MAX_LOGITS))
    return max(map(_distance, after, before * GAMMA))


def _moved(field, case, it):
    """Return the largest change of a weight that has to stay."""
    before, after = _clip(field, it, MAX_LOGITS.clamp(max=0) if case == "none above 0" else MAX_LOGITS)
    heads = slice(1, None, 2) if case == "other heads" else slice(None)
    names = [n for n in before if (n == "key_rotary") == (case == "rotary key")]
    return max((after[n] - before[n])[heads].abs().max().item() for n in names)


WIDE, GAUSSIAN, ORTHOGONAL = _random(24, 40), _random(48, 96), torch.linalg.qr(_random(64, 32))[0]
TALL, RANK_3 = WIDE.mT.contiguous(), _random(24, 3) @ _random(3, 40)
CHECKS = [  # (field it needs, check, measure, lowest and highest value that pass)
    # five quintic steps take singular values from [0.01, 1] into [0.682, 1.134]; 3% more for bfloat16
    ("muon", "update: RMS", lambda it: 0.2 * _values(it, ORTHOGONAL).square().mean().sqrt(), 0.132, 0.234),
    ("muon", "update: smallest singular value", lambda it: _values(it, GAUSSIAN)[-1], 0.66, 1.17),
    ("muon", "update: largest singular value", lambda it: _values(it, GAUSSIAN)[0], 0.66, 1.17),
    ("muon", "rank 3 of 24: largest singular value", lambda it: _values(it, RANK_3)[0], 0.66, 1.17),
    ("muon", "gradient 1e-30: largest singular value", lambda it: _values(it, 1e-30 * WIDE)[0], 0, 1.17),
    ("muon", "gradient 0: off weight decay", _zero_gradient, 0, 0.001),
    ("muon", "tall off wide", lambda it: _distance(_update(it, TALL).mT, _update(it, WIDE)), 0, 0.01),
    ("muon", "5 steps off float64, momentum", partial(_five_steps, False), 0, 0.05),
    ("muon", "5 steps off float64, Nesterov", partial(_five_steps, True), 0, 0.05),
    ("clip_mha", "MHA: logits off gamma", partial(_logits, "clip_mha", ""), 0, 1e-5),
    ("clip_mha", "MHA: other heads, change", partial(_moved, "clip_mha", "other heads"), 0, 0),
    ("clip_mha", "MHA: no logit above 0, change", partial(_moved, "clip_mha", "none above 0"), 0, 0),
    ("clip_mla", "MLA: content logits off gamma", partial(_logits, "clip_mla", ""), 0, 1e-5),
    ("clip_mla", "MLA: rotary logits off gamma", partial(_logits, "clip_mla", "_rotary"), 0, 1e-5),
    ("clip_mla", "MLA: rotary key, change", partial(_moved, "clip_mla", "rotary key"), 0, 0),
    ("clip_mla", "MLA: other heads, change", partial(_moved, "clip_mla", "other heads"), 0, 0),
    ("clip_mla", "MLA: no logit above 0, change", partial(_moved, "clip_mla", "none above 0"), 0, 0),
]


def report(candidates: dict[str, Implementation | Callable] | None = None) -> pd.DataFrame:
    """Run the checks; one row each of implementation, check, measured, limit, passed, error.

    `candidates` by name, where a plain callable is `Implementation(muon=...)`; None: `implementations()`.
    What a candidate does not offer has no row. A crash fails, with its message in `error`.
    """
    rows = []
    for name, it in (implementations() if candidates is None else candidates).items():
        it = it if isinstance(it, Implementation) else Implementation(it)
        for field, check, measure, low, high in CHECKS:
            error = ""
            try:
                measured = measure(it) if getattr(it, field) else None
            except Exception as e:
                measured, error = math.nan, f"{type(e).__name__}: {e}"
            if measured is not None:
                limit, passed = f"{low:g} to {high:g}", low <= measured <= high
                rows.append((name, check, float(measured), limit, bool(passed), error))
    return pd.DataFrame(rows, columns=["implementation", "check", "measured", "limit", "passed", "error"])
