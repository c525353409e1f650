"""Own Muon: momentum, orthogonalised by Newton-Schulz, scaled so that a tuned AdamW step size carries over.

    M <- mu M + G                            momentum, G the gradient of an n x m matrix W
    O <- NewtonSchulz(mu M + G)              about U V^T of the SVD U S V^T; Nesterov feeds mu M + G, else M
    W <- W - lr (0.2 sqrt(max(n, m)) O + lambda W)

An orthogonal n x m matrix has root mean square 1 / sqrt(max(n, m)), so the factor gives every update the
root mean square 0.2, about that of AdamW. Source: Moonlight (arXiv 2502.16982, sections 2.1 and 2.2),
which Kimi K2 builds on; Newton-Schulz coefficients of K. Jordan's Muon.

Speed comes from three things: matrices of one shape, tall ones transposed, are one batch; a batch fits
into the cache; and it is iterated in the cheaper of two forms, the plain one in bfloat16 where the
processor has units for it, else on the small Gram matrix in float32.
"""

import math
from collections import defaultdict

import torch
from torch import nn

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # K. Jordan: steepest at 0, for which it settles near 1, not at 1
CACHE_BYTES = 2**22  # float32 bytes of a batch on a CPU: small enough for its caches, large enough to batch
GRAM_PAYS = 1.5  # m / n from which the Gram form takes fewer multiplications: 12 n^3 < 8 n^2 m


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return what `device` multiplies fastest: bfloat16 on a GPU or a CPU with units for it, else float32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_units = device.type == "cuda" or any(getattr(torch.cpu, n, bool)() for n in names)
    return torch.bfloat16 if has_units else torch.float32


def newton_schulz(
    x: torch.Tensor,
    *,
    ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    ns_steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Push every singular value of the matrices `x` (..., n, m) towards 1; same shape and type as `x`.

    X_0 = x / max(|x|_F, eps), then `ns_steps` times X <- a X + b (X X^T) X + c (X X^T)^2 X with
    (a, b, c) = `ns_coefficients`, on the transpose where n > m. Singular vectors stay; a singular value s
    becomes a s + b s^3 + c s^5 each step. With the default, five steps bring those above 0.01 of the norm
    into [0.68, 1.13]; they do not converge to 1. Zero stays zero.

    `dtype` is that of the iteration (None: `fast_dtype`). Types of two bytes iterate X itself. The Gram
    form, all powers of X_0 X_0^T and X_0 only at the end, is used in wider types alone: its rounding
    errors grow twelvefold a step where singular values are small, harmless at 1e-7, ruinous at 1e-2.
    """
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    n, m = wide.shape[-2:]
    batch = wide.to(dtype or fast_dtype(x.device)).reshape(-1, n, m)
    batch = batch / torch.linalg.matrix_norm(batch, keepdim=True).clamp_min(eps)
    iterate = _gram if batch.itemsize > 2 and m > GRAM_PAYS * n else _plain
    out = iterate(batch, ns_coefficients, ns_steps).view(wide.shape)
    return (out if wide is x else out.mT).to(x.dtype)


def _plain(x, coefficients, steps):
    """Iterate X: 2 n^2 m + n^3 multiplications a step."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _gram(x, coefficients, steps):
    """Iterate A = X X^T, with X = Q X_0 and A <- P A P for the polynomial P of A: 4 n^3 a step."""
    a, b, c = coefficients
    gram, q = x @ x.mT, None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        q = polynomial if q is None else polynomial @ q
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    return x if q is None else q @ x


def lr_ratio(shape: torch.Size, adjust_lr_fn: str | None = "match_rms_adamw") -> float:
    """Return the factor on the update of an n x m matrix (the last two dims of `shape`).

    "match_rms_adamw": 0.2 sqrt(max(n, m)) (Moonlight); "original" or None: sqrt(max(1, n / m)) (K. Jordan).
    """
    n, m = shape[-2:]
    return 0.2 * math.sqrt(max(n, m)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, n / m))


