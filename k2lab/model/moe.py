"""Own the mixture of experts: router, grouped dispatch, shared experts, and the two ways to balance load.

    s = sigmoid(W_r h)                       one score per expert
    chosen = top-K of s + b                  b, the expert bias, decides who is chosen and nothing else
    gate_i = c * s_i / sum_chosen s_j        c = routed_scaling_factor
    y = shared(h) + sum_chosen gate_i * expert_i(h)

No token is dropped and no Python loop runs over experts: the N * K (token, expert) pairs are sorted by
expert and multiplied in one grouped product. Balance comes from moving b against the load after each
step (loss-free, as in DeepSeek-V3 and K2) or from a sequence-wise auxiliary loss.
Source: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).

Shapes: N = B * T tokens, D hidden, E experts, K chosen per token, I expert width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from k2lab.model.config import ModelConfig


class SwiGLU(nn.Module):
    """Compute down(silu(gate(x)) * up(x)) for x (..., D), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Multiply consecutive groups of rows by their own matrices: y[rows of e] = x[rows of e] @ weight[e].T.

    `x` (M, n) holds `counts[e]` rows for each e in order; `weight` is (E, m, n); the result is (M, m).
    Uses torch's grouped product where this build has it for the type and widths, else one padded
    batched product.
    """
    if torch.is_autocast_enabled(x.device.type):  # autocast does not know the grouped product
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(width * x.element_size() % 16 == 0 for width in weight.shape[1:])
    if hasattr(torch, "_grouped_mm") and aligned and x.dtype != torch.float64:
        return torch._grouped_mm(x, weight.mT, offs=counts.cumsum(0).to(torch.int32))
    return _padded_linear(x, weight, counts)


def _padded_linear(x, weight, counts):
    """Do the same with every group padded to the longest."""
    longest = int(counts.max())
    filled = torch.arange(longest, device=x.device) < counts[:, None]  # (E, longest)
    padded = x.new_zeros(*filled.shape, x.shape[1])
    padded[filled] = x
    return torch.bmm(padded, weight.mT)[filled]


class Router(nn.Module):
    """Choose K experts per token and weigh them, in float32.

    `forward(x)` maps (N, D) to `scores` (N, E) in (0, 1), `topk_ids` (N, K) and `topk_weights` (N, K).
    `expert_bias` (E,) enters the choice only. With n_group > 1 a token may draw only from the
    `topk_group` groups whose two best biased scores have the largest sum (DeepSeek-V3).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.n_routed_experts))

    def _apply(self, fn, recurse=True):
        """Keep the bias in float32 when the model is cast: bfloat16 cannot hold steps of 0.001."""
        super()._apply(fn, recurse)
        self.expert_bias = self.expert_bias.float()
        return self

    def forward(self, x):
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            topk_ids = self._allowed(scores + self.expert_bias).topk(c.num_experts_per_tok, dim=-1).indices
        topk_weights = scores.gather(-1, topk_ids)
        if c.norm_topk_prob:
            topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
        return scores, topk_ids, topk_weights * c.routed_scaling_factor

    def _allowed(self, biased):
        """Put the experts of the groups that a token may not draw from at -inf."""
        c = self.config
        if c.n_group == 1:
            return biased
        groups = biased.unflatten(-1, (c.n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices  # (N, topk_group)
        closed = torch.ones(groups.shape[:2], dtype=torch.bool, device=biased.device).scatter(1, best, False)
        return groups.masked_fill(closed[..., None], float("-inf")).flatten(1)


class Experts(nn.Module):
    """Hold E SwiGLU experts as stacked matrices and apply each to the tokens that chose it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        e, i, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(e, i, d))
        self.up_proj = nn.Parameter(torch.empty(e, i, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, i))

    def forward(self, x, topk_ids, topk_weights, counts):
        """Return sum_k topk_weights[:, k] * expert_{topk_ids[:, k]}(x), (N, D); counts (E,) are the loads."""
        num_chosen = topk_ids.shape[1]
        order = topk_ids.flatten().argsort()  # pairs sorted by expert
        tokens = order // num_chosen
        rows = x.index_select(0, tokens)  # (N * K, D)
        hidden = F.silu(grouped_linear(rows, self.gate_proj, counts)) * grouped_linear(
            rows, self.up_proj, counts
        )
        # the gate goes in before the linear down projection: I columns to multiply instead of D
        hidden = hidden * topk_weights.flatten().index_select(0, order)[:, None].to(hidden.dtype)
        out = grouped_linear(hidden, self.down_proj, counts)
        return torch.zeros_like(x, dtype=out.dtype).index_add(0, tokens, out)


class MoE(nn.Module):
    """Add the chosen experts' and the shared experts' outputs, (B, T, D) to (B, T, D).

    In training mode each forward pass counts `tokens_per_expert` (E,) for `update_expert_bias` and, with
    aux_loss_alpha > 0, leaves the balance loss in `aux_loss`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(
            config.hidden_size, config.n_shared_experts * config.moe_intermediate_size
        )
        self.aux_loss = 0.0
        for name in ("tokens_per_expert", "last_load"):
            zeros = torch.zeros(config.n_routed_experts, dtype=torch.long)
            self.register_buffer(name, zeros, persistent=False)

    def forward(self, x):
        flat = x.flatten(0, 1)  # (N, D)
        scores, topk_ids, topk_weights = self.router(flat)
        counts = torch.bincount(topk_ids.flatten(), minlength=self.config.n_routed_experts)
        self.aux_loss = 0.0
        if self.training:
            self.tokens_per_expert += counts
            if self.config.aux_loss_alpha > 0:
                self.aux_loss = self.config.aux_loss_alpha * sequence_balance_loss(
                    scores.unflatten(0, x.shape[:2]), topk_ids.unflatten(0, x.shape[:2])
                )
        routed = self.experts(flat, topk_ids, topk_weights, counts)
        return routed.view_as(x) + self.shared_experts(x)

    @torch.no_grad()
    def update_expert_bias(self, rate: float) -> None:
        """Move the bias by `rate` (>= 0) towards even load: b_i += rate * sign(mean load - load_i).

        The load is counted over all forward passes in training mode since the last call; it is kept in
        `last_load` and the count starts anew; `aux_loss` is cleared. Source: DeepSeek-V3, section 2.1.2
        (rate 0.001 there).
        """
        load = self.tokens_per_expert
        self.router.expert_bias += rate * torch.sign(load.float().mean() - load)
        self.last_load.copy_(load)
        load.zero_()
        self.aux_loss = 0.0


def routed_scaling_factor(n_routed_experts: int, num_experts_per_tok: int, *, draws: int = 20_000) -> float:
    """Estimate the factor on the gates that keeps the routed output as large as without routing.

    Moonlight's recipe (arXiv 2502.16982): draw router logits from N(0, 1), p = their sigmoids, keep the
    top K, normalise them to sum to 1, and average 1 / sqrt(sum_i p_i^2) over the draws. It gives 2.446
    for 64 experts top-6 and 2.827 for 384 top-8, the published values. Deterministic: the seed is fixed.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(draws, n_routed_experts, generator=generator)
    gates = logits.sigmoid().topk(num_experts_per_tok).values
    gates = gates / gates.sum(-1, keepdim=True)
    return gates.square().sum(-1).rsqrt().mean().item()


def sequence_balance_loss(scores: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """Return DeepSeek-V3's sequence-wise balance loss before its weight alpha, a scalar (1 when even).

    For each sequence of T tokens: sum_i f_i P_i with f_i = E / (K T) * #(tokens that chose i) and
    P_i = mean over tokens of s_i / sum_j s_j; then the mean over sequences. `scores` is (B, T, E),
    `topk_ids` (B, T, K), the choice that was made; the equations count the top K of the scores without
    the bias, the same while the bias is zero. Source: DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20).
    """
    batch, _, num_experts = scores.shape
    counts = torch.zeros(batch, num_experts, device=scores.device)
    chosen = topk_ids.flatten(1)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=counts.dtype))
    fractions = counts * num_experts / chosen.shape[1]
    shares = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (fractions * shares).sum(-1).mean()


def max_violation(load: torch.Tensor) -> torch.Tensor:
    """Return MaxVio = max_i load_i / mean load - 1 over the last dim: 0 when even, E / K - 1 at worst.

    Source: Wang et al., auxiliary-loss-free load balancing (arXiv 2408.15664, section 4.1).
    """
    load = load.float()
    return load.amax(-1) / load.mean(-1).clamp_min(1e-9) - 1
