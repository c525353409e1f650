"""ModelConfig: validation, and the Hugging Face config.json both ways."""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from k2lab.model import DEEPSEEK_V3, K2, MOONLIGHT, SMALL, TINY, ModelConfig, RopeScaling
from k2lab.model.attention import rotation, softmax_scale


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok=17"),
        ({"n_group": 3}, "n_group=3"),
        ({"n_group": 16}, "n_group=16"),
        ({"n_group": 4, "topk_group": 5}, "topk_group=5"),
        ({"n_group": 8, "topk_group": 1, "num_experts_per_tok": 3}, "topk_group=1"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace=4"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"q_lora_rank": 0}, "q_lora_rank=0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"n_group": None}, "n_group=None"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
        ({"aux_loss_alpha": float("nan")}, "aux_loss_alpha=nan"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling="),
    ],
)
def test_bad_fields_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        replace(TINY, **change)


@pytest.mark.parametrize("config", [K2, DEEPSEEK_V3, MOONLIGHT, SMALL, TINY])
def test_hf_round_trip(config):
    assert ModelConfig.from_hf(config.to_hf()) == config
    # and through the real class, which writes its own nested form of the rotary fields
    assert ModelConfig.from_hf(DeepseekV3Config(**config.to_hf()).to_dict()) == config


def test_reads_the_published_form():
    published = K2.to_hf() | {
        "model_type": "kimi_k2",
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8"},
        "seq_aux": True,
        "ep_size": 1,
    }
    assert ModelConfig.from_hf(published) == K2


YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": None, "rope_parameters": YARN | {"rope_theta": 1e4}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": None, "rope_parameters": {}},
    ],
)
def test_rotary_fields_mean_what_they_mean_to_transformers(change):
    """Every accepted spelling gives the frequencies, and the scale, of the class that reads it."""
    config = TINY.to_hf() | change
    ours, theirs = ModelConfig.from_hf(config), DeepseekV3Config(**config)
    rotary = DeepseekV3RotaryEmbedding(theirs)
    turns = rotation(ours, 1, 2)[0]
    torch.testing.assert_close(turns.angle() / turns.angle()[0], rotary.inv_freq / rotary.inv_freq[0])
    assert turns.abs()[0].item() == pytest.approx(rotary.attention_scaling)
    with torch.device("meta"):
        assert softmax_scale(ours) == pytest.approx(DeepseekV3Attention(theirs, 0).scaling)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": YARN | {"type": None}}, "of type None"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "one of mscale"),
        ({"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}}, "one of mscale"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "both set"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_another_model_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf(K2.to_hf() | change)


@pytest.mark.parametrize("name", ["kv_lora_rank", "rope_theta", "rope_scaling", "n_group", "model_type"])
def test_a_missing_field_is_named(name):
    config = K2.to_hf()
    del config[name]
    with pytest.raises(ValueError, match=name):
        ModelConfig.from_hf(config)


def test_published_numbers():
    assert (K2.sparsity, DEEPSEEK_V3.sparsity) == (48, 32)
    assert K2.qk_head_dim == 192
    assert K2.rope_scaling == RopeScaling(factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0)
    for config in (K2, SMALL, TINY):  # a dense layer costs as much as the active experts
        active = config.num_experts_per_tok + config.n_shared_experts
        assert config.intermediate_size == active * config.moe_intermediate_size
