"""Own the arithmetic of a config: parameters, FLOPs per token and cache bytes, without building the model.

A multiply-add counts as 2 FLOPs, and every active parameter as one multiply-add, norms and biases
included; rotations, the softmax and the input embedding (a lookup) count as none. The test suite builds
the full K2 without memory and compares its parameters with `ledger`.
"""

import pandas as pd

from k2lab.model.config import ModelConfig


def attention_parameters(config: ModelConfig) -> int:
    """Count the weights of one MLA layer, the norms of its latents included."""
    c = config
    heads, qk = c.num_attention_heads, c.qk_head_dim
    if c.q_lora_rank is None:
        queries = c.hidden_size * heads * qk
    else:
        queries = c.hidden_size * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * heads * qk
    down = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    up = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    return queries + down + up + heads * c.v_head_dim * c.hidden_size


def ledger(config: ModelConfig) -> pd.DataFrame:
    """List the model's parameters line by line: part, parameters per unit, units, total, active per token.

    *Active* is what one token uses: K of the E routed experts, everything else. The router line holds
    the E bias entries, which are counted though no gradient trains them. Sum the `total` and `active`
    columns for the model's; the paper's sizes leave open which embeddings they count.
    """
    c = config
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    moe, k = c.num_moe_layers, c.num_experts_per_tok
    rows = [
        ("input embedding", c.vocab_size * c.hidden_size, 1, 1),
        ("attention", attention_parameters(c), c.num_hidden_layers, c.num_hidden_layers),
        (
            "dense feed-forward",
            3 * c.hidden_size * c.intermediate_size,
            *[c.first_k_dense_replace] * 2,
        ),
        ("router and its bias", c.n_routed_experts * (c.hidden_size + 1), moe, moe),
        ("shared experts", expert, moe * c.n_shared_experts, moe * c.n_shared_experts),
        ("routed experts", expert, moe * c.n_routed_experts, moe * k),
        ("norms", c.hidden_size, *[2 * c.num_hidden_layers + 1] * 2),
        ("output head", c.vocab_size * c.hidden_size, 1, 1),
    ]
    table = pd.DataFrame(rows, columns=["part", "each", "units", "active_units"])
    table["total"] = table["each"] * table["units"]
    table["active"] = table["each"] * table["active_units"]
    return table.set_index("part")[["each", "units", "total", "active"]]


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Return (total, active per token) parameters, both embeddings included."""
    table = ledger(config)
    return int(table["total"].sum()), int(table["active"].sum())


# ways to count attention: logit and value widths per head, share of the context that a token sees
ACCOUNTINGS = ("mha", "mha_nope", "mha_causal", "absorbed")


def flops_per_token(config: ModelConfig, context: int, accounting: str = "mha_causal") -> float:
    """Return the forward FLOPs of one token at a context of `context` tokens; training costs 3 times that.

    2 * (active parameters without the input embedding) + 2 * layers * heads * context * width, where
    `accounting` sets the last factors: "mha" counts logits over nope + rope dims plus values, for the
    last token; "mha_nope" leaves the rope dims out; "mha_causal" is "mha" averaged over the positions of
    a sequence (context / 2); "absorbed" counts decoding on the latents, (L + rope) + L per head. Raises
    `ValueError` for another name or a negative context.
    """
    if accounting not in ACCOUNTINGS:
        raise ValueError(f"accounting={accounting!r}: must be one of {ACCOUNTINGS}")
    if context < 0:
        raise ValueError(f"context={context}: must be >= 0 tokens")
    c = config
    widths = {
        "mha": c.qk_head_dim + c.v_head_dim,
        "mha_nope": c.qk_nope_head_dim + c.v_head_dim,
        "mha_causal": (c.qk_head_dim + c.v_head_dim) / 2,
        "absorbed": 2 * c.kv_lora_rank + c.qk_rope_head_dim,
    }
    weights = parameter_counts(c)[1] - c.vocab_size * c.hidden_size
    return 2 * weights + 2 * c.num_hidden_layers * c.num_attention_heads * context * widths[accounting]


def kv_cache_bytes(
    config: ModelConfig,
    tokens: int,
    *,
    kind: str = "mla",
    num_kv_heads: int = 8,
    value_bytes: int = 2,
) -> int:
    """Return the bytes that cached keys and values of `tokens` tokens take, over all layers.

    "mla" stores c_kv and one rotary key, L + R values a layer; "mha" a key and a value for every head;
    "gqa" for `num_kv_heads` heads, one for each group of queries. `value_bytes` is 2 in bfloat16. Raises
    `ValueError` for another kind or heads that do not divide evenly.
    """
    c = config
    if kind not in ("mla", "mha", "gqa"):
        raise ValueError(f"kind={kind!r}: must be 'mla', 'mha' or 'gqa'")
    if tokens < 0 or value_bytes < 1:
        raise ValueError(f"tokens={tokens}, value_bytes={value_bytes}: must be at least 0 and 1")
    if kind == "gqa" and (num_kv_heads < 1 or c.num_attention_heads % num_kv_heads):
        raise ValueError(
            f"num_kv_heads={num_kv_heads} must divide num_attention_heads={c.num_attention_heads}"
        )
    per_head = c.qk_head_dim + c.v_head_dim
    heads = c.num_attention_heads if kind == "mha" else num_kv_heads
    width = c.kv_lora_rank + c.qk_rope_head_dim if kind == "mla" else heads * per_head
    return tokens * c.num_hidden_layers * width * value_bytes
