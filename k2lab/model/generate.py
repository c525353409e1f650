"""Own sampling from the model: batched, cached, with per-row stops and the log-probability of each choice.

Prompts of different lengths need no padding: the batch is read up to the shortest prompt at once, then
one position at a time, and rows still inside their prompt are fed the prompt's token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

from k2lab.model.attention import LatentCache
from k2lab.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Hold what was generated for B rows, padded to the longest of them, N tokens."""

    tokens: torch.Tensor  # (B, N) int64, the new tokens only, a stop token included; 0 after the end
    logprobs: (
        torch.Tensor
    )  # (B, N) log-probability of each under the model, at temperature 1; 0 after the end
    lengths: torch.Tensor  # (B,) int64, tokens generated
    stopped: torch.Tensor  # (B,) bool, ended by a stop token rather than by the limit

    def row(self, i: int) -> list[int]:
        """Return the tokens generated for row i."""
        return self.tokens[i, : self.lengths[i]].tolist()


def sample(logits: torch.Tensor, *, temperature: float = 1.0, top_p: float = 1.0, generator=None):
    """Draw a token per row from softmax(logits / temperature) restricted to the nucleus of mass `top_p`.

    `logits` is (B, V). The nucleus is the smallest set of most likely tokens whose probabilities sum to
    at least `top_p` (Holtzman et al. 2020). Temperature 0 takes the most likely token. Returns the tokens
    (B,) and their log-probabilities (B,) under softmax(logits), the model itself, whatever the
    temperature. Raises `ValueError` for a temperature below 0 or a top_p outside (0, 1].
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: must be >= 0 (0 = greedy)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must lie in (0, 1] (1 = no restriction)")
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probs = (logits / temperature).softmax(-1)
        if top_p < 1:
            ordered, ids = probs.sort(-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0  # the mass before a token reaches top_p
            probs = torch.zeros_like(probs).scatter(-1, ids, ordered)
        tokens = torch.multinomial(probs, 1, generator=generator)[:, 0]
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]] | torch.Tensor,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Iterable[int] | Sequence[Iterable[int]] = (),
    generator: torch.Generator | None = None,
) -> Generation:
    """Continue each prompt until one of its stop tokens or its limit of new tokens.

    `prompts` holds B non-empty rows of token ids, of any lengths; `max_new_tokens` and `stop_ids` are
    for all rows, or one entry per row. Sampling is as in `sample`, reproducible through `generator`.
    Raises `ValueError` for an empty prompt, a per-row list of a wrong length, or a context beyond
    `max_position_embeddings`.
    """
    device = model.embed_tokens.weight.device
    rows = [torch.as_tensor(p, dtype=torch.long, device=device) for p in prompts]
    if not rows or any(row.dim() != 1 or len(row) == 0 for row in rows):
        raise ValueError(f"prompts={prompts}: need at least one row, and at least one token id in each")
    lengths = torch.tensor([len(p) for p in rows], device=device)
    limits = torch.as_tensor(_per_row(max_new_tokens, len(rows), "max_new_tokens"), device=device)
    if limits.min() < 1:
        raise ValueError(f"max_new_tokens={limits.tolist()}: must be at least 1")
    stops = _stop_mask(stop_ids, len(rows), model.config.vocab_size, device)
    ends = lengths + limits  # (B,) the position at which a row is full
    total, start = int(ends.max()), int(lengths.min())
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        span, top = f"{ids.min()} to {ids.max()}", model.config.vocab_size - 1
        raise ValueError(f"prompt ids {span}: must lie in 0..{top}, the model's vocabulary")
    ids = torch.nn.functional.pad(ids, (0, total - ids.shape[1]))  # (B, total)
    logprobs = torch.zeros(len(rows), total, device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    stopped = done.clone()
    final = lengths.clone()  # (B,) positions filled when the row ended

    cache = LatentCache(model.config, len(rows), total, device=device, dtype=model.embed_tokens.weight.dtype)
    new, was_training = ids[:, :start], model.training
    model.eval()
    try:
        for t in range(start, total):
            logits = model.lm_head(model.hidden(new, cache)[:, -1])
            tokens, logp = sample(logits, temperature=temperature, top_p=top_p, generator=generator)
            live = (t >= lengths) & ~done
            ids[:, t] = torch.where(live, tokens, ids[:, t])
            logprobs[:, t] = torch.where(live, logp, 0.0)
            final += live
            hit = live & stops.gather(1, tokens[:, None])[:, 0]
            stopped |= hit
            done |= hit | (live & (t + 1 >= ends))
            if done.all():
                break
            new = ids[:, t : t + 1]
    finally:
        model.train(was_training)
    return _cut(ids, logprobs, lengths, final - lengths, stopped)


def _cut(ids, logprobs, prompt_lengths, lengths, stopped):
    """Drop the prompts and align what follows them to the left."""
    steps = torch.arange(int(lengths.max()), device=ids.device)
    inside = steps < lengths[:, None]
    where = (prompt_lengths[:, None] + steps).clamp(max=ids.shape[1] - 1)
    return Generation(
        tokens=ids.gather(1, where) * inside,
        logprobs=logprobs.gather(1, where) * inside,
        lengths=lengths,
        stopped=stopped,
    )


def _per_row(value, num_rows, name):
    """Spread one value over the rows, or check that there is one for each."""
    if isinstance(value, Integral):
        return [value] * num_rows
    if len(value) != num_rows:
        raise ValueError(
            f"{name} has {len(value)} entries for {num_rows} prompts: give one for all, or one each"
        )
    return list(value)


def _stop_mask(stop_ids, num_rows, vocab_size, device):
    """Return (B, V) booleans: does this token end this row?"""
    if isinstance(stop_ids, torch.Tensor):
        stop_ids = stop_ids.tolist()
    stop_ids = [stop_ids] if isinstance(stop_ids, Integral) else list(stop_ids)
    per_row = stop_ids if stop_ids and not isinstance(stop_ids[0], Integral) else [stop_ids] * num_rows
    mask = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(_per_row(per_row, num_rows, "stop_ids")):
        ids = list(ids)
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            raise ValueError(f"stop_ids {ids}: must lie in 0..{vocab_size - 1}, the model's vocabulary")
        mask[row, ids] = True
    return mask
