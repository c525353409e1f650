"""QK-Clip against logits computed by hand, MuonClip against its two halves, and a clip over two ranks."""

import copy
import io
import math
import sys
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from k2lab.model import MLA, TINY, Transformer
from k2lab.model.attention import rotation
from k2lab.optim import Muon, MuonClip, qk_clip_, scale_mha_qk_
from k2lab.optim.muon import split_parameters

FULL_RANK = replace(TINY, q_lora_rank=None)
H, K = TINY.num_attention_heads, TINY.qk_nope_head_dim
OPTIONS = {"lr": 0.01, "adamw_betas": (0.8, 0.9), "adamw_eps": 1e-6, "momentum": 0.8}


def make(config=TINY, seed=0):
    """Return an attention layer with large logits, which tracks them, and inputs (B, T, D)."""
    torch.manual_seed(seed)
    layer = MLA(config).double()
    for p in layer.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.3)
    layer.track_max_logits = True
    return layer, torch.randn(4, 9, config.hidden_size, dtype=torch.float64)


def forward(layer, x):
    layer(x, rotation(TINY, 0, x.shape[1]))
    return layer


@torch.no_grad()
def logits(layer, x):
    """Compute the scaled logits (B, H, T, S) from the parts, without a mask."""
    c, cis = layer.config, rotation(TINY, 0, x.shape[1])
    q_nope, q_rope = layer.queries(x, cis)
    c_kv, k_rope = layer.latents(x, cis).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    k_nope = layer.kv_b_proj(c_kv).unflatten(-1, (H, -1))[..., :K]
    content = torch.einsum("bthk,bshk->bhts", q_nope, k_nope)
    return (content + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)) * layer.scale


def largest(layer, x):
    """Return the largest causal logit of every head, (H,)."""
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return logits(layer, x).masked_fill(future, -math.inf).amax((0, 2, 3))


def query_of(layer):
    """Return the query rows (H, K + R, in)."""
    return getattr(layer, "q_b_proj" if hasattr(layer, "q_b_proj") else "q_proj").weight.unflatten(0, (H, -1))


def untouchable(layer):
    """Return the weights that no clip may change: all but query and content key rows."""
    skip = ("q_b_proj.weight", "q_proj.weight", "kv_b_proj.weight")
    values = layer.kv_b_proj.weight.unflatten(0, (H, -1))[:, K:]
    return [values, *(p for name, p in layer.named_parameters() if name not in skip)]


def recorder(maxima):
    """Return a layer that only writes down what it is asked to do."""
    layer = SimpleNamespace(max_logits=torch.tensor(maxima), calls=[])
    layer.scale_qk_ = lambda gamma, alpha: layer.calls.append((gamma.tolist(), alpha))
    return layer


