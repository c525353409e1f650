"""The K2-style model: config, latent attention, experts, decoder, weights, generation, accounting."""

from k2lab.model.attention import MLA, LatentCache, apply_rope, rotation
from k2lab.model.config import DEEPSEEK_V3, K2, MOONLIGHT, SMALL, TINY, ModelConfig, RopeScaling
from k2lab.model.generate import generate
from k2lab.model.transformer import Transformer
