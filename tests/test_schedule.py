"""The schedule against torch's own schedulers and against the report's numbers."""

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from k2lab.optim.schedule import K2_DECAY_FRAC, K2_WARMUP_FRAC, wsd_lr

K2_STEPS = 230_968  # 15.5T tokens in batches of 16,384 x 4,096
K2_PEAK = 2e-4


def torch_schedule(total: int, warmup: int, decay: int, final: float) -> list[float]:
    """Multipliers of the same three phases, composed of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    hold = total - decay - 1  # the scheduler index of the last constant update
    with warnings.catch_warnings():  # SequentialLR itself calls step(epoch), which is deprecated
        warnings.simplefilter("ignore")
        schedulers = [
            LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1),
            ConstantLR(optimizer, factor=1.0),
            CosineAnnealingLR(optimizer, T_max=decay, eta_min=final),
        ]
        schedule = SequentialLR(optimizer, schedulers, milestones=[warmup - 1, hold])
        multipliers = []
        for _ in range(total):
            multipliers.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    return multipliers


@pytest.mark.parametrize(
    ("total", "warmup", "decay", "final"),
    [(100, 10, 40, 0.1), (57, 2, 20, 0.0), (31, 5, 9, 0.5)],
)
def test_equals_torch_schedulers(total, warmup, decay, final):
    ours = [
        wsd_lr(
            step,
            total_steps=total,
            warmup_steps=warmup,
            decay_frac=decay / total,
            final_lr_frac=final,
        )
        for step in range(total)
    ]
    assert ours == pytest.approx(torch_schedule(total, warmup, decay, final), abs=1e-12)


def test_defaults_give_the_reports_learning_rates():
    def lr(tokens: float) -> float:
        step = round(tokens / (16_384 * 4096)) - 1
        return K2_PEAK * wsd_lr(step, total_steps=K2_STEPS)

    assert lr(500 * 16_384 * 4096) == pytest.approx(2e-4)  # warm-up over after 500 steps
    assert lr(250 * 16_384 * 4096) == pytest.approx(1e-4)
    assert lr(9.9e12) == 2e-4
    assert lr(10.1e12) < 2e-4
    assert lr(12.75e12) == pytest.approx(1.1e-4, rel=1e-4)  # half-way down the cosine
    assert lr(15.5e12) == pytest.approx(2e-5)
    assert pytest.approx(0.0022, abs=5e-5) == K2_WARMUP_FRAC
    assert pytest.approx(0.355, abs=5e-4) == K2_DECAY_FRAC


def test_short_runs_have_no_warmup_by_default():
    assert wsd_lr(0, total_steps=20) == 1.0
    assert wsd_lr(0, total_steps=1, decay_frac=0.0) == 1.0


def test_without_decay_it_stays_at_the_peak_even_past_the_end():
    values = [wsd_lr(s, total_steps=8, warmup_steps=4, decay_frac=0.0) for s in range(12)]
    assert values == [0.25, 0.5, 0.75] + [1.0] * 9


def test_keeps_the_final_value_past_the_end():
    """LambdaLR asks for one step more than the run has."""
    assert wsd_lr(40, total_steps=40) == wsd_lr(39, total_steps=40) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": -1}, "step=-1 must be at least 0"),
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
        ({"warmup_steps": -2}, r"warmup_steps=-2 must be in \[0, total_steps=10\]"),
        ({"warmup_steps": 11}, "warmup_steps=11"),
        ({"decay_frac": 1.5}, r"decay_frac=1.5 must be in \[0, 1\]"),
        ({"final_lr_frac": -0.1}, "final_lr_frac=-0.1"),
        ({"warmup_steps": 6, "decay_frac": 0.5}, "exceed total_steps=10"),
    ],
)
def test_bad_input_is_named(changed, message):
    arguments = {"step": 0, "total_steps": 10, "warmup_steps": 2} | changed
    with pytest.raises(ValueError, match=message):
        wsd_lr(arguments.pop("step"), **arguments)
