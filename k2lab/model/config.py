"""Own the shape of a K2-style model: one config object with the field names of K2's `config.json`.

Presets: `K2`, `DEEPSEEK_V3` and `MOONLIGHT` hold the published numbers; `SMALL` and `TINY` keep K2's
proportions at a size that a laptop CPU trains in minutes. `ModelConfig.from_hf` reads a Hugging Face
`config.json` and refuses whatever it would have to guess.
"""

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Hold the YaRN parameters of a rotary embedding (Peng et al. 2023; field names of `config.json`)."""

    factor: float  # context extension, new length / original length
    original_max_position_embeddings: int  # length in tokens that the unscaled model was trained at
    beta_fast: float = 32.0  # pairs that turn more often than this over the original length are kept
    beta_slow: float = 1.0  # pairs that turn less often than this are interpolated by 1/factor
    mscale: float = 1.0  # numerator of the scale on cos and sin
    mscale_all_dim: float = 1.0  # its denominator, and the scale of the softmax (0 = none)

    def __post_init__(self):
        _check_numbers(self, {"factor": 1, "original_max_position_embeddings": 1})
        _check_numbers(self, {"mscale": 0, "mscale_all_dim": 0})
        _check_numbers(self, {"beta_fast": 0, "beta_slow": 0}, above=True)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Describe a K2-style decoder with the field names and meanings of K2's `config.json`.

    Every field is a count, a width in units or a dimensionless factor, as its comment says. Raises
    `ValueError` naming the field, its value, what is allowed and the fix.
    """

    vocab_size: int  # tokens in the vocabulary, V
    hidden_size: int  # width of the residual stream, D
    num_hidden_layers: int  # decoder blocks
    num_attention_heads: int  # heads H; MLA has as many keys as queries
    intermediate_size: int  # SwiGLU width of the leading dense layers
    moe_intermediate_size: int  # SwiGLU width of one expert
    n_routed_experts: int  # experts to choose from, E
    num_experts_per_tok: int  # experts chosen per token, K
    n_shared_experts: int = 1  # experts that every token visits
    first_k_dense_replace: int = 1  # leading layers with a dense SwiGLU instead of experts
    routed_scaling_factor: float = 1.0  # factor on the gates, see moe.routed_scaling_factor
    norm_topk_prob: bool = True  # gates of the chosen experts sum to 1 before the factor
    n_group: int = 1  # groups of experts for group-limited routing (1 = none)
    topk_group: int = 1  # groups a token may draw from
    aux_loss_alpha: float = 0.0  # weight of the sequence-wise balance loss (0 = off)
    q_lora_rank: int | None  # width of the query latent c_q; None = full-rank queries
    kv_lora_rank: int  # width of the key-value latent c_kv, L
    qk_nope_head_dim: int  # per-head query and key dims without position
    qk_rope_head_dim: int  # per-head rotary dims, R (even); the rotary key is shared by all heads
    v_head_dim: int  # per-head value dims
    max_position_embeddings: int = 4096  # longest context in tokens
    rope_theta: float = 50_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # YaRN, or none
    rms_norm_eps: float = 1e-6  # epsilon of the norms on the residual stream
    initializer_range: float = 0.02  # standard deviation of the weights at initialisation

    def __post_init__(self):
        counts = {f.name: 1 for f in fields(self) if f.type is int} | {"first_k_dense_replace": 0}
        if self.q_lora_rank is not None:
            counts["q_lora_rank"] = 1
        for name in counts:
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a whole number")
        _check_numbers(self, counts | {"aux_loss_alpha": 0})
        positive = ("routed_scaling_factor", "rope_theta", "rms_norm_eps", "initializer_range")
        _check_numbers(self, dict.fromkeys(positive, 0), above=True)
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(f"rope_scaling={self.rope_scaling!r}: must be a RopeScaling or None")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim}: RoPE turns dims in pairs, use an even number"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace}: must lie in "
                f"0..num_hidden_layers={self.num_hidden_layers}"
            )
        self._check_routing()

    def _check_routing(self):
        e, k, groups, kept = (
            self.n_routed_experts,
            self.num_experts_per_tok,
            self.n_group,
            self.topk_group,
        )
        if k > e:
            raise ValueError(f"num_experts_per_tok={k} exceeds n_routed_experts={e}: lower the first")
        if e % groups:
            raise ValueError(f"n_group={groups} must divide n_routed_experts={e}")
        if groups > 1 and e // groups < 2:
            raise ValueError(f"n_group={groups}: a group is scored by its best 2 of {e // groups} experts")
        if not 1 <= kept <= groups:
            raise ValueError(f"topk_group={kept}: must lie in 1..n_group={groups}")
        if k > kept * (e // groups):
            raise ValueError(
                f"num_experts_per_tok={k} exceeds the {kept * (e // groups)} experts that "
                f"topk_group={kept} groups hold: raise topk_group"
            )

    @property
    def qk_head_dim(self) -> int:
        """Query and key dims per head, nope + rope; the softmax divides by its square root."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Decoder blocks that hold experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def sparsity(self) -> float:
        """Routed experts over chosen experts, the paper's sparsity (48 for K2)."""
        return self.n_routed_experts / self.num_experts_per_tok

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """Build a config from the dict of a Hugging Face `config.json` of K2 or DeepSeek-V3.

        Reads the flat form of the model repositories (`rope_theta`, `rope_scaling`) and the nested one
        of transformers 5 (`rope_parameters`). Multi-token prediction layers are not part of the main
        model and are left out. Raises `ValueError` naming the field when it belongs to another
        architecture, is missing, or is unknown and so might change the model.
        """
        config = _flat_rope(config)
        for name, allowed in _FIXED.items():
            if name in config and config[name] not in allowed:
                raise ValueError(f"{name}={config[name]!r}: this model supports only {allowed}")
        heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
        if kv_heads not in (None, heads):
            raise ValueError(
                f"num_key_value_heads={kv_heads}: MLA has one key per query head ({heads}), not grouped ones"
            )
        names = {f.name for f in fields(cls)}
        unknown = set(config) - names - set(_FIXED) - _IGNORED
        if unknown:
            raise ValueError(
                f"unknown fields {sorted(unknown)}: they might change the model; remove them if not"
            )
        missing = (names | {"model_type"}) - set(config) - _OPTIONAL
        if missing:
            raise ValueError(
                f"missing fields {sorted(missing)}: each changes the model, add them (null for none)"
            )
        known = {k: v for k, v in config.items() if k in names}
        return cls(**known | {"rope_scaling": _yarn(config["rope_scaling"])})

    def to_hf(self) -> dict:
        """Return the `config.json` dict of the same model, as `DeepseekV3ForCausalLM` reads it."""
        scaling = self.rope_scaling and {"type": "yarn", **asdict(self.rope_scaling)}
        return {
            **asdict(self),
            "rope_scaling": scaling,
            "num_key_value_heads": self.num_attention_heads,
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "num_nextn_predict_layers": 0,
        }


def _check_numbers(config, lowest: dict[str, float], *, above: bool = False) -> None:
    """Refuse a field below its lowest value, or at it when `above`; None and not-a-number too."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if not isinstance(value, int | float) or not (value > low or (value == low and not above)):
            raise ValueError(f"{name}={value!r}: must be {'above' if above else 'at least'} {low}")


def _flat_rope(config: dict) -> dict:
    """Return the config with transformers 5's `rope_parameters` as `rope_theta` and `rope_scaling`."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters", None) or {})
    if rope and config.get("rope_scaling"):
        raise ValueError("rope_scaling and rope_parameters are both set: keep the one that is meant")
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope:
        config["rope_scaling"] = rope
    return config


def _yarn(scaling: dict | None) -> RopeScaling | None:
    """Read the `rope_scaling` entry of a config.json; a null counts as an absent entry."""
    if scaling is None:
        return None
    scaling = {name: value for name, value in scaling.items() if value is not None}
    kinds = {scaling.pop(name) for name in ("type", "rope_type") if name in scaling}
    if kinds == {"default"}:
        return None
    if kinds != {"yarn"}:
        raise ValueError(f"rope_scaling of type {sorted(kinds) or None}: must be 'yarn', or null for none")
    unknown = set(scaling) - {f.name for f in fields(RopeScaling)}
    if unknown:
        raise ValueError(f"unknown rope_scaling fields {sorted(unknown)}: remove them if they change nothing")
    missing = {"factor", "original_max_position_embeddings"} - set(scaling)
    if missing:
        raise ValueError(f"missing rope_scaling fields {sorted(missing)}: YaRN needs both")
    given = [bool(scaling.get(name)) for name in ("mscale", "mscale_all_dim")]
    if any(given) and not all(given):
        raise ValueError(
            "rope_scaling has one of mscale, mscale_all_dim: published codes disagree on it, set both"
        )
    # with neither, all published codes scale cos and sin by mscale(factor, 1), and not the softmax
    return RopeScaling(**scaling | ({} if all(given) else {"mscale": 1.0, "mscale_all_dim": 0.0}))


# what this architecture is; another value is another model
_FIXED = {
    "model_type": ("kimi_k2", "deepseek_v3"),
    "architectures": (["DeepseekV3ForCausalLM"], ["KimiK2ForCausalLM"], None),
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "seq_aux": (True,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
}
# may be absent: the published configs leave them out or they only matter in training
_OPTIONAL = {"aux_loss_alpha", "initializer_range"}
# do not change the function that the main model computes
_IGNORED = {
    *("num_key_value_heads", "num_nextn_predict_layers", "torch_dtype", "dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "auto_map"),
    *("quantization_config", "ep_size", "pretraining_tp", "_name_or_path", "output_router_logits"),
    *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
    *("qk_head_dim", "head_dim", "id2label", "label2id", "problem_type", "is_encoder_decoder"),
}


K2 = ModelConfig(
    vocab_size=163_840,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=64,
    intermediate_size=18_432,
    moe_intermediate_size=2048,
    n_routed_experts=384,
    num_experts_per_tok=8,
    routed_scaling_factor=2.827,
    aux_loss_alpha=0.001,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=131_072,
    rope_scaling=RopeScaling(factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0),
)

DEEPSEEK_V3 = ModelConfig(
    vocab_size=129_280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    intermediate_size=18_432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    routed_scaling_factor=2.5,
    n_group=8,
    topk_group=4,
    aux_loss_alpha=0.001,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=163_840,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(factor=40.0, original_max_position_embeddings=4096),
)

MOONLIGHT = ModelConfig(
    vocab_size=163_840,
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    intermediate_size=11_264,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    routed_scaling_factor=2.446,
    aux_loss_alpha=0.001,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
)

# K2's proportions, rounded to multiples of 8: q_lora 0.21 D, kv_lora 0.07 D, nope : rope : v = 2 : 1 : 2
# with H * v about D, expert width 2/7 D, one dense layer as wide as K + 1 experts, heads about layers.
# What does not fit is the sparsity of 48: 48 experts top-4 is 12, 16 experts top-2 is 8.
SMALL = ModelConfig(
    vocab_size=1024,
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=280,
    moe_intermediate_size=56,
    n_routed_experts=48,
    num_experts_per_tok=4,
    routed_scaling_factor=1.998,
    q_lora_rank=40,
    kv_lora_rank=16,
    qk_nope_head_dim=48,
    qk_rope_head_dim=24,
    v_head_dim=48,
)

TINY = ModelConfig(
    vocab_size=1024,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=16,
    num_experts_per_tok=2,
    routed_scaling_factor=1.412,
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)
