"""The ledger against the built model and published sizes."""

from dataclasses import replace

import pytest
import torch

from k2lab.model import DEEPSEEK_V3, K2, MOONLIGHT, SMALL, TINY, Transformer
from k2lab.model.accounting import (
    attention_parameters,
    flops_per_token,
    kv_cache_bytes,
    ledger,
    parameter_counts,
)

HEADS_128 = replace(K2, num_attention_heads=128)


def built(config):
    """Count the parameters and bias entries of the model itself, built without memory."""
    with torch.device("meta"):
        model = Transformer(config)
    biases = sum(moe.router.expert_bias.numel() for moe in model.moe_layers)
    return sum(p.numel() for p in model.parameters()) + biases, biases


@pytest.mark.parametrize("config", [K2, DEEPSEEK_V3, MOONLIGHT, SMALL, TINY])
def test_ledger_equals_the_built_model(config):
    assert parameter_counts(config)[0] == built(config)[0]


def test_published_sizes():
    assert parameter_counts(K2) == (1_026_408_232_448, 32_861_500_928)
    assert built(K2)[1] == 23_040
    assert parameter_counts(DEEPSEEK_V3) == (671_026_419_200, 37_552_297_472)
    all_moe = replace(K2, first_k_dense_replace=0)
    assert parameter_counts(all_moe) == (1_042_970_097_536, 32_864_253_824)
    total, active = parameter_counts(MOONLIGHT)
    embeddings = 2 * MOONLIGHT.vocab_size * MOONLIGHT.hidden_size
    assert (total - embeddings) / 1e9 == pytest.approx(15.29, abs=0.005)
    assert (active - embeddings) / 1e9 == pytest.approx(2.24, abs=0.005)
    assert attention_parameters(K2) - 1536 - 512 == 101_124_096 - 2048
    assert ledger(K2).loc["routed experts", "each"] == 44_040_192


@pytest.mark.parametrize(
    ("accounting", "gflops_64", "gflops_128"),
    [
        ("mha", 390.9, 728.8),
        ("mha_nope", 325.4, 597.8),
        ("mha_causal", 227.1, 401.4),
        ("absorbed", 1176.8, 2300.8),
    ],
)
def test_flops_at_128k(accounting, gflops_64, gflops_128):
    for config, expected in ((K2, gflops_64), (HEADS_128, gflops_128)):
        got = flops_per_token(config, 131_072, accounting) / 1e9
        assert got == pytest.approx(expected, abs=0.15)


def test_flops_equal_those_torch_counts(monkeypatch):
    """torch's own counter sees the same matrix products in a naive, uncached forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    def loop(x, weight, counts):  # the counter does not know the grouped product
        parts = x.split(counts.tolist())
        return torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True)])

    monkeypatch.setattr("k2lab.model.moe.grouped_linear", loop)
    length = 64  # one block of queries: the whole square of logits is computed, as in "mha"
    model = Transformer(SMALL).eval()
    for layer in model.attention_layers:
        layer.form = "naive"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long))
    table, latents = ledger(SMALL), SMALL.q_lora_rank + SMALL.kv_lora_rank
    vectors = table.loc["norms", "total"] + SMALL.num_hidden_layers * latents
    vectors += SMALL.num_moe_layers * SMALL.n_routed_experts  # norms and biases multiply no matrix
    expected = flops_per_token(SMALL, length, "mha") - 2 * vectors
    assert expected == counter.get_total_flops() / length


def test_cache_bytes():
    assert kv_cache_bytes(K2, 1) == 70_272
    assert kv_cache_bytes(K2, 131_072) / 1e9 == pytest.approx(9.2, abs=0.02)
    assert kv_cache_bytes(K2, 1, kind="mha") == 61 * 64 * (192 + 128) * 2
    assert kv_cache_bytes(K2, 1, kind="gqa") * 8 == kv_cache_bytes(K2, 1, kind="mha")


def test_bad_input():
    with pytest.raises(ValueError, match="accounting='x'"):
        flops_per_token(K2, 1, "x")
    with pytest.raises(ValueError, match="context=-1"):
        flops_per_token(K2, -1)
    with pytest.raises(ValueError, match="kind='x'"):
        kv_cache_bytes(K2, 1, kind="x")
    with pytest.raises(ValueError, match="tokens=-1"):
        kv_cache_bytes(K2, -1)
    with pytest.raises(ValueError, match="num_kv_heads=0"):
        kv_cache_bytes(K2, 1, kind="gqa", num_kv_heads=0)
    with pytest.raises(ValueError, match="num_kv_heads=7"):
        kv_cache_bytes(K2, 1, kind="gqa", num_kv_heads=7)
