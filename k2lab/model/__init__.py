"""The K2-style model: configuration, latent attention, experts, decoder, weights, generation, accounting."""

from k2lab.model.config import DEEPSEEK_V3, K2, MOONLIGHT, SMALL, TINY, ModelConfig, RopeScaling
from k2lab.model.transformer import Transformer
