"""The decoder against Hugging Face's DeepseekV3ForCausalLM, weights both ways."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from k2lab.model import TINY, RopeScaling, Transformer
from k2lab.model.attention import LatentCache
from k2lab.model.weights import from_hf, to_hf

YARN = RopeScaling(factor=8.0, original_max_position_embeddings=16)
VARIANTS = {
    "plain": TINY,
    "yarn": replace(TINY, rope_scaling=YARN),
    "yarn_mscales": replace(TINY, rope_scaling=replace(YARN, mscale=0.7, mscale_all_dim=0.5, beta_fast=4.0)),
    "groups": replace(TINY, n_group=4, topk_group=2, num_experts_per_tok=3),
    "shared": replace(TINY, n_shared_experts=2, first_k_dense_replace=2),
    "full_rank_queries": replace(TINY, q_lora_rank=None, norm_topk_prob=False),
    "everything": replace(TINY, rope_scaling=YARN, n_group=4, topk_group=2, n_shared_experts=2),
}


def pair(config, seed=0):
    """Make our model with large random weights and a random bias, and theirs with the same."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns about a short test context
    torch.manual_seed(seed)
    ours = Transformer(replace(config, initializer_range=0.2)).eval()
    for moe in ours.moe_layers:
        moe.router.expert_bias.normal_(std=0.1)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**config.to_hf())).eval()
    theirs.load_state_dict(to_hf(ours.state_dict(), layout="fused"))
    return ours, theirs


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_same_function_as_hugging_face(name):
    config = VARIANTS[name]
    ours, theirs = pair(config)
    ids = torch.randint(0, config.vocab_size, (2, 40))
    expected = theirs(ids).logits
    assert expected.abs().max() > 1  # large enough for 1e-4 to mean something
    for form in ("naive", "absorbed"):
        for layer in ours.attention_layers:
            layer.form = form
        torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)
        cache = LatentCache(config, 2, 40)
        parts = [ours(ids[:, :30], cache)] + [ours(ids[:, i : i + 1], cache) for i in range(30, 40)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=0)


def test_same_loss_and_gradients_as_hugging_face():
    ours, theirs = pair(VARIANTS["everything"])
    ids = torch.randint(0, TINY.vocab_size, (2, 41))
    loss = ours.train().loss(ids[:, :-1], ids[:, 1:])
    expected = theirs.train()(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    loss.backward()
    expected.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    theirs_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, grad in to_hf(grads, layout="fused").items():
        torch.testing.assert_close(grad, theirs_grads[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_weights_round_trip(layout):
    ours, theirs = pair(VARIANTS["everything"])
    state = ours.state_dict()
    back = from_hf(to_hf(state, layout=layout), ours.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    fused = from_hf(theirs.state_dict(), ours.config)
    assert all(torch.equal(fused[name], value) for name, value in state.items())


def test_reads_and_writes_a_real_checkpoint_folder(tmp_path):
    """transformers reads our hub layout from disk by its own loader, and we read what it saves."""
    from safetensors.torch import load_file, save_file

    ours, theirs = pair(VARIANTS["groups"])
    theirs.config.save_pretrained(tmp_path)
    save_file(to_hf(ours.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, TINY.vocab_size, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, ours(ids), atol=1e-4, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    state = from_hf(load_file(tmp_path / "again" / "model.safetensors"), ours.config)
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())


def test_broken_checkpoints_are_refused_by_name():
    state = to_hf(Transformer(TINY).state_dict())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.up_proj: experts \[3\] are missing"):
        from_hf({k: v for k, v in state.items() if k != name}, TINY)
    with pytest.raises(ValueError, match=r"missing lm_head.weight"):
        from_hf({k: v for k, v in state.items() if k != "lm_head.weight"}, TINY)
    with pytest.raises(ValueError, match=r"norm.weight has shape \(3,\), not \(64,\)"):
        from_hf(state | {"model.norm.weight": torch.ones(3)}, TINY)
    with pytest.raises(ValueError, match="unknown extra"):
        from_hf(state | {"extra": torch.ones(3)}, TINY)
    with pytest.raises(ValueError, match="layout='x'"):
        to_hf(state, layout="x")
    with pytest.raises(ValueError, match=r"experts \[16\] are missing, or beyond"):
        from_hf(state | {name.replace(".3.", ".16."): state[name]}, TINY)
    with pytest.raises(ValueError, match="different shapes"):
        from_hf(state | {name: torch.ones(3, 3)}, TINY)
    with pytest.raises(ValueError, match=r"unknown layers.2"):
        from_hf(state, replace(TINY, num_hidden_layers=2))
    mtp = {f"model.layers.3.{part}.weight": torch.ones(3) for part in ("eh_proj", "enorm")}
    assert from_hf(state | mtp, TINY).keys() == Transformer(TINY).state_dict().keys()


def test_context_beyond_the_maximum_is_refused():
    model = Transformer(replace(TINY, max_position_embeddings=8))
    with pytest.raises(ValueError, match="context of 9 tokens"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_hooks_for_the_training_loop():
    model = Transformer(replace(TINY, aux_loss_alpha=0.01))
    ids = torch.randint(0, TINY.vocab_size, (2, 16))
    model.track_max_logits()
    model.loss(ids, ids)
    assert model.aux_loss().item() > 0
    assert [layer.max_logits.shape for layer in model.attention_layers] == [(4,)] * 3
    model.update_expert_bias(0.5)
    for moe in model.moe_layers:
        assert moe.last_load.sum() == 2 * 16 * TINY.num_experts_per_tok
        assert moe.router.expert_bias.abs().max() == 0.5
    model.track_max_logits(False)
    model.loss(ids, ids)
    assert model.attention_layers[0].max_logits is None
    assert Transformer(TINY).aux_loss() == 0


def test_a_model_can_be_copied_and_cast_while_it_trains():
    model = Transformer(replace(TINY, aux_loss_alpha=0.01))
    ids = torch.randint(0, TINY.vocab_size, (2, 16))
    model.loss(ids, ids).backward()
    model.update_expert_bias(0.5)
    copied = copy.deepcopy(model).bfloat16().train()
    copied.loss(ids, ids)
    assert copied.aux_loss() > 0
    copied.eval().loss(ids, ids)
    assert copied.aux_loss() == 0
    assert copied.moe_layers[0].router.expert_bias.dtype == torch.float32
    assert copied.moe_layers[0].tokens_per_expert.sum() == 2 * 16 * TINY.num_experts_per_tok


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Transformer(TINY)(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(1, 0\)"):
        Transformer(TINY)(torch.zeros(1, 0, dtype=torch.long))


def test_trains_in_bfloat16_autocast():
    model = Transformer(TINY)
    ids = torch.randint(0, TINY.vocab_size, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model.loss(ids, ids), atol=0.02, rtol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_starts_near_uniform():
    torch.manual_seed(0)
    ids = torch.randint(0, TINY.vocab_size, (4, 64))
    loss = Transformer(TINY).loss(ids, ids)
    assert loss.item() == pytest.approx(torch.tensor(TINY.vocab_size).log().item(), abs=0.05)
