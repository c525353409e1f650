"""Routing, dispatch and balance against a dense loop and published constants."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from k2lab.model import DEEPSEEK_V3, K2, MOONLIGHT, SMALL, TINY
from k2lab.model.moe import (
    MoE,
    _padded_linear,
    grouped_linear,
    max_violation,
    routed_scaling_factor,
    sequence_balance_loss,
)

GROUPED = replace(TINY, n_group=4, topk_group=2, num_experts_per_tok=3, n_shared_experts=2)


def make(config, seed=0):
    torch.manual_seed(seed)
    layer = MoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.router.expert_bias.normal_(std=0.2)
    return layer, torch.randn(3, 11, config.hidden_size)


def dense(layer, x):
    """Route one token at a time by the equations, looping over every expert."""
    c, experts, out = layer.config, layer.experts, torch.zeros_like(x)
    for b, t in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        scores = (layer.router.weight @ x[b, t]).sigmoid()
        biased = (scores + layer.router.expert_bias).tolist()
        size = c.n_routed_experts // c.n_group
        best_two = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(c.n_group)]
        open_groups = sorted(range(c.n_group), key=lambda g: -best_two[g])[: c.topk_group]
        allowed = [e for e in range(c.n_routed_experts) if e // size in open_groups]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: c.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) if c.norm_topk_prob else 1.0
        for e in chosen:
            hidden = F.silu(experts.gate_proj[e] @ x[b, t]) * (experts.up_proj[e] @ x[b, t])
            out[b, t] += scores[e] / total * c.routed_scaling_factor * experts.down_proj[e] @ hidden
    return out + layer.shared_experts(x)


@pytest.mark.parametrize("config", [TINY, GROUPED, replace(TINY, norm_topk_prob=False)])
def test_equals_the_dense_loop(config):
    layer, x = make(config)
    torch.testing.assert_close(layer(x), dense(layer, x), atol=1e-4, rtol=1e-4)


def test_gradients_equal_the_dense_loop():
    grads = []
    for forward in (lambda layer, x: layer(x), dense):
        layer, x = make(TINY)
        forward(layer, x).square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 10, 0]])
def test_grouped_and_padded_products_equal_a_loop(counts):
    x, weight = torch.randn(10, 6), torch.randn(4, 5, 6)
    expected = torch.cat([part @ w.T for part, w in zip(x.split(counts), weight, strict=True)])
    for product in (grouped_linear, _padded_linear):
        torch.testing.assert_close(product(x, weight, torch.tensor(counts)), expected)


def test_no_token_is_dropped_under_total_imbalance():
    layer, x = make(TINY)
    layer.router.expert_bias[:2] = 100.0  # every token to the same two experts
    torch.testing.assert_close(layer(x), dense(layer, x), atol=1e-4, rtol=1e-4)
    assert layer.tokens_per_expert[:2].tolist() == [33, 33]


def test_bias_only_selects():
    layer, x = make(TINY)
    _, ids, weights = layer.router(x.flatten(0, 1))
    layer.router.expert_bias += 7.0  # the same for all: same choice, same gates
    _, ids_after, weights_after = layer.router(x.flatten(0, 1))
    assert torch.equal(ids, ids_after)
    assert torch.equal(weights, weights_after)
    total = torch.full((33,), layer.config.routed_scaling_factor)
    torch.testing.assert_close(weights.sum(-1), total)


def test_bias_update_moves_against_the_load_and_balances():
    layer, _ = make(replace(TINY, hidden_size=16))
    with torch.no_grad():
        layer.router.weight[0] += 0.4  # a favourite
    x = torch.randn(4, 128, 16) + 0.5
    violations = []
    for _ in range(150):
        layer(x)
        before = layer.router.expert_bias.clone()
        load = layer.tokens_per_expert.clone()
        layer.update_expert_bias(0.01)
        moved = layer.router.expert_bias - before
        torch.testing.assert_close(moved, 0.01 * torch.sign(load.float().mean() - load))
        violations.append(max_violation(layer.last_load).item())
    assert layer.tokens_per_expert.sum() == 0
    assert violations[0] > 1.0
    assert violations[-1] < 0.3


def test_evaluation_does_not_count():
    layer, x = make(TINY)
    layer.eval()(x)
    assert layer.tokens_per_expert.sum() == 0


def test_sequence_balance_loss():
    even = torch.full((2, 8, 4), 0.5)
    ids = torch.arange(16).view(2, 8, 1) % 4
    assert sequence_balance_loss(even, ids).item() == pytest.approx(1.0)
    # by hand: E=4, K=1, one sequence; f = 4 * (3/4, 1/4, 0, 0), P = mean share
    scores = torch.tensor([[[0.6, 0.2, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]] * 2])
    ids = torch.tensor([[[0], [0], [0], [1]]])
    assert sequence_balance_loss(scores, ids).item() == pytest.approx(3 * 0.55 + 1 * 0.25)


def test_aux_loss_is_left_for_the_trainer():
    layer, x = make(replace(TINY, aux_loss_alpha=0.1))
    layer(x)
    layer.aux_loss.backward()
    assert layer.router.weight.grad.abs().sum() > 0
    assert make(TINY)[0].aux_loss == 0.0


def test_max_violation():
    assert max_violation(torch.tensor([5.0, 5.0, 5.0, 5.0])).item() == 0
    assert max_violation(torch.tensor([20.0, 0.0, 0.0, 0.0])).item() == 3  # E / K - 1


@pytest.mark.parametrize("config", [K2, MOONLIGHT, SMALL, TINY])
def test_moonlights_function_derives_the_published_factors(config):
    derived = routed_scaling_factor(config.n_routed_experts, config.num_experts_per_tok)
    assert derived == pytest.approx(config.routed_scaling_factor, abs=2e-3)
    assert DEEPSEEK_V3.routed_scaling_factor == 2.5  # not derived this way: V3 predates the function
