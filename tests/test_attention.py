"""MLA against transformers' rotary code, its own two forms, and a plain softmax."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from k2lab.model import DEEPSEEK_V3, K2, TINY, RopeScaling, Transformer
from k2lab.model.attention import (
    MLA,
    LatentCache,
    apply_rope,
    rope_frequencies,
    rotation,
    softmax_scale,
)

YARN = RopeScaling(factor=8.0, original_max_position_embeddings=16)


def make(config=TINY, length=9, seed=0):
    torch.manual_seed(seed)
    layer = MLA(config).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, length, config.hidden_size, dtype=torch.double)
    return layer, x, rotation(config, 0, length)


@pytest.mark.parametrize("config", [K2, DEEPSEEK_V3], ids=["K2", "V3"])
def test_yarn_matches_transformers(config):
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config(**config.to_hf()))
    ours = rope_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
    torch.testing.assert_close(ours, theirs)
    assert factor == 1.0
    assert rotation(config, 5, 6).abs().allclose(torch.ones(1))


def test_k2_keeps_20_rotary_pairs_and_interpolates_12():
    ratio = rope_frequencies(64, K2.rope_theta) / rope_frequencies(64, K2.rope_theta, K2.rope_scaling)
    torch.testing.assert_close(ratio, torch.tensor([1.0] * 20 + [32.0] * 12))


def test_softmax_scale_holds_yarns_mscale_squared():
    assert softmax_scale(TINY) == pytest.approx(TINY.qk_head_dim**-0.5)
    assert softmax_scale(K2) * math.sqrt(192) == pytest.approx(1.8133, abs=1e-4)
    assert softmax_scale(DEEPSEEK_V3) * math.sqrt(192) == pytest.approx(1.8739, abs=1e-4)


def test_rope_depends_on_distance_only():
    cis = rotation(TINY, 0, 30)
    q, k = torch.randn(8), torch.randn(8)

    def logit(i, j):
        return apply_rope(q[None], cis[i : i + 1])[0] @ apply_rope(k[None], cis[j : j + 1])[0]

    assert logit(7, 3).item() == pytest.approx(logit(24, 20).item(), abs=1e-5)
    assert logit(7, 3).item() != pytest.approx(logit(7, 4).item(), abs=1e-3)
    with pytest.raises(ValueError, match="dim=7"):
        rope_frequencies(7, 10_000.0)


def reference(layer, x, cis):
    """Attend one query at a time, with separate loops over heads: the textbook form."""
    c = layer.config
    q_nope, q_rope = layer.queries(x, cis)
    c_kv, k_rope = layer.latents(x, cis).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    w_uk, w_uv = layer._up_projections()
    out, best = torch.zeros(*x.shape[:2], c.num_attention_heads, c.v_head_dim).double(), {}
    for b in range(x.shape[0]):
        for h in range(c.num_attention_heads):
            keys, values = c_kv[b] @ w_uk[h].T, c_kv[b] @ w_uv[h].T
            for t in range(x.shape[1]):
                past = slice(0, t + 1)
                logits = keys[past] @ q_nope[b, t, h] + k_rope[b, past] @ q_rope[b, t, h]
                logits = logits * layer.scale
                best[h] = max(best.get(h, -math.inf), logits.max().item())
                out[b, t, h] = logits.softmax(0) @ values[past]
    return layer.o_proj(out.flatten(-2)), torch.tensor(list(best.values()))


@pytest.mark.parametrize("form", ["naive", "absorbed"])
@pytest.mark.parametrize("block", [4, 128])
def test_both_forms_equal_the_textbook_and_see_the_max_logit(form, block, monkeypatch):
    monkeypatch.setattr("k2lab.model.attention.BLOCK", block)
    layer, x, cis = make(replace(TINY, rope_scaling=YARN))
    layer.form, layer.track_max_logits = form, True
    expected, best = reference(layer, x, cis)
    torch.testing.assert_close(layer(x, cis), expected)
    torch.testing.assert_close(layer.max_logits, best.double())


def test_gradients_of_both_forms_agree():
    grads = []
    for form in ("naive", "absorbed"):
        layer, x, cis = make()
        layer.form = form
        layer(x, cis).square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    for naive, absorbed in zip(*grads, strict=True):
        torch.testing.assert_close(naive, absorbed)


def test_max_logits_run_over_micro_batches_and_cost_nothing_when_off():
    layer, x, cis = make()
    layer(x, cis)
    assert layer.max_logits is None
    layer.track_max_logits = True
    layer.eval()(x, cis)
    assert layer.max_logits is None  # an evaluation says nothing about the step
    layer.train()
    singles = []
    for row in x:
        layer.max_logits = None
        layer(row[None], cis)
        singles.append(layer.max_logits)
    layer.max_logits = None
    layer(x[:1], cis), layer(x[1:], cis)
    torch.testing.assert_close(layer.max_logits, torch.stack(singles).amax(0))


@pytest.mark.parametrize("q_lora_rank", [16, None])
def test_scale_qk_scales_each_heads_logits_by_exactly_gamma(q_lora_rank):
    layer, x, cis = make(replace(TINY, q_lora_rank=q_lora_rank))
    layer.track_max_logits = True
    layer(x, cis)
    before, key = layer.max_logits, layer.kv_a_proj.weight.clone()
    gamma = torch.tensor([1.0, 0.5, 0.25, 1.0]).double()
    values = layer._up_projections()[1].clone()
    layer.max_logits = None
    layer.scale_qk_(gamma)
    layer(x, cis)
    torch.testing.assert_close(layer.max_logits, before * gamma)
    assert torch.equal(layer.kv_a_proj.weight, key)
    assert torch.equal(layer._up_projections()[1], values)
    with pytest.raises(ValueError, match="gamma"):
        layer.scale_qk_(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="gamma"):
        layer.scale_qk_(torch.full((4,), float("inf")))
    with pytest.raises(ValueError, match="gamma"):
        layer.scale_qk_(torch.ones(3))


@pytest.mark.parametrize("form", ["naive", "absorbed", "auto"])
def test_cached_equals_uncached(form):
    torch.manual_seed(0)
    model = Transformer(replace(TINY, initializer_range=0.2, rope_scaling=YARN)).eval()
    for layer in model.attention_layers:
        layer.form = form
    ids = torch.randint(0, TINY.vocab_size, (2, 12))
    cache = LatentCache(model.config, 2, 12)
    with torch.no_grad():
        parts = [model(ids[:, a:b], cache) for a, b in [(0, 5), (5, 9), (9, 10), (10, 11), (11, 12)]]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="cannot hold 13"):
            model(ids[:, :1], cache)


def test_cache_holds_the_latents_only():
    cache = LatentCache(K2, 1, 3, device="meta")
    assert cache.latents.shape == (61, 1, 3, 512 + 64)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        LatentCache(TINY, 1, TINY.max_position_embeddings + 1)
