"""Own multi-head latent attention (MLA): rotary positions with YaRN, the latents, and the latent cache.

A token's keys and values are never stored. They are functions of a narrow latent c_kv (L dims) and one
rotary key k_rope (R dims) shared by all heads, and only those two are cached:

    c_q = norm(W_DQ h)      q_nope, q_rope = W_UQ c_q, RoPE(W_QR c_q)            per head
    c_kv = norm(W_DKV h)    k_nope, v = W_UK c_kv, W_UV c_kv                      per head
                            k_rope = RoPE(W_KR h)                                 shared
    logit = (q_nope . k_nope + q_rope . k_rope) * scale

The *naive* form expands k_nope and v for every cached token. The *absorbed* form moves W_UK to the query
and W_UV behind the softmax, q_nope . W_UK c_kv = (W_UK^T q_nope) . c_kv, so that a decoding step reads
the latents as they lie in the cache. Source: DeepSeek-V3 (arXiv 2412.19437, section 2.1.1).

Shapes: B batch, T queries, S keys, H heads, K nope dims, R rope dims, V value dims, L latent dims.
"""

import math

import torch
from torch import nn

from k2lab.model.config import ModelConfig, RopeScaling

LATENT_EPS = 1e-6  # the published code norms the latents with this, whatever rms_norm_eps says
BLOCK = 128  # queries per block of causal attention: block i skips the keys that lie after it


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return 0.1 * mscale * ln(factor) + 1, YaRN's scale for a context extended by `factor` >= 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> torch.Tensor:
    """Return the angles per token of the `dim / 2` rotary pairs, shape (dim / 2,), in radians.

    Plain RoPE: f_i = theta^(-2i / dim). YaRN keeps the pairs that turn more than `beta_fast` times over
    the original length, divides by `factor` those that turn less than `beta_slow` times, and blends
    linearly between the two pair numbers. Source: YaRN (arXiv 2309.00071) in the form of DeepSeek-V3's
    code. Raises `ValueError` for an odd `dim`.
    """
    if dim % 2:
        raise ValueError(f"dim={dim}: RoPE turns dims in pairs, use an even number")
    freqs = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return freqs

    def pair_that_turns(times):
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    interpolated = ramp.clamp(0, 1)
    return freqs / scaling.factor * interpolated + freqs * (1 - interpolated)


def rotation(config: ModelConfig, start: int, end: int, device=None) -> torch.Tensor:
    """Return the unit complex numbers e^(i t f_j) for positions t in start..end-1, (end - start, R / 2)."""
    scaling = config.rope_scaling
    freqs = rope_frequencies(config.qk_rope_head_dim, config.rope_theta, scaling).to(device)
    angles = torch.outer(torch.arange(start, end, device=device, dtype=torch.float32), freqs)
    size = 1.0
    if scaling is not None:
        size = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return torch.polar(torch.full_like(angles, size), angles)


def apply_rope(x: torch.Tensor, cis: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x_0, x_1), (x_2, x_3), ... of `x` (..., T, R) by `cis` (T, R / 2), in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * cis).flatten(-2).type_as(x)


def softmax_scale(config: ModelConfig) -> float:
    """Return 1 / sqrt(K + R), times YaRN's mscale(factor, mscale_all_dim)^2 when YaRN is on."""
    scaling = config.rope_scaling
    mscale = yarn_mscale(scaling.factor, scaling.mscale_all_dim) if scaling else 1.0
    return mscale**2 / math.sqrt(config.qk_head_dim)


