"""ModelConfig: validation, and the Hugging Face config.json both ways."""

from dataclasses import replace

import pytest
from transformers import DeepseekV3Config

from k2lab.model import DEEPSEEK_V3, K2, MOONLIGHT, SMALL, TINY, ModelConfig, RopeScaling


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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings"),
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
