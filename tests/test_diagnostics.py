"""Expert loads seen from outside the model."""

from dataclasses import replace

import pytest
import torch

from k2lab.model import TINY, Transformer
from k2lab.pretrain.corpus import load_corpus
from k2lab.pretrain.diagnostics import max_vio, validation_load


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(400)))
    return load_corpus(file)


def test_loads_equal_what_the_model_counts_in_training(corpus):
    torch.manual_seed(0)
    model = Transformer(TINY)
    load = validation_load(model, corpus, num=3, batch_size=2, seq_len=20)
    assert model.training
    assert all(moe.tokens_per_expert.sum() == 0 for moe in model.moe_layers)
    for inputs, targets in corpus.val_batches(3, 2, 20):
        model.loss(inputs, targets)
    counts = torch.stack([moe.tokens_per_expert for moe in model.moe_layers]).float()
    assert counts.sum() == 2 * 3 * 2 * 20 * TINY.num_experts_per_tok
    torch.testing.assert_close(load, counts / counts.mean(1, keepdim=True))
    model.update_expert_bias(0.0)
    assert max_vio(1, model)["max_vio"] == pytest.approx((load.amax(1) - 1).mean().item())


def test_a_dense_model_has_no_load(corpus):
    model = Transformer(replace(TINY, first_k_dense_replace=3))
    assert max_vio(1, model) == {}
    with pytest.raises(ValueError, match="first_k_dense_replace=3"):
        validation_load(model, corpus, num=1, batch_size=1, seq_len=20)
