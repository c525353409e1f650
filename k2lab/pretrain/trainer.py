"""A training loop that can be read in one sitting, and resumed to the bit.

A model brings three methods. `loss(inputs, targets)` is the mean cross-entropy in nats/token;
`aux_loss()` is what balancing adds to the gradient of the last forward pass, never to the
reported loss; `update_expert_bias(rate)` applies the auxiliary-loss-free balancing update from
the expert loads counted since its last call (a no-op in a dense model).

One update is: draw the batch of the step, accumulate gradients over its micro-batches, clip,
step the optimizer and the schedule, update the expert biases, call the callbacks. The batch of
a step depends on the seed and the step alone and is cut into micro-batches afterwards, so that
accumulating k small batches is the same experiment as one large batch.
"""

import math
import os
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from k2lab.optim.schedule import K2_DECAY_FRAC, K2_FINAL_LR_FRAC, wsd_lr
from k2lab.pretrain.corpus import Corpus

CHECKPOINT_KEYS = ("identity", "model", "optimizer", "scheduler", "history", "rng")

Callback = Callable[[int, nn.Module], dict | None]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Say how long, on what, and at which multiple of the optimizer's lr to train."""

    steps: int  # optimizer updates, >= 1
    batch_size: int = 8  # sequences per micro-batch
    seq_len: int = 256  # tokens per sequence
    grad_accum: int = 1  # micro-batches per update
    schedule: str = "wsd"  # or "constant", which warms up too but never decays
    warmup_steps: int | None = None  # None: K2's 0.22% of the steps
    decay_frac: float = K2_DECAY_FRAC  # part of the steps spent decaying (wsd)
    final_lr_frac: float = K2_FINAL_LR_FRAC  # lr at the end / peak lr (wsd)
    grad_clip: float | None = 1.0  # largest global gradient norm; None: no clipping
    eval_every: int = 50  # updates between validations; the last update is validated too; 0: never
    eval_batches: int = 8  # validation batches of batch_size sequences
    expert_bias_update_rate: float = 1e-3  # per update, as DeepSeek-V3; 0: no change
    dtype: str = "float32"  # or "bfloat16": autocast around the forward pass
    device: str = "cpu"  # or "cuda"
    seed: int = 0  # of the batches, >= 0; the model is initialised by the caller
    checkpoint_every: int = 0  # updates between checkpoints; 0: only after the last

    def __post_init__(self) -> None:
        lowest = dict.fromkeys(("steps", "batch_size", "seq_len", "grad_accum", "eval_batches"), 1)
        lowest |= dict.fromkeys(("eval_every", "checkpoint_every", "seed"), 0)
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r} must be an integer >= {low}")
        if self.schedule not in ("wsd", "constant"):
            raise ValueError(f"schedule={self.schedule!r} must be 'wsd' or 'constant'")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} must be 'float32' or 'bfloat16'")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(
                f"device={self.device!r} must be a torch device such as 'cpu' or 'cuda'"
            ) from error
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip={self.grad_clip} must be > 0, or None for no clipping")
        if not self.expert_bias_update_rate >= 0:
            raise ValueError(f"expert_bias_update_rate={self.expert_bias_update_rate} must be >= 0")
        self.lr_multiplier(0)  # raises where the schedule's lengths do not fit

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of one update: batch_size * grad_accum * seq_len."""
        return self.batch_size * self.grad_accum * self.seq_len

    def lr_multiplier(self, step: int) -> float:
        """Return lr / peak lr of update `step`, from 0 (see `wsd_lr`)."""
        return wsd_lr(
            step,
            total_steps=self.steps,
            warmup_steps=self.warmup_steps,
            decay_frac=self.decay_frac if self.schedule == "wsd" else 0.0,
            final_lr_frac=self.final_lr_frac,
        )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    config: TrainConfig,
    *,
    checkpoint: str | Path | None = None,
    callbacks: Iterable[Callback] = (),
    progress: bool = True,
) -> pd.DataFrame:
    """Train `model` in place and return the history, one row per update.

    Columns: step (updates done, from 1), tokens (seen so far), loss [nats/token], lr (of the
    first parameter group), grad_norm (global, before clipping), step_s [s], val_loss
    [nats/token] (NaN where not evaluated), then the callbacks' values.

    Args:
        model: an nn.Module with `loss`, `aux_loss` and `update_expert_bias`; moved to the device.
        optimizer: any torch optimizer over the model's parameters; its learning rates are peaks,
            decayed during the run and set back after it.
        corpus: where batches come from.
        config: the run.
        checkpoint: file that holds the run's state, written every `checkpoint_every` updates and
            at the end. If it exists the run continues from it, on CPU to the bit.
        callbacks: functions `fn(step, model)` called after each update, before validation; a
            returned dict of numbers, strings, lists or arrays becomes columns of the row.
        progress: show a bar with loss and tokens/s; K2LAB_PROGRESS=0 hides it everywhere.

    Raises:
        ValueError: the corpus is too short for seq_len, the device is missing, a callback reuses
            a column, or the checkpoint is damaged or belongs to another run.
        FloatingPointError: the loss or the gradient norm is not finite; the parameters are
            those before the failed update.
    """
    _check_run(model, corpus, config, checkpoint)
    model.to(config.device)
    model.train()
    model.update_expert_bias(0.0)  # forget loads counted before this run
    scheduler = LambdaLR(optimizer, config.lr_multiplier)
    run = _Run(model, optimizer, scheduler, config, corpus.fingerprint)
    history = run.resume(Path(checkpoint)) if checkpoint and Path(checkpoint).exists() else []
    hidden = not progress or os.environ.get("K2LAB_PROGRESS") == "0"
    with tqdm(total=config.steps, initial=len(history), disable=hidden, unit="step") as bar:
        for step in range(len(history) + 1, config.steps + 1):
            row = {"step": step, "tokens": step * config.tokens_per_step}
            row |= _update(run, corpus, step - 1) | {"val_loss": math.nan}
            for callback in callbacks:
                _merge(row, callback(step, model) or {})
            if config.eval_every and _due(step, config.eval_every, config.steps):
                row["val_loss"] = evaluate(model, corpus, config)
            history.append(row)
            if checkpoint and _due(step, config.checkpoint_every, config.steps):
                run.save(Path(checkpoint), history)
            rate = f"{config.tokens_per_step / row['step_s']:,.0f}"
            bar.set_postfix({"loss": f"{row['loss']:.3f}", "tokens/s": rate}, refresh=False)
            bar.update()
    for group in optimizer.param_groups:  # undo the schedule: the peak again, for another run
        group["lr"] = group.pop("initial_lr")
    return pd.DataFrame(history)


def evaluate(model: nn.Module, corpus: Corpus, config: TrainConfig) -> float:
    """Return the mean loss [nats/token] over the corpus's fixed validation windows.

    Uses `eval_batches` batches of `batch_size` sequences of `seq_len` tokens, in eval mode and
    without gradients; the model's mode is restored.
    """
    was_training = model.training
    model.eval()
    try:
        batches = corpus.val_batches(config.eval_batches, config.batch_size, config.seq_len)
        with torch.no_grad(), _autocast(config):
            losses = [model.loss(*_to(batch, config.device)) for batch in batches]
        return torch.stack([loss.float() for loss in losses]).mean().item()
    finally:
        model.train(was_training)


def load_checkpoint(path: str | Path) -> dict:
    """Read a file that `train` wrote, its tensors on the CPU and no code executed.

    Keys: identity (what makes it the same run), model, optimizer and scheduler (state dicts),
    history (a list of rows) and rng (torch's CPU state).

    Raises:
        ValueError: the file is absent, truncated, changed, or no checkpoint of this trainer.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not compare checksums
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in CHECKPOINT_KEYS}
    except Exception as error:
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}): delete it to start "
            "over, or name another file"
        ) from error


