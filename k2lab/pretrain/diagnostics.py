"""What to watch while a K2-style model trains: how evenly its experts are used."""

import torch

from k2lab.model.moe import max_violation
from k2lab.model.transformer import Transformer
from k2lab.pretrain.corpus import Corpus


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
