"""Expert loads, logits, updates and spectra, each against a direct count."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from k2lab.model import TINY, Transformer
from k2lab.optim import MuonClip, split_parameters
from k2lab.pretrain import TrainConfig, diagnostics, train
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


def trained(corpus, optimizer_of, callback_of, steps=3):
    torch.manual_seed(0)
    model = Transformer(TINY)
    optimizer = optimizer_of(model)
    config = TrainConfig(steps=steps, batch_size=2, seq_len=20, eval_every=0, warmup_steps=0)
    history = train(model, optimizer, corpus, config, callbacks=[callback_of(model, optimizer)])
    return model, optimizer, history


def test_max_logits_agree_between_the_optimizers_report_and_the_layers(corpus):
    """At lr 0 the weights stay, so both ways must see the same logits in every update."""

    def adamw(model):
        model.track_max_logits()
        return torch.optim.AdamW(model.parameters(), lr=0.0)

    def record(model, optimizer):
        return diagnostics.max_logits(optimizer)

    def muon(model):
        return MuonClip(model, lr=0.0, qk_clip_threshold=math.inf)

    _, _, ours = trained(corpus, muon, record)
    _, _, other = trained(corpus, adamw, record)
    assert np.array(ours.max_logits.tolist()).shape == (3, TINY.num_hidden_layers, TINY.num_attention_heads)
    assert ours.max_logits.tolist() == other.max_logits.tolist()
    assert ours.s_max.tolist() == [np.max(row) for row in ours.max_logits]
    assert ours.max_logits[0] != ours.max_logits[1]  # every update starts anew
    assert set(ours.fraction_clipped) == {0.0}


def test_fraction_clipped_counts_the_heads_above_the_threshold(corpus):
    def muon(model):
        return MuonClip(model, lr=0.0, qk_clip_threshold=1e-6)

    _, _, history = trained(corpus, muon, lambda m, o: diagnostics.max_logits(o), steps=1)
    above = np.mean(np.array(history.max_logits[0]) > 1e-6)
    assert history.fraction_clipped[0] == pytest.approx(above)
    assert above > 0


def test_update_rms_is_the_change_since_the_update_before(corpus):
    snapshots = []

    def record(model, optimizer):
        hidden = [name for name, (kind, _) in split_parameters(model).items() if kind == "muon"]
        inner = diagnostics.update_rms(model)

        def snapshot(step, model):
            snapshots.append([model.get_parameter(name).detach().clone() for name in hidden])
            return inner(step, model)

        snapshot(0, model)
        return snapshot

    _, _, history = trained(corpus, lambda model: torch.optim.SGD(model.parameters(), lr=0.5), record)
    for row, old, new in zip(history.itertuples(), snapshots, snapshots[1:], strict=False):
        sizes = [(n - o).pow(2).mean().sqrt().item() for o, n in zip(old, new, strict=True)]
        assert row.update_rms == pytest.approx(np.mean(sizes), rel=1e-5)


def test_spectrum_of_known_singular_values():
    values = torch.tensor([3.0, 2.0, 1.0])
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[0] for n in (5, 3))
    found = diagnostics.spectrum((u[:, :3] * values) @ v.T)
    assert found["spectral_norm"].item() == pytest.approx(3, rel=1e-5)
    assert found["svd_entropy"].item() == pytest.approx(
        scipy.stats.entropy((values**2).numpy(), base=3), rel=1e-5
    )
    assert found["effective_rank"].item() == pytest.approx(math.exp(scipy.stats.entropy(values)), rel=1e-5)
    even = diagnostics.spectrum(torch.eye(4).expand(2, 4, 4))
    torch.testing.assert_close(even["svd_entropy"], torch.ones(2))
    torch.testing.assert_close(even["effective_rank"], torch.full((2,), 4.0))


@pytest.mark.parametrize(("weight", "message"), [(torch.ones(1, 4), "(1, 4)"), (torch.zeros(3, 3), "zero")])
def test_spectrum_refuses_what_has_none(weight, message):
    with pytest.raises(ValueError, match="shape|zero") as error:
        diagnostics.spectrum(weight)
    assert message in str(error.value)


def test_weight_spectra_has_one_row_per_hidden_matrix():
    torch.manual_seed(0)
    model = Transformer(TINY)
    table = diagnostics.weight_spectra(model).set_index("parameter")
    hidden = [name for name, (kind, _) in split_parameters(model).items() if kind == "muon"]
    assert table.index.tolist() == hidden
    stack = model.layers[1].mlp.experts.gate_proj
    norms = [torch.linalg.matrix_norm(w, 2).item() for w in stack]
    row = table.loc["layers.1.mlp.experts.gate_proj"]
    assert row.kind == "gate_proj" and row.spectral_norm == pytest.approx(np.mean(norms), rel=1e-5)