@dataclass(frozen=True)
class _Run:
    """Everything that a checkpoint must restore, and what tells one run from another."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    config: TrainConfig
    corpus: str  # fingerprint

    def identity(self) -> dict[str, str]:
        parts = {f"config.{k}": v for k, v in asdict(self.config).items()}
        del parts["config.checkpoint_every"]  # it changes no number
        parts["optimizer"] = [type(self.optimizer).__name__] + [
            {k: v for k, v in group.items() if k not in ("params", "lr")}  # lr is the schedule's
            for group in self.optimizer.param_groups
        ]
        parts["model config"] = getattr(self.model, "config", None)
        parts["model"] = {k: tuple(v.shape) for k, v in self.model.state_dict().items()}
        return {k: repr(v) for k, v in parts.items()} | {"corpus": self.corpus}

    def save(self, path: Path, history: list[dict]) -> None:
        """Write the checkpoint under a temporary name first, so that no half file is ever seen."""
        state = {
            "identity": self.identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": history,
            "rng": torch.get_rng_state(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            torch.save(state, part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def resume(self, path: Path) -> list[dict]:
        """Load the checkpoint into the run and return its history; check it before any change."""
        state = load_checkpoint(path)
        ours, theirs = self.identity(), state["identity"]
        changed = [k for k in ours | theirs if ours.get(k) != theirs.get(k)]
        if changed:
            values = [f"{k} was {theirs.get(k)!s:.60}, is {ours.get(k)!s:.60}" for k in changed]
            raise ValueError(
                f"checkpoint {str(path)!r} belongs to another run ({'; '.join(values)}): name "
                "another file, or delete this one to start over"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        return state["history"]


def _update(run: _Run, corpus: Corpus, step: int) -> dict[str, float]:
    """Do one optimizer update and return its measurements."""
    start = time.perf_counter()
    config, model = run.config, run.model
    size = config.batch_size * config.grad_accum
    batch = corpus.batch(step, batch_size=size, seq_len=config.seq_len, seed=config.seed)
    inputs, targets = (t.split(config.batch_size) for t in _to(batch, config.device))
    run.optimizer.zero_grad(set_to_none=True)
    mean_loss = torch.zeros((), device=config.device)
    for micro_batch in zip(inputs, targets, strict=True):
        with _autocast(config):
            loss = model.loss(*micro_batch)
            objective = loss + model.aux_loss()
        (objective / config.grad_accum).backward()
        mean_loss += loss.detach() / config.grad_accum
    params = [p for p in model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in params])
    loss, grad_norm = torch.stack([mean_loss, norm.float()]).tolist()  # the only wait for a GPU
    if not math.isfinite(loss + grad_norm):
        raise FloatingPointError(
            f"step {step + 1}: loss={loss}, grad_norm={grad_norm}; lower the peak lr, lengthen "
            "the warm-up or set grad_clip"
        )
    if config.grad_clip is not None:
        clip_grads_with_norm_(params, config.grad_clip, norm)
    lr = run.optimizer.param_groups[0]["lr"]
    run.optimizer.step()
    run.scheduler.step()
    model.update_expert_bias(config.expert_bias_update_rate)
    step_s = time.perf_counter() - start
    return {"loss": loss, "lr": float(lr), "grad_norm": grad_norm, "step_s": step_s}


def _to(batch: tuple[torch.Tensor, torch.Tensor], device: str) -> list[torch.Tensor]:
    return [tensor.to(device, non_blocking=True) for tensor in batch]


def _autocast(config: TrainConfig) -> torch.autocast:
    kind = torch.device(config.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _merge(row: dict, values: dict) -> None:
    """Add a callback's values to the row as plain Python numbers, so that a checkpoint is data."""
    for name, value in values.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if name in row or not isinstance(value, int | float | str | list):
            raise ValueError(
                f"callback value {name}={value!r}: use a new name (not {', '.join(row)}) and a "
                "number, str, list, array or tensor"
            )
        row[name] = value


def _check_run(model: nn.Module, corpus: Corpus, config: TrainConfig, checkpoint: str | Path | None) -> None:
    """Refuse before the first step what would otherwise fail after many."""
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", corpus.tokenizer.vocab_size)
    if corpus.tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer of {corpus.name} has {corpus.tokenizer.vocab_size} ids, the model's "
            f"vocab_size={vocab_size}: give the model at least as many"
        )
    for split in ("train", "val") if config.eval_every else ("train",):
        corpus.tokens(split, config.seq_len)
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={config.device!r}, but torch sees no GPU: use device='cpu'")
    if checkpoint and Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint={str(checkpoint)!r} is a folder: name a file in it")
