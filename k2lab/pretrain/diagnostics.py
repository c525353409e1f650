"""What to watch while a K2-style model trains: expert load, attention logits, updates, spectra."""

import pandas as pd
import torch

from k2lab.model.moe import max_violation
from k2lab.model.transformer import Transformer
from k2lab.optim.muon import split_parameters
from k2lab.pretrain.corpus import Corpus
from k2lab.pretrain.trainer import Callback


def max_vio(step: int, model: Transformer) -> dict[str, float]:
    """Return {"max_vio": MaxVio of the last update's load, averaged over the expert layers}.

    A callback for `train`; see `max_violation` for the formula, its range and its source. A model
    without expert layers gives an empty dict.
    """
    violations = [max_violation(moe.last_load).item() for moe in model.moe_layers]
    return {"max_vio": sum(violations) / len(violations)} if violations else {}


@torch.no_grad()
def validation_load(
    model: Transformer, corpus: Corpus, *, num: int, batch_size: int, seq_len: int
) -> torch.Tensor:
    """Return each expert's load on fixed validation text over the mean load, (expert layers, E).

    Counts the choices of every router over the `num` batches of `corpus.val_batches`; 1 everywhere
    is an even load. The model's own counts are untouched. Raises `ValueError` for a model without
    expert layers.
    """
    loads = {moe.router: torch.zeros(moe.config.n_routed_experts) for moe in model.moe_layers}
    if not loads:
        raise ValueError(f"first_k_dense_replace={model.config.first_k_dense_replace}: no layer has experts")

    def count(router, args, output):
        chosen = output[1].flatten().cpu()
        loads[router] += torch.bincount(chosen, minlength=len(loads[router]))

    was_training, device = model.training, model.embed_tokens.weight.device
    handles = [router.register_forward_hook(count) for router in loads]
    model.eval()
    try:
        for inputs, _ in corpus.val_batches(num, batch_size, seq_len):
            model.hidden(inputs.to(device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    stacked = torch.stack(list(loads.values()))
    return stacked / stacked.mean(-1, keepdim=True)


def max_logits(optimizer: torch.optim.Optimizer | None = None) -> Callback:
    """Return a callback for `train` that records the largest attention logits of each update.

    Columns: s_max, the largest of all; max_logits, S_max of each head, (layers, H) as nested lists;
    fraction_clipped, the share of heads that QK-Clip scaled. With a `MuonClip` they come from its report.
    With any other optimizer they are read from the attention layers, for which
    `model.track_max_logits()` must be on, and forgotten, so that each update starts anew.
    """

    def callback(step: int, model: Transformer) -> dict:
        if report := getattr(optimizer, "last_clip", None):
            largest, clipped = report.max_logits, report.fraction_clipped
        else:
            largest, clipped = torch.stack([layer.max_logits for layer in model.attention_layers]), 0.0
            model.track_max_logits()
        return {"s_max": largest.max().item(), "max_logits": largest, "fraction_clipped": clipped}

    return callback


def update_rms(model: Transformer) -> Callback:
    """Return a callback for `train`: {"update_rms": root mean square change of the hidden matrices}.

    The mean over the matrices that `split_parameters` gives to Muon, weight decay included; divide by
    the row's lr to compare optimizers. Keeps one copy of those matrices.
    """
    names = [name for name, (kind, _) in split_parameters(model).items() if kind == "muon"]
    before = {name: model.get_parameter(name).detach().clone() for name in names}

    @torch.no_grad()
    def callback(step: int, model: Transformer) -> dict[str, float]:
        sizes = []
        for name, old in before.items():
            now = model.get_parameter(name)
            sizes.append((now - old).square().mean().sqrt())
            old.copy_(now)
        return {"update_rms": torch.stack(sizes).mean().item()}

    return callback


def spectrum(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Summarise the singular values s_1 >= ... >= s_r of matrices (..., n, m), r = min(n, m).

    spectral_norm     s_1
    svd_entropy       -sum_i p_i log p_i / log r with p_i = s_i^2 / sum_j s_j^2, in [0, 1]; 1 when all are
                      equal (Moonlight, arXiv 2502.16982, section 3.4)
    effective_rank    exp(-sum_i q_i log q_i) with q_i = s_i / sum_j s_j, in [1, r] (Roy and Vetterli 2007)

    Each has the leading shape. Raises `ValueError` for a matrix with one row or column, whose entropy is
    not defined, and for a zero matrix.
    """
    if min(weight.shape[-2:]) < 2:
        raise ValueError(f"shape {tuple(weight.shape)}: the entropy needs two singular values or more")
    values = torch.linalg.svdvals(weight.detach().float())
    if not (values[..., 0] > 0).all():
        raise ValueError("a zero matrix has no spectrum to summarise: train it first")

    def entropy(share):
        return torch.special.entr(share / share.sum(-1, keepdim=True)).sum(-1)

    log_rank = torch.tensor(values.shape[-1]).log()
    return {
        "spectral_norm": values[..., 0],
        "svd_entropy": entropy(values.square()) / log_rank,
        "effective_rank": entropy(values).exp(),
    }


def weight_spectra(model: Transformer) -> pd.DataFrame:
    """Return `spectrum` of every hidden matrix, one row each: parameter, kind, then the three measures.

    kind is the parameter's last name (q_b_proj, router, ...), to group by; a stack of experts is one row,
    the mean over its matrices.
    """
    rows = []
    for name, (chosen, _) in split_parameters(model).items():
        if chosen == "muon":
            parts = name.removesuffix(".weight").split(".")
            means = {k: v.mean().item() for k, v in spectrum(model.get_parameter(name)).items()}
            rows.append({"parameter": name, "kind": parts[-1], **means})
    return pd.DataFrame(rows)
