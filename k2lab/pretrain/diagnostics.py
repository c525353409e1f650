"""What to watch while a K2-style model trains: how evenly its experts are used."""

import torch

from k2lab.model.moe import max_violation
from k2lab.model.transformer import Transformer
from k2lab.pretrain.corpus import Corpus


def max_vio(step: int, model: Transformer) -> dict[str, float]:
    """Return {"max_vio": MaxVio of the last update's load, averaged over the expert layers}.

    A callback for `train`; see `max_violation` for the formula, its range and its source.
    """
    loads = torch.stack([moe.last_load for moe in model.moe_layers])
    return {"max_vio": max_violation(loads).mean().item()}


@torch.no_grad()
def validation_load(model: Transformer, corpus: Corpus, *, num: int, batch_size: int, seq_len: int):
    """Return each expert's load on fixed validation text over the mean load, (expert layers, E).

    Passes the `num` batches of `corpus.val_batches` through the model in training mode, where it
    counts, without gradients; 1 everywhere is an even load, and the mean over E is always 1.
    """
    was_training = model.training
    model.train()
    model.update_expert_bias(0.0)  # start the counts anew
    for inputs, targets in corpus.val_batches(num, batch_size, seq_len):
        model.loss(inputs, targets)
    model.update_expert_bias(0.0)
    model.train(was_training)
    loads = torch.stack([moe.last_load for moe in model.moe_layers])
    return loads / loads.mean(-1, keepdim=True)
