"""Expert loads seen from outside the model."""

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


def test_loads_equal_the_routers_choices(corpus):
    torch.manual_seed(0)
    model = Transformer(TINY).eval()
    chosen = [torch.zeros(TINY.n_routed_experts) for _ in model.moe_layers]

    def count(module, args, output):
        i = next(i for i, moe in enumerate(model.moe_layers) if moe.router is module)
        chosen[i] += output[1].flatten().bincount(minlength=16)

    handles = [moe.router.register_forward_hook(count) for moe in model.moe_layers]
    load = validation_load(model, corpus, num=3, batch_size=2, seq_len=20)
    for handle in handles:
        handle.remove()
    assert sum(chosen[0]) == 3 * 2 * 20 * TINY.num_experts_per_tok
    torch.testing.assert_close(load, torch.stack([c / c.mean() for c in chosen]))
    expected = sum((c.max() / c.mean() - 1).item() for c in chosen) / 2
    assert max_vio(1, model)["max_vio"] == pytest.approx(expected)
    assert not model.training
    assert all(m.tokens_per_expert.sum() == 0 for m in model.moe_layers)
    assert all(m.router.expert_bias.abs().sum() == 0 for m in model.moe_layers)
