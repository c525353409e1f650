"""Muon beside its peers on the matrices of SMALL, and what tracking logits and clipping add to a step.

The peers take single matrices, so each stack of experts is given to them as its matrices. Before anything
is timed, the updates from equal gradients must agree and ours must be as orthogonal as theirs.
"""

import math
from importlib.metadata import version

import torch

from k2lab.model import SMALL, Transformer
from k2lab.optim import Muon, MuonClip, split_parameters
from tests.benchmarks.timing import interleave

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95}


def hidden_matrices() -> list[torch.nn.Parameter]:
    """Return the parameters of SMALL that Muon updates, with gradients as of a random start."""
    torch.manual_seed(0)
    model = Transformer(SMALL)
    ids = torch.randint(0, SMALL.vocab_size, (4, 257))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    return [model.get_parameter(n) for n, (kind, _) in split_parameters(model).items() if kind == "muon"]


def singly(parameters) -> list[torch.nn.Parameter]:
    """Return copies, with their gradients, in which every stack is taken apart."""
    single = []
    for p in parameters:
        stack, grads = (p.detach(), p.grad) if p.dim() == 3 else (p.detach()[None], p.grad[None])
        for matrix, grad in zip(stack, grads, strict=True):
            single.append(torch.nn.Parameter(matrix.clone()))
            single[-1].grad = grad.clone()
    return single


def peers() -> dict:
    """Return {row: (peer, threads, function from parameters to optimizer, or None)}.

    Each peer has the 0.2 sqrt(max(n, m)) scaling.
    """

    def torchs(p):
        return torch.optim.Muon(p, **SETTINGS, adjust_lr_fn="match_rms_adamw")

    found = {"muon_step": ("torch.optim.Muon", (1, 2), torchs)}
    row = "muon_step_vs_pytorch_optimizer"
    try:
        import pytorch_optimizer
    except ImportError:
        return found | {row: ("pytorch_optimizer is not installed", (1,), None)}

    def theirs(p):
        groups = [{"params": p, "use_muon": True}]
        return pytorch_optimizer.Muon(groups, **SETTINGS, use_adjusted_lr=True)

    return found | {row: (f"pytorch_optimizer {version('pytorch_optimizer')}", (1,), theirs)}


def check(make) -> None:
    """Compare one step of ours and a peer's: same change of the weights, no less orthogonal."""
    ours = hidden_matrices()
    theirs = singly(ours)
    before = [p.detach().clone() for p in theirs]
    for optimizer in (Muon(ours, **SETTINGS), make(theirs)):
        optimizer.step()
    changes = [[p.detach() - b for p, b in zip(now, before, strict=True)] for now in (singly(ours), theirs)]
    mine, peer = (torch.cat([c.flatten() for c in change]) for change in changes)
    assert (mine - peer).norm() < 0.05 * peer.norm(), "the updates differ"
    errors = [sum(orthogonality_error(c, b) for c, b in zip(cs, before, strict=True)) for cs in changes]
    assert errors[0] < 1.01 * errors[1], f"orthogonality errors {errors}"


def orthogonality_error(change, before) -> float:
    """Return |O O^T - I|_F / sqrt(n) of the direction behind a change of one matrix."""
    direction = -(change + SETTINGS["lr"] * SETTINGS["weight_decay"] * before) / SETTINGS["lr"]
    direction = direction / (0.2 * math.sqrt(max(direction.shape)))
    wide = direction if direction.shape[0] <= direction.shape[1] else direction.T
    identity = torch.eye(len(wide))
    return ((wide @ wide.T - identity).norm() / math.sqrt(len(wide))).item()


def bench_muon(make, runs) -> list[float]:
    """Time a step on the same gradients; return steps/s of ours and, unless None, the peer."""
    ours = hidden_matrices()
    if make is None:
        return [1 / s for s in interleave([Muon(ours, **SETTINGS).step], runs)]
    check(make)
    return [1 / s for s in interleave([Muon(ours, **SETTINGS).step, make(singly(ours)).step], runs)]


def training_step(length, *, track, clip):
    """Return a function that trains SMALL for one step of 4 x `length` tokens."""
    torch.manual_seed(0)
    model = Transformer(SMALL)
    ids = torch.randint(0, SMALL.vocab_size, (4, length + 1))
    if clip:  # a threshold that every head passes
        optimizers = [MuonClip(model, **SETTINGS, qk_clip_threshold=1e-9)]
    else:
        split = split_parameters(model)
        kinds = [[model.get_parameter(n) for n in split if split[n][0] == kind] for kind in ("muon", "adamw")]
        optimizers = [Muon(kinds[0], **SETTINGS), torch.optim.AdamW(kinds[1], lr=1e-3, fused=True)]
    model.track_max_logits(track)

    def step():
        model.zero_grad(set_to_none=True)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def bench_tracking(runs) -> list[float]:
    """Time a step at sequence 256 with the record of the largest logits, and without; tokens/s."""
    steps = [training_step(256, track=track, clip=False) for track in (True, False)]
    return [4 * 256 / s for s in interleave(steps, runs)]


def bench_clip(runs) -> list[float]:
    """Time a recorded step at sequence 256 with every head clipped, and with none; tokens/s."""
    steps = [training_step(256, track=True, clip=clip) for clip in (True, False)]
    return [4 * 256 / s for s in interleave(steps, runs)]