class RMSNorm(nn.RMSNorm):
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dim, in the type of the weight."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class LatentCache:
    """Hold [c_kv ; k_rope] of every layer for the tokens seen so far, L + R values per token and layer.

    `latents` has shape (layers, B, max_len, L + R); `length` counts the filled positions.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_len: int, *, device=None, dtype=None):
        if max_len > config.max_position_embeddings:
            raise ValueError(
                f"max_len={max_len} exceeds max_position_embeddings={config.max_position_embeddings}: "
                "shorten the context or use a config with a longer one"
            )
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (config.num_hidden_layers, batch_size, max_len, width)
        self.latents = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, new: torch.Tensor) -> torch.Tensor:
        """Write `new` (B, T, L + R) behind the filled positions; return all of them, (B, S, L + R)."""
        end = self.length + new.shape[1]
        if end > self.latents.shape[2]:
            raise ValueError(f"cache of {self.latents.shape[2]} positions cannot hold {end}: raise max_len")
        self.latents[layer, :, self.length : end] = new
        return self.latents[layer, :, :end]


class MLA(nn.Module):
    """Multi-head latent attention with decoupled RoPE.

    `forward(x, cis, cache=None, layer=0)` maps (B, T, D) to (B, T, D). `form` chooses how cached tokens
    are read: "naive", "absorbed", or "auto", the one with fewer multiplications for the queries and keys
    at hand; both compute the same function.

    With `track_max_logits` on, `max_logits` (H,) holds S_max^h, the largest scaled, unmasked logit of
    each head (signed), over all forward passes in training mode since it was last set to None;
    `scale_qk_` multiplies every logit of a head by a factor. QK-Clip needs these two members and
    nothing else.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        heads, ranks = c.num_attention_heads, c.q_lora_rank
        if ranks is None:
            self.q_proj = nn.Linear(c.hidden_size, heads * c.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(c.hidden_size, ranks, bias=False)  # W_DQ
            self.q_a_norm = RMSNorm(ranks, eps=LATENT_EPS)
            self.q_b_proj = nn.Linear(ranks, heads * c.qk_head_dim, bias=False)  # W_UQ, W_QR
        self.kv_a_proj = nn.Linear(
            c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False
        )  # W_DKV, W_KR
        self.kv_a_norm = RMSNorm(c.kv_lora_rank, eps=LATENT_EPS)
        self.kv_b_proj = nn.Linear(
            c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False
        )  # W_UK, W_UV
        self.o_proj = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=False)
        self.scale = softmax_scale(c)
        self.form = "auto"
        self.track_max_logits = False
        self.max_logits = None

    def queries(self, x, cis):
        """Return q_nope (B, T, H, K) and the rotated q_rope (B, T, H, R)."""
        c = self.config
        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q = q.unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return q_nope, apply_rope(q_rope, cis[:, None])

    def latents(self, x, cis):
        """Return what is cached of `x`: [c_kv ; k_rope], (B, T, L + R)."""
        c_kv, k_rope = self.kv_a_proj(x).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        return torch.cat((self.kv_a_norm(c_kv), apply_rope(k_rope, cis)), dim=-1)

    def forward(self, x, cis, cache=None, layer=0):
        q_nope, q_rope = self.queries(x, cis)
        latents = self.latents(x, cis)
        if cache is not None:
            latents = cache.append(layer, latents.to(cache.latents.dtype)).to(x.dtype)
        absorbed = self.form == "absorbed" or (self.form == "auto" and self._absorbing_pays(x, latents))
        read = self._absorbed if absorbed else self._naive
        return self.o_proj(read(q_nope, q_rope, latents).flatten(-2))

    def _absorbing_pays(self, x, latents):
        """Compare multiplications per head: expanding S tokens against wider logits for T queries."""
        c = self.config
        t, s = x.shape[1], latents.shape[1]
        widths = c.qk_nope_head_dim + c.v_head_dim
        naive = s * c.kv_lora_rank * widths + t * s * widths
        return t * c.kv_lora_rank * widths + 2 * t * s * c.kv_lora_rank < naive

    def _naive(self, q_nope, q_rope, latents):
        """Expand keys and values for every token, then attend: (B, T, H, V)."""
        c = self.config
        c_kv, k_rope = latents.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_rope = k_rope[:, :, None].expand(-1, -1, c.num_attention_heads, -1)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2).flatten(0, 1)  # (B * H, T, K + R)
        k = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2).flatten(0, 1)  # (B * H, S, K + R)
        out = self._attend(q, k, v.transpose(1, 2).flatten(0, 1))
        return out.unflatten(0, (-1, c.num_attention_heads)).transpose(1, 2)

    def _absorbed(self, q_nope, q_rope, latents):
        """Attend to the latents themselves, one key and value for all heads: (B, T, H, V)."""
        c = self.config
        w_uk, w_uv = self._up_projections()
        q_latent = torch.einsum("bthk,hkl->bthl", q_nope, w_uk)
        q = torch.cat((q_latent, q_rope), dim=-1).flatten(1, 2)  # (B, T * H, L + R)
        out = self._attend(q, latents, latents[..., : c.kv_lora_rank], group=c.num_attention_heads)
        return torch.einsum("bthl,hvl->bthv", out.unflatten(1, (-1, c.num_attention_heads)), w_uv)

    def _up_projections(self):
        """Return W_UK (H, K, L) and W_UV (H, V, L), views of `kv_b_proj`."""
        c = self.config
        weight = self.kv_b_proj.weight.unflatten(0, (c.num_attention_heads, -1))
        return weight.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)

    def _attend(self, q, k, v, group=1):
        """Causal softmax attention by blocks of queries; `group` consecutive rows of q share a position."""
        length = q.shape[1] // group
        past = k.shape[1] - length
        blocks = []
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            rows = q[:, start * group : end * group]
            future = torch.full((end - start, past + end), -math.inf, dtype=q.dtype, device=q.device)
            mask = future.triu(past + start + 1).repeat_interleave(group, dim=0)
            logits = torch.baddbmm(mask, rows, k[:, : past + end].mT, alpha=self.scale)
            if self.track_max_logits and self.training:
                self._record(logits.detach(), group)
            blocks.append(logits.softmax(-1).to(v.dtype) @ v[:, : past + end])
        return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]

    def _record(self, logits, group):
        """Fold (B * H, rows, S), or (B, T * H, S) when heads share a key, into the running maximum."""
        heads = self.config.num_attention_heads
        best = logits.amax(-1)
        if group > 1:
            best = best.unflatten(1, (-1, heads)).amax((0, 1))
        else:
            best = best.unflatten(0, (-1, heads)).amax((0, 2))
        self.max_logits = best if self.max_logits is None else torch.maximum(self.max_logits, best)

    @torch.no_grad()
    def scale_qk_(self, gamma: torch.Tensor, alpha: float = 0.5) -> None:
        """Multiply every logit of head h by gamma[h] (H,), in place, as K2's QK-Clip does.

        The nope parts of query and key take gamma^alpha and gamma^(1 - alpha), sqrt(gamma) each by
        default; the rotary query takes gamma, because the rotary key is shared by all heads and must stay
        as it is (Kimi K2 report, section 2.1). Raises `ValueError` unless gamma has shape (H,) and is
        positive and finite.
        """
        c = self.config
        if gamma.shape != (c.num_attention_heads,) or not ((gamma > 0) & gamma.isfinite()).all():
            raise ValueError(
                f"gamma={gamma.tolist()}: need one positive factor for each of {c.num_attention_heads} heads"
            )
        projection = self.q_proj if c.q_lora_rank is None else self.q_b_proj
        query = projection.weight.unflatten(0, (c.num_attention_heads, -1))  # (H, K + R, in), a view
        gamma = gamma[:, None, None]
        query[:, : c.qk_nope_head_dim] *= gamma**alpha
        query[:, c.qk_nope_head_dim :] *= gamma
        self._up_projections()[0].mul_(gamma ** (1 - alpha))
