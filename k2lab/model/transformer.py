"""Own the K2-style decoder: pre-norm blocks of MLA and MoE, untied head, loss in nats per token.

- RMSNorm before attention, before the feed-forward part and before the head; no biases anywhere
- multi-head latent attention with decoupled RoPE (attention.py)
- the first layers dense SwiGLU, the others sigmoid-routed experts plus a shared one (moe.py)
- untied input embedding and output head
- the function, and with `weights.py` the weights, of Hugging Face's `DeepseekV3ForCausalLM`

Legend: B batch, T tokens, D hidden size, H heads, E experts, K experts per token, L kv latent, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from k2lab.model.attention import MLA, LatentCache, RMSNorm, rotation
from k2lab.model.config import ModelConfig
from k2lab.model.moe import MoE, SwiGLU


class Block(nn.Module):
    """Add attention, then the feed-forward part, each on a normed copy of the stream: (B, T, D) to same."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = MLA(config)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(self, x, cis, cache=None, layer=0):
        x = x + self.attention(self.attention_norm(x), cis, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Predict the next token: `model(input_ids)` maps (B, T) token ids to logits (B, T, V).

    Weights start as N(0, initializer_range^2), norms at one, biases of the router at zero; draw them
    reproducibly under `torch.manual_seed`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, input_ids: torch.Tensor, cache: LatentCache | None = None) -> torch.Tensor:
        """Return logits (B, T, V); with a cache, `input_ids` continue what it holds and are appended.

        Raises `ValueError` when the context would exceed `max_position_embeddings`.
        """
        return self.lm_head(self.hidden(input_ids, cache))

    def hidden(self, input_ids: torch.Tensor, cache: LatentCache | None = None) -> torch.Tensor:
        """Return the normed last hidden states (B, T, D), which the head turns into logits."""
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids of shape {tuple(input_ids.shape)}: need (B, T) with T >= 1")
        start = 0 if cache is None else cache.length
        end = start + input_ids.shape[1]
        if end > self.config.max_position_embeddings:
            raise ValueError(
                f"context of {end} tokens exceeds max_position_embeddings="
                f"{self.config.max_position_embeddings}: shorten it or raise the config's limit"
            )
        cis = rotation(self.config, start, end, device=input_ids.device)
        x = self.embed_tokens(input_ids)
        for layer, block in enumerate(self.layers):
            x = block(x, cis, cache, layer)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def loss(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy in nats per token of `targets` (B, T); -100 marks ignored ones."""
        logits = self(input_ids)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE of every block that has one, in order."""
        return [block.mlp for block in self.layers if isinstance(block.mlp, MoE)]

    @property
    def attention_layers(self) -> list[MLA]:
        """The attention of every block, in order."""
        return [block.attention for block in self.layers]

    def aux_loss(self) -> torch.Tensor | float:
        """Return the weighted balance loss of the last forward pass, summed over layers (0 when off)."""
        return sum(moe.aux_loss for moe in self.moe_layers)

    def update_expert_bias(self, rate: float) -> None:
        """Move every router's selection bias against its load since the last call (see `MoE`)."""
        for moe in self.moe_layers:
            moe.update_expert_bias(rate)

    def track_max_logits(self, on: bool = True) -> None:
        """Switch the per-head record of the largest logit on or off, and start it anew."""
        for attention in self.attention_layers:
            attention.track_max_logits, attention.max_logits = on, None
