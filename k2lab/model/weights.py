"""Own the translation of weights between this model and Hugging Face's `DeepseekV3ForCausalLM`.

Both hold the same matrices; the names differ, and experts come in three layouts: ours stacks each
projection, model repositories store one matrix per expert, and transformers 5 stacks gate over up.
"""

import re

import torch

from k2lab.model.config import ModelConfig
from k2lab.model.transformer import Transformer

# our name on the left, theirs on the right; applied in order to whole state-dict keys
_NAMES = [
    ("embed_tokens.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("norm.weight", "model.norm.weight"),
    (".attention_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
    (".q_a_norm.", ".q_a_layernorm."),
    (".kv_a_norm.", ".kv_a_layernorm."),
    (".kv_a_proj.", ".kv_a_proj_with_mqa."),
    (".router.expert_bias", ".gate.e_score_correction_bias"),
    (".router.", ".gate."),
]


def _rename(key: str, pairs) -> str:
    """Replace each part; a part without a leading dot counts only at the start of the key."""
    for old, new in pairs:
        if old.startswith("."):
            key = key.replace(old, new)
        elif key.startswith(old):
            key = new + key.removeprefix(old)
    return key


def to_hf(state: dict[str, torch.Tensor], *, layout: str = "hub") -> dict[str, torch.Tensor]:
    """Return a `Transformer` state dict under the names of `DeepseekV3ForCausalLM`.

    `layout` is "hub" (one matrix per expert, as in the published checkpoints) or "fused" (transformers 5
    in memory: `experts.gate_up_proj` (E, 2 I, D) and `experts.down_proj`). Raises `ValueError` for another.
    """
    if layout not in ("hub", "fused"):
        raise ValueError(f"layout={layout!r}: must be 'hub' or 'fused'")
    out = {}
    for key, value in state.items():
        name = _rename(key, _NAMES)
        prefix, found, part = name.partition(".experts.")
        if not found:
            out[name] = value
        elif layout == "hub":
            out |= {f"{prefix}.experts.{e}.{part}.weight": matrix for e, matrix in enumerate(value)}
        elif part == "gate_proj":
            out[f"{prefix}.experts.gate_up_proj"] = torch.cat(
                (value, state[key.replace("gate_", "up_")]), dim=1
            )
        elif part == "down_proj":
            out[name] = value
    return out


def from_hf(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return a state dict that `Transformer(config).load_state_dict` takes, from either layout.

    Multi-token prediction layers (behind the last one, with an `eh_proj`) are left out: they are not
    part of the main model. Raises `ValueError` naming the keys that are missing, unknown or of a wrong shape,
    as in a truncated checkpoint.
    """
    back = [(new, old) for old, new in _NAMES]
    extra = {match[1] for key in state if (match := re.match(r"model\.layers\.(\d+)\.eh_proj\.", key))}
    out, stacks = {}, {}
    for key, value in state.items():
        layer = re.match(r"model\.layers\.(\d+)\.", key)
        if layer and layer[1] in extra and int(layer[1]) >= config.num_hidden_layers:
            continue
        name = _rename(key, back)
        single = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if single:
            stacks.setdefault(f"{single[1]}.{single[3]}", {})[int(single[2])] = value
        elif name.endswith(".experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            out[stem + "gate_proj"], out[stem + "up_proj"] = value.chunk(2, dim=1)
        else:
            out[name] = value
    for name, matrices in stacks.items():
        wrong = set(range(config.n_routed_experts)) ^ set(matrices)
        if wrong:
            raise ValueError(f"{name}: experts {sorted(wrong)} are missing, or beyond n_routed_experts")
        if len(shapes := {tuple(matrix.shape) for matrix in matrices.values()}) > 1:
            raise ValueError(f"{name}: experts have different shapes {sorted(shapes)}")
        out[name] = torch.stack([matrices[e] for e in range(config.n_routed_experts)])
    _check(out, config)
    return out


def _check(state, config):
    """Compare names and shapes with those of the model, built without memory."""
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in Transformer(config).state_dict().items()}
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unknown {name}" for name in state if name not in wanted]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("checkpoint does not fit the config: " + "; ".join(problems[:5]) + more)
