"""Learning-rate schedule: warm up, hold, decay (WSD), in the proportions of Kimi K2.

K2 trained for 15.5T tokens in batches of 67M: 500 steps of warm-up, a constant 2e-4 up to
10T tokens, then a cosine from 2e-4 to 2e-5 over the last 5.5T. Only the proportions carry over
to a small run, so the schedule is a multiplier of the peak and its lengths are fractions.
Source of every default: Kimi K2 report, section 2.5 (training recipe).
"""

import math

K2_WARMUP_FRAC = 500 / (15.5e12 / (16_384 * 4096))  # 500 of 230,968 steps: 0.22%
K2_DECAY_FRAC = 5.5 / 15.5  # 5.5T of 15.5T tokens: 35.5%
K2_FINAL_LR_FRAC = 2e-5 / 2e-4  # a tenth


def wsd_lr(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int | None = None,
    decay_frac: float = K2_DECAY_FRAC,
    final_lr_frac: float = K2_FINAL_LR_FRAC,
) -> float:
    """Return the learning rate of update `step` as a multiple of the peak.

    With k = step + 1 the number of the update, N = total_steps, W = warmup_steps,
    D = round(decay_frac * N) and f = final_lr_frac:

        k / W                                           k <= W       linear warm-up
        1                                               otherwise    constant
        f + (1 - f) * (1 + cos(pi * (k - N + D) / D)) / 2   k > N - D    cosine decay

    so update W - 1 is the first at the peak and update N - 1, the last, gets exactly f. Steps
    from N on keep f (a scheduler looks one step past the end).

    Args:
        step: index of the update, from 0.
        total_steps: updates in the whole run, at least 1.
        warmup_steps: updates of warm-up, 0 to total_steps; None takes K2's 0.22%.
        decay_frac: part of the run spent decaying, in [0, 1]; 0 keeps the peak to the end.
        final_lr_frac: multiple of the peak at the end of the decay, in [0, 1].

    Raises:
        ValueError: a value is outside its range, or warm-up and decay overlap.

    Source: Kimi K2 report, section 2.5 (training recipe), for the shape and the defaults.
    """
    if warmup_steps is None:
        warmup_steps = round(K2_WARMUP_FRAC * total_steps)
    _check(step, total_steps, warmup_steps, decay_frac, final_lr_frac)
    decay_steps = round(decay_frac * total_steps)
    if warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} and {decay_steps} steps of decay "
            f"(decay_frac={decay_frac:.3g}) exceed total_steps={total_steps}: shorten one of them"
        )
    update = min(step + 1, total_steps)
    if update <= warmup_steps:
        return update / warmup_steps
    if update <= total_steps - decay_steps:
        return 1.0
    progress = (update - total_steps + decay_steps) / decay_steps
    return final_lr_frac + (1 - final_lr_frac) * (1 + math.cos(math.pi * progress)) / 2


def _check(step: int, total_steps: int, warmup_steps: int, decay_frac: float, final_lr_frac: float) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps} must be at least 1: give the run's length")
    if step < 0:
        raise ValueError(f"step={step} must be at least 0: the first update is step 0")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must be in [0, total_steps={total_steps}]: "
            "shorten the warm-up or lengthen the run"
        )
    for name, value in (("decay_frac", decay_frac), ("final_lr_frac", final_lr_frac)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be in [0, 1]: it is a fraction")
