"""Own QK-Clip and MuonClip: rescale query and key weights whose largest logit passed a threshold.

After the optimizer's step, for every head h whose largest logit S_max^h in this step's forward passes
exceeded the threshold t:

    gamma_h = t / S_max^h                    else 1
    W_UQ^h, W_UK^h *= sqrt(gamma_h)          content parts of query and key
    W_QR^h *= gamma_h                        rotary part of the query; the rotary key is shared, unchanged

so that the same inputs would give logits smaller by exactly gamma_h. The step's own forward and backward
pass are untouched; the next ones may exceed t again by what a new batch and one update add.
Source: Kimi K2 report, section 2.1 and Algorithm 1.

An attention layer takes part by two members: `max_logits` (H,), S_max of each head over the forward
passes since it was last set to None, and `scale_qk_(gamma, alpha)`, which scales a head's logits by gamma.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw

from k2lab.optim.muon import Muon, split_parameters

FORMS = ("head", "layer")


@dataclass(frozen=True)
class QKClipReport:
    """Say what one clip saw and did; both fields are (layers, H)."""

    max_logits: torch.Tensor  # S_max before the clip, over micro-batches and ranks
    gamma: torch.Tensor  # factor on the logits, 1 where nothing was clipped

    @property
    def fraction_clipped(self) -> float:
        """The share of heads with gamma < 1."""
        return (self.gamma < 1).float().mean().item()


@torch.no_grad()
def qk_clip_(
    layers: Iterable[nn.Module],
    *,
    qk_clip_threshold: float = 100.0,
    form: str = "head",
    alpha: float = 0.5,
) -> QKClipReport:
    """Clip every head of `layers` in place, forget their max logits, and report.

    Where torch.distributed is initialised the maxima of all layers are first reduced over ranks, in one
    message, so every rank scales alike.

    Args:
        layers: attention layers of one head count, with `max_logits` and `scale_qk_`.
        qk_clip_threshold: t > 0; 100 in K2, 30 in the report's small ablation; inf only records.
        form: "head" as in the report; "layer", gamma = min(1, t / max_h S_max^h) for all heads of a
            layer, as in the K2 blog, which also shrinks heads that are in no danger.
        alpha: share of gamma that the query takes, W_Q *= gamma^alpha, W_K *= gamma^(1 - alpha), in [0, 1].

    Raises:
        ValueError: an argument is out of range, or a layer has recorded no logits, or not finite ones
            (on every rank, where one of them has); nothing is scaled then.

    Source: Kimi K2 report, section 2.1; the blog form and alpha: the Kimi K2 blog, July 2025.
    """
    layers = list(layers)
    _check_clip(layers, qk_clip_threshold, form, alpha)
    return _clip_(layers, _largest_logits(layers), qk_clip_threshold, form, alpha)


def _largest_logits(layers):
    """Return S_max of all layers, (layers, H), over all ranks."""
    for i, layer in enumerate(layers):
        if layer.max_logits is None:
            raise ValueError(
                f"attention layer {i} has recorded no logits: set track_max_logits and run a forward pass in "
                "training mode before each step"
            )
    if len(counts := {layer.max_logits.numel() for layer in layers}) > 1:
        raise ValueError(f"attention layers with {sorted(counts)} heads: clip those of one count at a time")
    largest = torch.stack([layer.max_logits.float() for layer in layers])
    largest = largest.where(largest.isfinite(), math.inf)  # so that every rank hears of an overflow
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    if not largest.isfinite().all():
        heads = (~largest.isfinite()).nonzero().tolist()
        raise ValueError(
            f"[attention layer, head] {heads} have max_logits that are not finite: the forward pass "
            "overflowed; lower the learning rate"
        )
    return largest


def _clip_(layers, largest, qk_clip_threshold, form, alpha):
    """Scale the layers by what `largest` (layers, H) asks for, forget their max logits, and report."""
    seen = largest.amax(-1, keepdim=True).expand_as(largest) if form == "layer" else largest
    gamma = torch.where(seen > qk_clip_threshold, qk_clip_threshold / seen, 1.0)
    for layer, factors, touched in zip(layers, gamma, (gamma < 1).any(-1).tolist(), strict=True):
        if touched:
            layer.scale_qk_(factors, alpha)
        layer.max_logits = None
    return QKClipReport(largest, gamma)


def scale_mha_qk_(
    q_weight: torch.Tensor, k_weight: torch.Tensor, gamma: torch.Tensor, alpha: float = 0.5
) -> None:
    """Multiply the logits of head h by gamma[h] (H,), in place, in multi-head attention.

    The rows of head h in `q_weight` and `k_weight`, (H d, D) each, take gamma^alpha and gamma^(1 - alpha):
    sqrt(gamma) each as in the K2 report. Raises `ValueError` where gamma is not positive and finite, the
    rows do not fall into H equal blocks, or the two differ: shared keys (grouped queries) cannot be
    scaled head by head.
    """
    if gamma.dim() != 1 or not ((gamma > 0) & gamma.isfinite()).all():
        raise ValueError(f"gamma={gamma.tolist()}: need one positive factor for each head")
    if q_weight.shape[0] != k_weight.shape[0] or q_weight.shape[0] % len(gamma):
        raise ValueError(
            f"q_weight {tuple(q_weight.shape)} and k_weight {tuple(k_weight.shape)} must have the same "
            f"number of rows, a multiple of the {len(gamma)} heads in gamma"
        )
    with torch.no_grad():
        for weight, power in ((q_weight, alpha), (k_weight, 1 - alpha)):
            weight.unflatten(0, (len(gamma), -1)).mul_(gamma.to(weight)[:, None, None] ** power)


class MuonClip(Muon):
    """Kimi K2's optimizer: Muon for matrices, AdamW for the rest, then QK-Clip.

    `step()` does all three, so a training loop calls it like any optimizer; it switches the recording of
    max logits on in every attention layer, and leaves what it saw and did in `last_clip`.

    Args:
        model: its parameters are divided by `split_parameters`; its attention layers are the modules
            with `max_logits` and `scale_qk_`.
        lr, weight_decay: of both; thanks to the matched update size one value serves.
        qk_clip_threshold, qk_clip_form, qk_clip_alpha: see `qk_clip_`. A threshold of inf never clips
            (Muon and AdamW alone) but still reports.
        adamw_betas, adamw_eps: of AdamW.
        **muon: further arguments of `Muon`, such as momentum or dtype.

    Raises:
        ValueError: as `Muon` and `qk_clip_`; also on a model without attention layers that can be clipped.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        qk_clip_threshold: float = 100.0,
        qk_clip_form: str = "head",
        qk_clip_alpha: float = 0.5,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        **muon,
    ):
        self.attention_layers = [m for m in model.modules() if hasattr(m, "scale_qk_")]
        self.clip = {"qk_clip_threshold": qk_clip_threshold, "form": qk_clip_form, "alpha": qk_clip_alpha}
        _check_clip(self.attention_layers, **self.clip)
        self.last_clip: QKClipReport | None = None
        for layer in self.attention_layers:
            layer.track_max_logits, layer.max_logits = True, None
        # "fused" makes load_state_dict put AdamW's step counts on the parameters' device
        self.adamw = {"betas": adamw_betas, "adamw_eps": adamw_eps, "fused": True}
        _check_adamw(adamw_betas, adamw_eps)
        named, split = dict(model.named_parameters()), split_parameters(model)
        groups = [
            {"params": [named[n] for n, (chosen, _) in split.items() if chosen == kind], "use_muon": use_muon}
            for kind, use_muon in (("muon", True), ("adamw", False))
        ]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, **muon)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group of matrices, or with `use_muon=False` of parameters for AdamW."""
        super().add_param_group({"use_muon": True} | self.adamw | param_group)

    def _update_groups(self):
        """Update, clip, and leave the report in `last_clip`; bad logits raise before anything changes."""
        largest = _largest_logits(self.attention_layers)
        super()._update_groups()
        self.last_clip = _clip_(self.attention_layers, largest, **self.clip)

    def _update(self, group):
        update = super()._update if group["use_muon"] else self._update_adamw
        update(group)

    def _update_adamw(self, group):
        """Update the parameters of one group by torch's AdamW."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        averages, squares, steps = (
            [self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        (beta1, beta2), settings = group["betas"], {k: group[k] for k in ("lr", "weight_decay")}
        settings |= {"beta1": beta1, "beta2": beta2, "eps": group["adamw_eps"], "amsgrad": False}
        adamw(
            params,
            [p.grad for p in params],
            averages,
            squares,
            [],
            steps,
            fused=True,
            maximize=False,
            **settings,
        )


def _check_clip(layers, qk_clip_threshold, form, alpha):
    if not qk_clip_threshold > 0:
        raise ValueError(f"qk_clip_threshold={qk_clip_threshold} must be > 0, such as 100")
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {FORMS}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be in [0, 1]")
    if not layers:
        raise ValueError("no attention layer has scale_qk_: use Muon and AdamW, there is nothing to clip")


def _check_adamw(betas, eps):
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_betas={betas} must be in [0, 1), such as (0.9, 0.95)")
    if not eps >= 0:
        raise ValueError(f"adamw_eps={eps} must be >= 0")