class Muon(torch.optim.Optimizer):
    """Optimise matrices by orthogonalised momentum; the formula is at the top of this file.

    The arguments are those of `torch.optim.Muon`, in its order, and three more.

    Args:
        params: parameters or groups, each (n, m) or (E, n, m), a stack of E matrices treated one by one.
        lr: step size eta, >= 0.
        weight_decay: lambda >= 0, decoupled: W <- W - lr lambda W.
        momentum: mu in [0, 1).
        nesterov: orthogonalise mu M + G instead of M.
        ns_coefficients, eps, ns_steps: see `newton_schulz`; eps > 0, ns_steps in [0, 100).
        adjust_lr_fn: see `lr_ratio`. torch's default is "original".
        momentum_form: "sum", M <- mu M + G (Moonlight, K2), or "average", M <- mu M + (1 - mu) G
            (torch). The update is the same but for rounding, as Newton-Schulz ignores the scale.
        dtype: of the Newton-Schulz iteration; None takes `fast_dtype`.

    Raises:
        ValueError: an argument is out of range, or a parameter is neither 2-D nor 3-D.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        momentum_form: str = "sum",
        dtype: torch.dtype | None = None,
    ):
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group after checking its settings and the shapes of its parameters."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; return closure()'s value if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_groups()
        return loss

    def _update_groups(self):
        """Do all of step() but the closure: subclasses extend this, so that step's hooks run once."""
        for group in self.param_groups:
            self._update(group)

    def _update(self, group):
        """Update the matrices of one group, batch by batch."""
        lr, keys = group["lr"], ("ns_coefficients", "ns_steps", "eps")
        for params in self._batches(group):
            counts = [len(matrices(p)) for p in params]
            dtype = group["dtype"] or fast_dtype(params[0].device)
            batch = params[0].new_empty(sum(counts), *matrices(params[0]).shape[1:], dtype=dtype)
            for p, slot in zip(params, batch.split(counts), strict=True):
                self._accumulate(group, p, slot)
            batch = newton_schulz(batch, dtype=dtype, **{k: group[k] for k in keys})
            for p, direction in zip(params, batch.split(counts), strict=True):
                weight = matrices(p).mul_(1 - lr * group["weight_decay"])
                weight.add_(direction, alpha=-lr * lr_ratio(p.shape, group["adjust_lr_fn"]))

    def _batches(self, group):
        """Gather parameters with a gradient that share shape and device, up to a cache's worth on a CPU."""
        by_shape = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[matrices(p).shape[1:], p.device].append(p)
        for (shape, device), params in by_shape.items():
            room = CACHE_BYTES // 4 // shape.numel() if device.type == "cpu" else math.inf
            batch, filled = [], 0
            for p in params:
                if batch and filled + len(matrices(p)) > room:
                    yield batch
                    batch, filled = [], 0
                batch.append(p)
                filled += len(matrices(p))
            yield batch

    def _accumulate(self, group, p, slot):
        """Fold the gradient into the momentum and write what is to be orthogonalised into `slot`."""
        state, mu, grad = self.state[p], group["momentum"], p.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = state["momentum_buffer"]
        if group["momentum_form"] == "average":
            momentum.lerp_(grad, 1 - mu)
            direction = grad.lerp(momentum, mu) if group["nesterov"] else momentum
        else:
            torch.add(grad, momentum, alpha=mu, out=momentum)
            direction = torch.add(grad, momentum, alpha=mu) if group["nesterov"] else momentum
        slot.copy_(matrices(direction.to(slot.dtype)))


def matrices(x: torch.Tensor) -> torch.Tensor:
    """View (n, m) or (E, n, m) as a stack (E, min, max) of wide matrices; writing to it writes to `x`."""
    stack = x if x.dim() == 3 else x[None]
    return stack if stack.shape[-2] <= stack.shape[-1] else stack.mT


def _check(group: dict) -> None:
    """Refuse settings that are out of range, and parameters that are no matrices."""
    for name in ("lr", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name}={group[name]} must be >= 0")
    if not group["eps"] > 0:
        raise ValueError(f"eps={group['eps']} must be > 0, such as 1e-7: a zero gradient is divided by it")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum={group['momentum']} must be in [0, 1), such as 0.95")
    if not (isinstance(group["ns_steps"], int) and 0 <= group["ns_steps"] < 100):
        raise ValueError(f"ns_steps={group['ns_steps']!r} must be an integer in [0, 100), such as 5")
    if len(group["ns_coefficients"]) != 3:
        raise ValueError(f"ns_coefficients={group['ns_coefficients']} must be three numbers (a, b, c)")
    allowed = {
        "adjust_lr_fn": ("match_rms_adamw", "original", None),
        "momentum_form": ("sum", "average"),
    }
    for name, values in allowed.items():
        if group[name] not in values:
            raise ValueError(f"{name}={group[name]!r} must be one of {values}")
    for p in group["params"] if group.get("use_muon", True) else ():
        if p.dim() not in (2, 3) or p.is_complex():
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} ({p.dtype}) is no real matrix (n, m) or stack "
                "(E, n, m): give it to AdamW (see split_parameters)"
            )


def split_parameters(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Return {parameter name: ("muon" or "adamw", why)} for the trainable parameters of `model`.

    Muon takes the matrices that map hidden states to hidden states, stacks of experts and the router's
    matrix included. AdamW takes the rest: embeddings (rows are looked up, a gradient touches few of
    them), the output head (its rows are classes; K. Jordan and Moonlight leave it to AdamW), and vectors
    such as norm gains and biases, which have no singular values. The head is the last linear layer with
    as many rows as an embedding. K2's own split is not published.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    tables = {id(m.weight) for m in embeddings}
    rows = {m.num_embeddings for m in embeddings}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    heads = [id(m.weight) for m in linear if m.out_features in rows][-1:]  # others are wide by chance
    split = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            split[name] = ("adamw", "a vector has no singular values")
        elif id(p) in tables:
            split[name] = ("adamw", "embedding: rows are looked up one by one")
        elif id(p) in heads:
            split[name] = ("adamw", "output head: rows are classes")
        elif p.dim() > 3:
            split[name] = ("adamw", "more than a stack of matrices")
        else:
            split[name] = ("muon", "stack of hidden matrices" if p.dim() == 3 else "hidden matrix")
    return split