@pytest.mark.parametrize("config", [TINY, FULL_RANK])
@pytest.mark.parametrize("form", ["head", "layer"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_a_clipped_head_has_gamma_times_the_logits_and_no_other_weight_moves(config, form, alpha):
    layer, x = make(config)
    before, old, s_max = logits(layer, x), copy.deepcopy(layer), largest(layer, x)
    torch.testing.assert_close(forward(layer, x).max_logits, s_max)
    threshold = s_max.sort().values[1:3].mean().item()  # two of the four heads are above
    report = qk_clip_([layer], qk_clip_threshold=threshold, form=form, alpha=alpha)
    gamma = (threshold / (s_max if form == "head" else s_max.amax().expand(H))).clamp(max=1)
    assert report.fraction_clipped == (gamma < 1).double().mean() == (0.5 if form == "head" else 1)
    torch.testing.assert_close(report.gamma[0].double(), gamma, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(layer, x), before * gamma.view(H, 1, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(largest(layer, x), s_max * gamma, rtol=1e-6, atol=0)
    assert all(map(torch.equal, untouchable(layer), untouchable(old)))
    for mine, theirs in ((query_of(layer), query_of(old)), (layer.kv_b_proj.weight, old.kv_b_proj.weight)):
        assert torch.equal(mine.view(H, -1)[gamma == 1], theirs.view(H, -1)[gamma == 1])
    content = query_of(layer)[:, :K] / query_of(old)[:, :K]
    torch.testing.assert_close(content, gamma.view(H, 1, 1).expand_as(content) ** alpha)
    assert layer.max_logits is None


@pytest.mark.parametrize("form", ["head", "layer"])
def test_no_scaling_at_or_below_the_threshold_without_positive_logits_or_at_infinity(form):
    calm = [recorder([4.0, 3.9, -100.0, 0.0]), recorder([-3.0, -0.0, 0.0, -200.0])]
    report = qk_clip_(calm, qk_clip_threshold=4.0, form=form)
    assert [layer.calls for layer in calm] == [[], []]
    assert torch.equal(report.gamma, torch.ones(2, 4)) and report.fraction_clipped == 0
    layer = recorder([1e30, 2.0])
    report = qk_clip_([layer], qk_clip_threshold=math.inf, form=form)
    assert layer.calls == [] and layer.max_logits is None
    assert report.max_logits.tolist() == [[pytest.approx(1e30), 2.0]]


@pytest.mark.parametrize(("form", "least"), [("head", 1.0), ("layer", 0.0)])
def test_report_and_calls_by_hand(form, least):
    layers = [recorder([8.0, 1.0]), recorder([1.0, -9.0]), recorder([2.0, 16.0])]
    report = qk_clip_(iter(layers), qk_clip_threshold=4.0, form=form, alpha=0.2)
    first, last = [0.5, max(0.5, least)], [max(0.25, least), 0.25]
    assert report.max_logits.tolist() == [[8.0, 1.0], [1.0, -9.0], [2.0, 16.0]]
    assert report.gamma.tolist() == [first, [1.0, 1.0], last]
    assert report.fraction_clipped == pytest.approx(2 / 6 if form == "head" else 4 / 6)
    assert [layer.calls for layer in layers] == [[(first, 0.2)], [], [(last, 0.2)]]


def test_maxima_over_micro_batches_equal_the_full_batch():
    layer, x = make()
    (full,) = qk_clip_([forward(layer, x)], qk_clip_threshold=math.inf).max_logits
    for part in x.split(1):
        forward(layer, part)
    assert torch.equal(qk_clip_([layer], qk_clip_threshold=math.inf).max_logits[0], full)
    forward(layer, x[:1])  # the record starts anew after a clip
    assert not torch.equal(layer.max_logits.float(), full)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_multi_head_attention(alpha):
    torch.manual_seed(0)
    q, k, x = (torch.randn(n, 7).double() for n in (12, 12, 5))
    gamma = torch.tensor([0.25, 1.0, 0.6])

    def per_head():
        return torch.einsum("thd,shd->hts", (x @ q.T).view(5, 3, 4), (x @ k.T).view(5, 3, 4))

    before, old_q, old_k = per_head(), q.clone(), k.clone()
    scale_mha_qk_(q, k, gamma, alpha)
    torch.testing.assert_close(per_head(), before * gamma.double()[:, None, None])
    assert torch.equal(q[4:8], old_q[4:8]) and torch.equal(k[4:8], old_k[4:8])
    torch.testing.assert_close(q[:4], old_q[:4] * 0.25**alpha)
    torch.testing.assert_close(k[:4], old_k[:4] * 0.25 ** (1 - alpha))


BAD = [
    ({"qk_clip_threshold": 0.0}, "qk_clip_threshold=0.0 must be > 0"),
    ({"qk_clip_threshold": math.nan}, "qk_clip_threshold=nan"),
    ({"form": "heads"}, "form='heads' must be one of"),
    ({"alpha": -0.1}, r"alpha=-0.1 must be in \[0, 1\]"),
    ({"alpha": 1.1}, "alpha=1.1"),
    ({"layers": []}, "no attention layer has scale_qk_"),
    ({"layers": [recorder([9e9]), SimpleNamespace(max_logits=None)]}, "layer 1 has recorded no logits"),
    ({"layers": [recorder([9e9]), recorder([1.0, 2.0])]}, r"\[1, 2\] heads"),
    ({"layers": [recorder([9e9, 1.0]), recorder([1.0, math.nan])]}, r"\[\[1, 1\]\] have max_logits that are"),
    ({"layers": [recorder([math.inf, 1.0])]}, r"\[\[0, 0\]\]"),
    ({"layers": [recorder([-math.inf, 1.0])]}, r"\[\[0, 0\]\]"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_input_is_named_and_nothing_is_scaled(bad, message):
    arguments = {"layers": [recorder([9e9])]} | bad
    layers = arguments.pop("layers")
    with pytest.raises(ValueError, match=message):
        qk_clip_(layers, **arguments)
    assert all(not layer.calls for layer in layers if hasattr(layer, "calls"))


@pytest.mark.parametrize("bad", [(6, 4, 1.0), (5, 5, 1.0), (6, 6, 0.0), (6, 6, math.nan)])
def test_bad_multi_head_attention(bad):
    with pytest.raises(ValueError, match="same number of rows|one positive factor"):
        scale_mha_qk_(*(torch.ones(rows, 3) for rows in bad[:2]), torch.tensor([1.0, bad[2]]))


def clip_on_a_rank(rank, folder):
    """Clip the layers on this rank's half of the batch; then with an overflow on rank 1 alone."""
    torch.set_num_threads(1)
    place = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=20)}
    dist.init_process_group("gloo", f"file://{folder}/store", **place)
    messages, reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, op: messages.append(op) or reduce(tensor, op)
    layers = [forward(layer, x.chunk(2)[rank]) for layer, x in (make(seed=seed) for seed in range(2))]
    report = qk_clip_(layers, qk_clip_threshold=5.0)
    result = {"weights": [layer.state_dict() for layer in layers], "seen": report.max_logits}
    result |= {"messages": len(messages), "gamma": report.gamma, "error": ""}
    layers[0].max_logits = torch.tensor([1.0, math.nan if rank == 1 else 1.0, 1.0, 1.0])
    try:
        qk_clip_(layers[:1])
    except ValueError as error:
        result["error"] = str(error)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_clip_as_one_process_with_the_whole_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.multiprocessing.spawn(clip_on_a_rank, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    layers = [forward(*make(seed=seed)) for seed in range(2)]
    report = qk_clip_(layers, qk_clip_threshold=5.0)
    assert 0 < report.fraction_clipped < 1
    for result in results:
        assert result["messages"] == 1  # for both layers
        torch.testing.assert_close(result["seen"], report.max_logits)
        torch.testing.assert_close(result["gamma"], report.gamma)
        assert "[[0, 1]] have max_logits that are not finite" in result["error"]
    for layer, *states in zip(layers, *(result["weights"] for result in results), strict=True):
        for name, weight in layer.state_dict().items():
            assert torch.equal(states[0][name], states[1][name])
            torch.testing.assert_close(states[0][name], weight)


def tiny(seed=0):
    torch.manual_seed(seed)
    model = Transformer(TINY)
    for layer in model.attention_layers:
        nn.init.normal_(layer.q_b_proj.weight, std=1.0)
        nn.init.normal_(layer.kv_b_proj.weight, std=1.0)
    return model


def batch(step):
    ids = torch.randint(0, TINY.vocab_size, (2, 13), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def run(model, optimizers, steps):
    """Take these steps with all the optimizers; return the weights."""
    for step in steps:
        model.zero_grad()
        model.loss(*batch(step)).backward()
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def halves(model, lr):
    """Return our Muon and torch's AdamW over the split of `model`."""
    split, sides = split_parameters(model), {"adamw": [], "muon": []}
    for name, p in model.named_parameters():
        sides[split[name][0]].append(p)
    adamw = torch.optim.AdamW(sides["adamw"], lr, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, fused=True)
    return [Muon(sides["muon"], lr, momentum=0.8), adamw]


@pytest.mark.parametrize("threshold", [0.5, math.inf])
def test_muonclip_is_muon_and_torchs_adamw_and_then_the_clip_under_a_scheduler(threshold):
    model, twin = tiny(), tiny()
    twin.track_max_logits()
    optimizer, parts = MuonClip(model, **OPTIONS, qk_clip_threshold=threshold), halves(twin, 0.01)
    schedulers = [LambdaLR(part, lambda step: 0.5**step) for part in (optimizer, *parts)]
    fractions = []
    for step in range(4):
        ours, _ = run(model, [optimizer], [step]), run(twin, parts, [step])
        expected = qk_clip_(twin.attention_layers, qk_clip_threshold=threshold)
        for scheduler in schedulers:
            scheduler.step()
        assert all(torch.equal(p, ours[name]) for name, p in twin.named_parameters())
        assert torch.equal(optimizer.last_clip.gamma, expected.gamma)
        assert torch.equal(optimizer.last_clip.max_logits, expected.max_logits)
        assert all(layer.max_logits is None for layer in model.attention_layers)
        fractions.append(expected.fraction_clipped)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 / 16] * 2
    assert expected.gamma.shape == (TINY.num_hidden_layers, H) and (max(fractions) > 0) == (threshold < 1)


def test_state_dict_round_trip_continues_to_the_bit():
    model = tiny()
    optimizer = MuonClip(model, **OPTIONS, qk_clip_threshold=0.5)
    run(model, [optimizer], range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    expected = run(model, [optimizer], range(3, 6))
    weights, state = torch.load(file, weights_only=True)
    resumed = tiny(seed=1)
    resumed.load_state_dict(weights)
    again = MuonClip(resumed, lr=9.0, qk_clip_threshold=0.5)  # the loaded settings replace the rest
    again.load_state_dict(state)
    for name, weight in run(resumed, [again], range(3, 6)).items():
        assert torch.equal(weight, expected[name]), name
    assert torch.equal(again.last_clip.gamma, optimizer.last_clip.gamma)
    other = MuonClip(tiny().to("meta"))  # stands for a GPU: every part of the state must follow
    other.load_state_dict(state)
    assert {t.device.type for s in other.state.values() for t in s.values()} == {"meta"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_bad_logits_raise_before_anything_changes(bad):
    model = tiny()
    optimizer = MuonClip(model)
    before = run(model, [], [0])
    model.layers[1].attention.max_logits = None if bad is None else torch.tensor([1.0, bad, 1.0, 1.0])
    with pytest.raises(ValueError, match="layer 1 has recorded no logits|not finite"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not optimizer.state


def test_hooks_and_closures_run_once_and_no_gradient_means_no_update():
    model = tiny()
    optimizer, calls = MuonClip(model), []
    Muon([nn.Parameter(torch.eye(2))])  # torch wraps step() of every class that is used
    optimizer.register_step_post_hook(lambda *_: calls.append(optimizer.last_clip is not None))

    before = run(model, [], [])
    assert optimizer.step(lambda: model.loss(*batch(0)).item()) == pytest.approx(
        math.log(TINY.vocab_size), rel=0.1
    )
    assert calls == [True] and not optimizer.state
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_groups_added_later_and_adamw_step_for_step():
    model, twin = tiny(), nn.Parameter(torch.ones(5))
    grown = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))]
    optimizer = MuonClip(model, **OPTIONS, weight_decay=0.3)
    optimizer.add_param_group({"params": grown[:1]})
    optimizer.add_param_group({"params": grown[1:], "use_muon": False})
    adamw = torch.optim.AdamW([twin], 0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, foreach=False)
    for step in range(5):
        grown[0].grad = torch.ones(3, 4)
        grown[1].grad = twin.grad = torch.randn(5, generator=torch.Generator().manual_seed(step)) * 1e-6
        run(model, [optimizer, adamw], [step])
        torch.testing.assert_close(grown[1], twin, atol=1e-6, rtol=0)
    assert (twin - 1).abs().max() > 0.01
    assert set(optimizer.state[grown[0]]) == {"momentum_buffer"} and grown[0].max() < 1.0


BAD_OPTIONS = [
    ({"model": nn.Linear(2, 2)}, "no attention layer has scale_qk_"),
    ({"qk_clip_threshold": -1.0}, "qk_clip_threshold=-1.0"),
    ({"qk_clip_form": "all"}, "form='all'"),
    ({"qk_clip_alpha": 2.0}, "alpha=2.0"),
    ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas=\(0.9, 1.0\) must be in \[0, 1\)"),
    ({"adamw_eps": -1.0}, "adamw_eps=-1.0 must be >= 0"),
    ({"lr": -1.0}, "lr=-1.0 must be >= 0"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_OPTIONS)
def test_bad_settings_of_muonclip(bad, message):
    with pytest.raises(ValueError, match=message):
        MuonClip(**({"model": tiny()} | bad))
