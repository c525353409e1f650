"""Muon against the SVD, a float64 loop and torch.optim.Muon."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from k2lab.model import TINY, Transformer
from k2lab.optim import muon
from k2lab.optim.muon import NS_COEFFICIENTS, Muon, lr_ratio, newton_schulz, split_parameters

SHAPES = [(6, 10), (10, 6), (7, 7), (6, 10)]
FORMS = [(form, nesterov) for form in ("sum", "average") for nesterov in (False, True)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_svd(x, steps=5, coefficients=NS_COEFFICIENTS, eps=1e-7):
    """Orthogonalise by the SVD and the scalar quintic, without any matrix polynomial."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True).clamp_min(eps)
    a, b, c = coefficients
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u * s[..., None, :] @ vh


def with_values(values, m, seed=0):
    """Return a matrix of len(values) rows and m columns with these singular values."""
    u, _, vh = torch.linalg.svd(random(len(values), m, seed=seed), full_matrices=False)
    return u * torch.as_tensor(values, dtype=torch.float64) @ vh


def train(optimizer, params, grads):
    """Step once per list of gradients in `grads`."""
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = None if grad is None else grad.clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


def problem(shapes=SHAPES, steps=5, dtype=torch.float64):
    params = [nn.Parameter(random(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]
    grads = [
        [random(*s, seed=100 * t + i, dtype=dtype) for i, s in enumerate(shapes)] for t in range(1, steps + 1)
    ]
    return params, grads


def relative(x, expected, start):
    """Return the largest relative error of the change from `start`."""
    errors = [(a - b).norm() / (b - c).norm() for a, b, c in zip(x, expected, start, strict=True)]
    return max(errors).item()


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (4, 12), (2, 3, 8, 4), (3, 4, 6)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_newton_schulz_applies_the_quintic_to_the_singular_values(shape, steps):
    x = random(*shape)
    before = x.clone()
    out = newton_schulz(x, ns_steps=steps, dtype=torch.float64)
    torch.testing.assert_close(out, by_svd(x, steps), atol=1e-11, rtol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("m", [24, 60])
def test_newton_schulz_ends_near_one_in_every_type(dtype, m):
    x = with_values(torch.linspace(0.05, 1, 24), m)
    out = newton_schulz(x.float(), dtype=dtype)
    assert out.dtype == torch.float32
    values = torch.linalg.svdvals(out.double())
    assert values.min() > 0.66 and values.max() < 1.17  # 0.682 to 1.134 in exact arithmetic
    assert (out - by_svd(x)).norm() < 0.02 * by_svd(x).norm()


def test_newton_schulz_settings():
    x, coefficients = random(4, 9), (2.0, -1.5, 0.5)
    out = newton_schulz(x, ns_coefficients=coefficients, ns_steps=20, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(out, u @ vh)  # these converge, 1 is a fixed point with slope 0
    small = newton_schulz(1e-3 * x, eps=10.0, ns_steps=1, dtype=torch.float64)
    torch.testing.assert_close(small, by_svd(1e-3 * x, 1, eps=10.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5)])
def test_zero_tiny_and_rank_deficient_matrices(dtype, shape):
    assert torch.equal(newton_schulz(torch.zeros(shape), dtype=dtype), torch.zeros(shape))
    tiny = newton_schulz(torch.full(shape, 1e-30), dtype=dtype)
    assert tiny.isfinite().all() and tiny.abs().max() < 1e-15
    rank_1 = torch.outer(torch.ones(shape[0]), torch.arange(1.0, shape[1] + 1))
    out = newton_schulz(rank_1, dtype=dtype)
    torch.testing.assert_close(out.double(), by_svd(rank_1.double()), atol=0.03, rtol=0)


def test_gram_form_equals_the_plain_one_but_would_blow_up_in_bfloat16():
    x = with_values(torch.logspace(-4, 0, 32), 128)[None]
    x, half = x / x.norm(), x.bfloat16() / x.bfloat16().norm()
    plain, gram = (form(x, NS_COEFFICIENTS, 5) for form in (muon._plain, muon._gram))
    torch.testing.assert_close(gram, plain, atol=1e-10, rtol=0)
    ruined = muon._gram(half, NS_COEFFICIENTS, 5).double()
    assert not (ruined - plain).norm() < plain.norm()
    picked = newton_schulz(half, dtype=torch.bfloat16)
    assert torch.equal(picked, muon._plain(half / half.norm(), NS_COEFFICIENTS, 5))
    close = newton_schulz(x.float(), dtype=torch.float32)  # the Gram form again, in float32
    torch.testing.assert_close(close.double(), plain, atol=1e-3, rtol=0)


def test_which_form_runs(monkeypatch):
    ran = []
    for name in ("_plain", "_gram"):
        monkeypatch.setattr(muon, name, lambda x, *_, name=name: ran.append((name, x.dtype)) or x)
    for x, dtype in itertools.product((random(8, 64), random(64, 8), random(8, 9)), (None, torch.bfloat16)):
        newton_schulz(x, dtype=dtype or torch.float32)
    wide = [("_gram", torch.float32), ("_plain", torch.bfloat16)]
    assert ran == wide + wide + [("_plain", torch.float32), ("_plain", torch.bfloat16)]


@pytest.mark.parametrize("has", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_fast_dtype(monkeypatch, has):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == has)
    assert muon.fast_dtype(torch.device("cpu")) == (torch.bfloat16 if has else torch.float32)
    assert muon.fast_dtype(torch.device("cuda")) == torch.bfloat16


# The optimizer


def by_formulas(params, grads, lr, weight_decay, momentum, nesterov, form, adjust):
    """Step matrix by matrix as the formulas say, in float64."""
    weights = []
    for i, p in enumerate(params):
        w, m = p.detach().clone(), torch.zeros_like(p)
        for step in grads:
            g = step[i]
            m = momentum * m + (1 - momentum if form == "average" else 1.0) * g
            look = (1 - momentum) * g + momentum * m if form == "average" else g + momentum * m
            n, k = w.shape[-2:]
            ratio = 0.2 * max(n, k) ** 0.5 if adjust == "match_rms_adamw" else max(1, n / k) ** 0.5
            w = w - lr * weight_decay * w - lr * ratio * by_svd(look if nesterov else m)
        weights.append(w)
    return weights


@pytest.mark.parametrize(("form", "nesterov"), FORMS)
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original", None])
def test_equals_the_formulas(form, nesterov, adjust):
    params, grads = problem([*SHAPES, (3, 4, 9), (2, 9, 4)])
    expected = by_formulas(params, grads, 0.03, 0.2, 0.9, nesterov, form, adjust)
    settings = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.9, "nesterov": nesterov}
    optimizer = Muon(params, **settings, momentum_form=form, adjust_lr_fn=adjust, dtype=torch.float64)
    for ours, theirs in zip(train(optimizer, params, grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_step_for_step(nesterov, adjust, dtype):
    """Torch iterates in bfloat16, which leaves 1%; the other form of momentum is off by far more."""
    start, grads = problem([(24, 40), (40, 24), (24, 40), (16, 64)], dtype=torch.float32)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": adjust}
    paths = []
    for kind, lookahead in ((torch.optim.Muon, nesterov), (Muon, nesterov), (Muon, not nesterov)):
        params = copy.deepcopy(start)
        ours = {"momentum_form": "average", "dtype": dtype} if kind is Muon else {}
        optimizer = kind(params, **settings, nesterov=lookahead, **ours)
        paths.append([train(optimizer, params, [grad]) for grad in grads])
    theirs, ours, other = paths
    assert max(relative(a, b, start) for a, b in zip(ours, theirs, strict=True)) < 0.025
    assert relative(other[-1], theirs[-1], start) > 0.2


@pytest.mark.parametrize("nesterov", [False, True])
def test_sum_and_average_give_the_same_update(nesterov):
    start, grads = problem()
    ends = []
    for form in ("sum", "average"):
        params = copy.deepcopy(start)
        optimizer = Muon(params, nesterov=nesterov, momentum_form=form, dtype=torch.float64)
        ends.append(train(optimizer, params, grads))
    assert relative(*ends, start) < 1e-11


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("room", "batches"), [(0, [3, 1, 1, 2]), (2, [3, 2, 2]), (2**20, [7])])
def test_a_stack_equals_separate_matrices_however_batched(monkeypatch, shape, adjust, room, batches):
    monkeypatch.setattr(muon, "CACHE_BYTES", 4 * room * shape[0] * shape[1])
    seen = []
    monkeypatch.setattr(muon, "newton_schulz", lambda x, **k: seen.append(len(x)) or newton_schulz(x, **k))
    shapes = [(3, *shape), shape, shape[::-1], (2, *shape[::-1])]
    stacked, grads = problem(shapes)
    single = [nn.Parameter(w.detach().clone()) for p in stacked for w in p.reshape(-1, *p.shape[-2:])]
    single_grads = [[m for g in step for m in g.reshape(-1, *g.shape[-2:])] for step in grads]
    ours = train(Muon(stacked, adjust_lr_fn=adjust, dtype=torch.float64), stacked, grads)
    assert seen == batches * len(grads)
    theirs = train(Muon(single, adjust_lr_fn=adjust, dtype=torch.float64), single, single_grads)
    ours = [w for p in ours for w in p.reshape(-1, *p.shape[-2:])]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_weight_decay_is_decoupled_and_the_only_change_of_a_zero_gradient():
    params, _ = problem()
    start = [p.detach().clone() for p in params]
    optimizer = Muon(params, lr=0.1, weight_decay=0.5)
    ends = train(optimizer, params, [[torch.zeros_like(p) for p in params]] * 3)
    for a, b in zip(ends, start, strict=True):
        torch.testing.assert_close(a, b * 0.95**3)


def test_parameters_without_gradient_stay_and_get_no_state():
    params, grads = problem(steps=3)
    start = [p.detach().clone() for p in params]
    grads = [[None, step[1], None, step[3]] for step in grads]
    optimizer = Muon(params, dtype=torch.float64)
    ends = train(optimizer, params, grads)
    assert [torch.equal(a, b) for a, b in zip(ends, start, strict=True)] == [True, False, True, False]
    assert set(optimizer.state) == {params[1], params[3]}
    alone = [nn.Parameter(start[i].clone()) for i in (1, 3)]
    expected = train(Muon(alone, dtype=torch.float64), alone, [step[1::2] for step in grads])
    torch.testing.assert_close(ends[1::2], expected)


def test_closure_and_groups_with_settings_of_their_own():
    params, grads = problem([(4, 6), (6, 4)], steps=1)
    start = [p.detach().clone() for p in params]
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], lr=0.1)

    def closure():
        assert torch.is_grad_enabled()
        for p, grad in zip(params, grads[0], strict=True):
            p.grad = grad
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert [torch.equal(a, b) for a, b in zip(params, start, strict=True)] == [False, True]


def test_bfloat16_parameters():
    start, grads = problem(steps=3, dtype=torch.bfloat16)
    exact = [nn.Parameter(p.detach().double()) for p in start]
    expected = train(Muon(exact, lr=1.0), exact, [[g.double() for g in step] for step in grads])
    before = [p.detach().double() for p in start]
    ends = train(Muon(start, lr=1.0), start, grads)
    assert all(p.dtype == torch.bfloat16 for p in ends)
    assert relative([p.double() for p in ends], expected, before) < 0.1


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_state_dict_round_trip_continues_to_the_bit(dtype):
    params, grads = problem([*SHAPES, (3, 4, 6)], steps=6, dtype=torch.float32)
    optimizer = Muon(params, dtype=dtype)
    middle = train(optimizer, params, grads[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    end = train(optimizer, params, grads[3:])
    params = [nn.Parameter(p) for p in middle]
    resumed = Muon(params, lr=9.0, momentum=0.1, ns_steps=1)  # the loaded settings replace these
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0]["dtype"] == dtype
    assert all(map(torch.equal, train(resumed, params, grads[3:]), end))


def test_lr_ratio():
    assert lr_ratio(torch.Size((4, 100))) == lr_ratio(torch.Size((7, 100, 4))) == pytest.approx(2.0)
    assert lr_ratio(torch.Size((100, 4)), "original") == lr_ratio(torch.Size((9, 100, 4)), None) == 5.0
    assert lr_ratio(torch.Size((4, 100)), "original") == 1.0


BAD = [
    ({"lr": -1.0}, "lr=-1.0 must be >= 0"),
    ({"lr": float("nan")}, "lr=nan"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1 must be >= 0"),
    ({"eps": 0.0}, "eps=0.0 must be > 0"),
    ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
    ({"momentum": -0.1}, "momentum=-0.1"),
    ({"ns_steps": -1}, "ns_steps=-1 must be an integer"),
    ({"ns_steps": 100}, "ns_steps=100"),
    ({"ns_steps": 5.0}, "ns_steps=5.0"),
    ({"ns_coefficients": (1.0, 2.0)}, "must be three numbers"),
    ({"adjust_lr_fn": "rms"}, "adjust_lr_fn='rms' must be one of"),
    ({"momentum_form": "ema"}, "momentum_form='ema' must be one of"),
    ({"params": [nn.Parameter(torch.zeros(3))]}, r"shape \(3,\)"),
    ({"params": [nn.Parameter(torch.zeros(2, 2, 2, 2))]}, "no real matrix"),
    ({"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))]}, "complex64"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_input_is_named_and_a_refused_group_is_not_kept(bad, message):
    good = {"params": [nn.Parameter(torch.zeros(2, 3))]}
    with pytest.raises(ValueError, match=message):
        Muon(**(good | bad))
    optimizer = Muon(**good)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 3))]} | bad)
    assert len(optimizer.param_groups) == 1


# Who gets Muon


def test_split_of_the_projects_model():
    model = Transformer(TINY)
    model.norm.weight.requires_grad_(False)
    split = split_parameters(model)
    shapes = {name: p.dim() for name, p in model.named_parameters() if p.requires_grad}
    assert split.keys() == shapes.keys()
    adamw = {name for name, (kind, _) in split.items() if kind == "adamw"}
    vectors = {name for name, dims in shapes.items() if dims == 1}
    assert adamw == vectors | {"embed_tokens.weight", "lm_head.weight"}
    assert split["layers.1.mlp.router.weight"] == ("muon", "hidden matrix")
    stacks = {name for name, (_, why) in split.items() if "stack" in why}
    assert stacks == {name for name, dims in shapes.items() if dims == 3} != set()
    assert "output head" in split["lm_head.weight"][1] and "embedding" in split["embed_tokens.weight"][1]


class Bytes(nn.Module):
    """Have as many hidden dims as tokens, so that every layer has the shape of a head."""

    def __init__(self, tied):
        super().__init__()
        self.embed = nn.Embedding(16, 16)
        self.hidden = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.conv = nn.Conv2d(2, 2, 3)
        self.head = nn.Linear(16, 16, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("tied", [False, True])
def test_split_where_hidden_layers_are_as_wide_as_the_vocabulary(tied):
    split = split_parameters(Bytes(tied))
    on_muon = {name for name, (kind, _) in split.items() if kind == "muon"}
    assert on_muon == {"hidden.0.weight", "hidden.1.weight"}
    assert ("head.weight" in split) != tied
    assert split["conv.weight"] == ("adamw", "more than a stack of matrices")
