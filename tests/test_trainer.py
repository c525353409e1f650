"""The loop on a tiny model: accumulation, schedule, resuming, and everything it refuses."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from k2lab.model.config import TINY
from k2lab.model.transformer import Transformer
from k2lab.pretrain.corpus import load_corpus
from k2lab.pretrain.trainer import TrainConfig, evaluate, load_checkpoint, train

CONFIG = TrainConfig(steps=10, batch_size=4, seq_len=16, warmup_steps=2, eval_every=4, eval_batches=2, seed=3)


class Bigram(nn.Module):
    """Fulfil the trainer's contract with an embedding, dropout and a bias nobody trains."""

    def __init__(self, dropout: float = 0.0, aux: float = 0.0, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(257, 12, generator=generator) * 0.2)
        self.head = nn.Parameter(torch.randn(12, 257, generator=generator) * 0.2)
        self.dropout, self.aux, self.calls = nn.Dropout(dropout), aux, []
        self.register_buffer("expert_bias", torch.zeros(()))

    def loss(self, input_ids, targets):
        self.calls.append((self.training, input_ids.shape, torch.is_grad_enabled()))
        logits = self.dropout(self.embed[input_ids]) @ self.head
        self.logits_dtype = logits.dtype
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def aux_loss(self):
        return self.aux * self.embed.square().sum()

    def update_expert_bias(self, rate):
        self.expert_bias += rate


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    for i in range(24):
        (root / f"{i}.txt").write_text("".join(f"{i}: {j} is {j * i}\n" for j in range(30)))
    return load_corpus(root)


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def run(corpus, config=CONFIG, model=None, optimizer=None, **arguments):
    model = model or Bigram()
    optimizer = optimizer or adamw(model)
    return model, train(model, optimizer, corpus, config, progress=False, **arguments)


def assert_same(model_a, model_b):
    for (name, a), b in zip(model_a.state_dict().items(), model_b.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def without_time(history: pd.DataFrame) -> pd.DataFrame:
    return history.drop(columns="step_s")


class Interrupted(Exception):
    pass


def stop_at(step):
    def callback(now, model):
        if now == step:
            raise Interrupted

    return callback


# --- what one run does


def test_history_has_a_row_per_update(corpus):
    model, history = run(corpus)
    columns = ["step", "tokens", "loss", "lr", "grad_norm", "step_s", "val_loss"]
    assert list(history.columns) == columns
    assert history.step.tolist() == list(range(1, 11))
    assert history.tokens.tolist() == [64 * step for step in range(1, 11)]
    assert history.step[history.val_loss.notna()].tolist() == [4, 8, 10]
    assert history.val_loss.iloc[-1] == evaluate(model, corpus, CONFIG)
    assert (history.step_s > 0).all()


def test_equals_a_loop_written_by_hand(corpus):
    """No accumulation, no schedule: plain PyTorch on the same batches."""
    config = replace(CONFIG, schedule="constant", warmup_steps=0, grad_clip=0.5)
    trained, history = run(corpus, config)
    model = Bigram()
    optimizer = adamw(model)
    for step in range(config.steps):
        x, y = corpus.batch(step, batch_size=4, seq_len=16, seed=3)
        loss = model.loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert history.loss[step] == pytest.approx(loss.item(), abs=1e-6)
        assert history.grad_norm[step] == pytest.approx(norm.item(), rel=1e-5)
    torch.testing.assert_close(trained.embed, model.embed, rtol=0, atol=1e-6)


def test_learns_what_can_be_counted(corpus):
    config = replace(CONFIG, steps=150, batch_size=16, warmup_steps=10)
    _, history = run(corpus, config, optimizer=None)
    assert history.loss[0] == pytest.approx(math.log(257), abs=0.2)
    assert history.val_loss.iloc[-1] < 2.6  # a fair guess among the twenty signs is ln 20 = 3.0


@pytest.mark.parametrize("clip", [None, 0.3])
def test_accumulated_micro_batches_equal_one_large_batch(corpus, clip):
    large = replace(CONFIG, batch_size=12, grad_clip=clip)
    a, history_a = run(corpus, large, Bigram(aux=0.01))
    b, history_b = run(corpus, replace(large, batch_size=3, grad_accum=4), Bigram(aux=0.01))
    assert [shape[0] for training, shape, _ in b.calls if training] == [3] * 40
    torch.testing.assert_close(a.embed, b.embed, rtol=0, atol=1e-6)
    torch.testing.assert_close(a.head, b.head, rtol=0, atol=1e-6)
    for column in ("loss", "grad_norm", "tokens"):
        assert history_a[column].tolist() == pytest.approx(history_b[column].tolist(), abs=1e-5)


def test_learning_rates_follow_the_schedule_in_every_group(corpus):
    model, seen = Bigram(), []
    groups = [{"params": [model.embed], "lr": 0.5}, {"params": [model.head], "lr": 0.02}]
    optimizer = torch.optim.SGD(groups)
    callbacks = [lambda step, model: seen.append([g["lr"] for g in optimizer.param_groups])]
    _, history = run(corpus, CONFIG, model, optimizer, callbacks=callbacks)
    # round(0.355 * 10) = 4 steps of cosine from 1 to 0.1 after 2 of warm-up and 4 at the peak
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)]
    multipliers = [0.5, 1, 1, 1, 1, 1, *cosine]
    assert history.lr.tolist() == pytest.approx([0.5 * m for m in multipliers])
    assert [lrs[1] for lrs in seen[:-1]] == pytest.approx([0.02 * m for m in multipliers[1:]])
    _, constant = run(corpus, replace(CONFIG, schedule="constant"))
    assert constant.lr.tolist() == pytest.approx([0.005] + [0.01] * 9)


def test_the_schedule_is_undone_so_that_another_run_can_follow(corpus):
    model = Bigram()
    optimizer = adamw(model, lr=0.01)
    run(corpus, CONFIG, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.01
    optimizer.param_groups[0]["lr"] = 0.002  # such as an annealing stage
    _, history = run(corpus, CONFIG, model, optimizer)
    assert history.lr.max() == 0.002


def test_clipping_bounds_the_update(corpus):
    config = replace(CONFIG, steps=1, warmup_steps=0, schedule="constant", grad_clip=0.01)
    model = Bigram()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    _, history = run(corpus, config, model, torch.optim.SGD(model.parameters(), lr=1.0))
    moved = [(v - before[k]).norm() for k, v in model.state_dict().items() if k != "expert_bias"]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert history.grad_norm[0] > 0.01


def test_auxiliary_loss_drives_the_gradient_but_is_not_reported(corpus):
    config = replace(CONFIG, steps=1, warmup_steps=0, grad_clip=None)
    plain, history = run(corpus, config)
    balanced, history_aux = run(corpus, config, Bigram(aux=0.1))
    assert history_aux.loss[0] == history.loss[0]
    assert history_aux.grad_norm[0] != history.grad_norm[0]
    assert not torch.equal(plain.embed, balanced.embed)


def test_expert_biases_are_updated_once_per_update(corpus):
    model, _ = run(corpus, replace(CONFIG, grad_accum=3, expert_bias_update_rate=0.25))
    assert model.expert_bias.item() == 2.5
    model, _ = run(corpus, replace(CONFIG, expert_bias_update_rate=0.0))
    assert model.expert_bias.item() == 0.0


def test_bfloat16_runs_the_forward_pass_in_bfloat16_and_keeps_float32_weights(corpus):
    model, history = run(corpus, replace(CONFIG, dtype="bfloat16"))
    assert model.logits_dtype == torch.bfloat16
    assert model.embed.dtype == torch.float32
    _, reference = run(corpus)
    assert history.loss.tolist() == pytest.approx(reference.loss.tolist(), abs=0.02)
    assert history.loss.tolist() != reference.loss.tolist()


def test_evaluation_is_without_gradients_in_eval_mode_and_restores_the_mode(corpus):
    model = Bigram(dropout=0.5)
    for training in (True, False):
        model.train(training)
        value = evaluate(model, corpus, CONFIG)
        assert model.training is training
        assert value == evaluate(model, corpus, CONFIG)
    assert {(t, grad) for t, _, grad in model.calls} == {(False, False)}
    losses = [model.loss(x, y).item() for x, y in corpus.val_batches(2, 4, 16)]
    assert value == pytest.approx(sum(losses) / 2)


def test_evaluation_can_be_switched_off(corpus):
    _, history = run(corpus, replace(CONFIG, eval_every=0))
    assert history.val_loss.isna().all()


def test_callbacks_add_columns(corpus):
    def load(step, model):
        return {"bias": model.expert_bias, "loads": torch.tensor([step, 1])}

    _, history = run(corpus, callbacks=[load, lambda step, model: None])
    assert history.bias.tolist() == pytest.approx([1e-3 * step for step in range(1, 11)])
    assert history.loads.tolist() == [[step, 1] for step in range(1, 11)]


@pytest.mark.parametrize("values", [{"loss": 1.0}, {"thing": object()}])
def test_callback_values_that_cannot_be_kept_are_refused(corpus, values):
    with pytest.raises(ValueError, match=r"callback value .*use a new name"):
        run(corpus, callbacks=[lambda step, model: values])


def test_progress_bar_shows_loss_and_speed(corpus, capsys, monkeypatch):
    monkeypatch.delenv("K2LAB_PROGRESS", raising=False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    model = Bigram()
    train(model, adamw(model), corpus, CONFIG)
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert "loss=5." in shown
    assert "tokens/s=" in shown
    monkeypatch.setenv("K2LAB_PROGRESS", "0")
    train(model, adamw(model), corpus, CONFIG)
    assert capsys.readouterr().err == ""


# --- resuming


@pytest.mark.parametrize("changes", [{}, {"grad_accum": 3}, {"dtype": "bfloat16"}])
def test_an_interrupted_run_continues_bit_for_bit(corpus, tmp_path, changes):
    config = replace(CONFIG, checkpoint_every=5, **changes)
    torch.manual_seed(0)  # of the dropout
    straight, history = run(corpus, config, Bigram(dropout=0.3))
    file = tmp_path / "runs" / "a.pt"
    torch.manual_seed(0)
    with pytest.raises(Interrupted):
        run(corpus, config, Bigram(dropout=0.3), checkpoint=file, callbacks=[stop_at(7)])
    assert len(load_checkpoint(file)["history"]) == 5
    torch.manual_seed(99)
    resumed, continued = run(corpus, config, Bigram(dropout=0.3, seed=1), checkpoint=file)
    assert_same(straight, resumed)
    pd.testing.assert_frame_equal(without_time(history), without_time(continued), check_exact=True)
    assert [path.name for path in file.parent.iterdir()] == ["a.pt"]


def test_the_real_model_trains_and_continues_bit_for_bit(corpus, tmp_path):
    """Routing, expert biases and all."""

    def model(seed):
        torch.manual_seed(seed)
        return Transformer(replace(TINY, vocab_size=257, aux_loss_alpha=1e-3))

    config = replace(CONFIG, grad_accum=2, checkpoint_every=5)
    straight, history = run(corpus, config, model(0))
    with pytest.raises(Interrupted):
        run(corpus, config, model(0), checkpoint=tmp_path / "a.pt", callbacks=[stop_at(7)])
    resumed, continued = run(corpus, config, model(1), checkpoint=tmp_path / "a.pt")
    assert_same(straight, resumed)
    pd.testing.assert_frame_equal(without_time(history), without_time(continued), check_exact=True)
    assert history.loss.iloc[-1] < history.loss[0] - 0.5
    assert all(moe.router.expert_bias.abs().max() > 0 for moe in straight.moe_layers)


def test_loads_counted_before_the_run_do_not_move_the_bias(corpus):
    biases = []
    for passes in (0, 3):
        torch.manual_seed(0)
        model = Transformer(replace(TINY, vocab_size=257))
        for inputs, targets in corpus.val_batches(passes, 2, 8) if passes else ():
            model.loss(inputs, targets)
        run(corpus, replace(CONFIG, steps=1, warmup_steps=0), model)
        biases.append(model.moe_layers[0].router.expert_bias)
    assert torch.equal(*biases)


def test_a_checkpoint_of_a_model_with_another_config_is_refused(corpus, tmp_path):
    run(corpus, CONFIG, Transformer(replace(TINY, vocab_size=257)), checkpoint=tmp_path / "a.pt")
    other = Transformer(replace(TINY, vocab_size=257, num_experts_per_tok=3))  # the same shapes
    with pytest.raises(ValueError, match=r"belongs to another run \(model config was"):
        run(corpus, CONFIG, other, checkpoint=tmp_path / "a.pt")


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(corpus):
    with pytest.raises(ValueError, match="has 257 ids, the model's vocab_size=256"):
        run(corpus, CONFIG, Transformer(replace(TINY, vocab_size=256)))


def test_a_finished_run_is_not_trained_again(corpus, tmp_path):
    file = tmp_path / "a.pt"
    first, history = run(corpus, checkpoint=file)
    model = Bigram(seed=1)
    second, again = run(corpus, model=model, checkpoint=file)
    assert model.calls == []
    assert_same(first, second)
    pd.testing.assert_frame_equal(history, again, check_exact=True)


def test_a_checkpoint_holds_callback_values_as_plain_data(corpus, tmp_path):
    file = tmp_path / "a.pt"
    run(corpus, checkpoint=file, callbacks=[lambda step, model: {"norm": model.embed.norm()}])
    assert isinstance(load_checkpoint(file)["history"][0]["norm"], float)


@pytest.mark.parametrize("damage", ["half", "bit", "empty", "text", "other", "missing"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(corpus, tmp_path, damage):
    file = tmp_path / "a.pt"
    run(corpus, checkpoint=file)
    whole = file.read_bytes()
    if damage == "other":
        torch.save({"weights": torch.zeros(3)}, file)
    elif damage == "missing":
        file.unlink()
    elif damage == "bit":  # in the middle of a weight, where torch alone would not notice
        at = whole.index(load_checkpoint(file)["model"]["embed"].numpy().tobytes())
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
    else:
        file.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"hi"}[damage])
    with pytest.raises(ValueError, match=r"a\.pt' cannot be read .*delete it to start over"):
        load_checkpoint(file)
    if damage != "missing":
        model = Bigram(seed=1)
        with pytest.raises(ValueError, match=r"a\.pt' cannot be read"):
            run(corpus, model=model, checkpoint=file)
        assert_same(model, Bigram(seed=1))


@pytest.mark.parametrize("change", ["steps", "seed", "lr", "betas", "optimizer", "model", "corpus"])
def test_a_checkpoint_of_another_run_is_refused_untouched(corpus, tmp_path, change):
    file = tmp_path / "a.pt"
    run(corpus, checkpoint=file)
    before = file.read_bytes()
    config, model, text, message = CONFIG, Bigram(seed=1), corpus, change
    optimizer = adamw(model)
    if change in ("steps", "seed"):
        config = replace(CONFIG, **{change: 12})
        message = rf"config\.{change} was \d+, is 12"
    elif change == "model":
        model.extra = nn.Parameter(torch.zeros(2))
    elif change == "corpus":
        (tmp_path / "text").write_text("another text\n" * 200)
        text = load_corpus(tmp_path / "text")
    else:
        changed = {"lr": {"lr": 2e-2}, "betas": {"lr": 1e-2, "betas": (0.8, 0.9)}, "optimizer": {"lr": 1e-2}}
        kind = torch.optim.SGD if change == "optimizer" else torch.optim.AdamW
        optimizer, message = kind(model.parameters(), **changed[change]), "optimizer was"
    with pytest.raises(ValueError, match=rf"a\.pt' belongs to another run \({message}.*name another"):
        run(text, config, model, optimizer, checkpoint=file)
    assert file.read_bytes() == before
    assert torch.equal(model.embed, Bigram(seed=1).embed)


def test_how_often_to_save_may_change(corpus, tmp_path):
    config = replace(CONFIG, checkpoint_every=5)
    with pytest.raises(Interrupted):
        run(corpus, config, checkpoint=tmp_path / "a.pt", callbacks=[stop_at(6)])
    _, history = run(corpus, replace(CONFIG, checkpoint_every=1), checkpoint=tmp_path / "a.pt")
    assert len(history) == 10


def test_a_failed_save_leaves_the_old_checkpoint_and_no_half_file(corpus, tmp_path, monkeypatch):
    file = tmp_path / "a.pt"
    config = replace(CONFIG, checkpoint_every=3)
    save = torch.save

    def full_disk(state, path):
        if len(state["history"]) < 6:
            return save(state, path)
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        run(corpus, config, checkpoint=file)
    assert len(load_checkpoint(file)["history"]) == 3
    assert list(tmp_path.iterdir()) == [file]


# --- what is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps=0 must be an integer >= 1"),
        ({"steps": 10.0}, "steps=10.0 must be an integer"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seq_len": -1}, "seq_len=-1"),
        ({"grad_accum": 0}, "grad_accum=0"),
        ({"eval_every": -1}, "eval_every=-1 must be an integer >= 0"),
        ({"eval_batches": 0}, "eval_batches=0"),
        ({"seed": -1}, "seed=-1"),
        ({"schedule": "linear"}, "schedule='linear' must be 'wsd' or 'constant'"),
        ({"dtype": "float16"}, "dtype='float16' must be 'float32' or 'bfloat16'"),
        ({"grad_clip": 0.0}, "grad_clip=0.0 must be > 0, or None"),
        ({"expert_bias_update_rate": -1e-3}, "expert_bias_update_rate=-0.001 must be >= 0"),
        ({"warmup_steps": 9}, "warmup_steps=9 and 4 steps of decay"),
        ({"final_lr_frac": 2.0}, r"final_lr_frac=2.0 must be in \[0, 1\]"),
    ],
)
def test_bad_configurations_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changed)


def test_a_corpus_too_short_is_refused_before_the_first_step(corpus):
    n = len(corpus.val)  # long enough for training, too short for validation
    model = Bigram()
    with pytest.raises(ValueError, match=f"the val part of .* has {n} tokens"):
        run(corpus, replace(CONFIG, seq_len=n), model)
    assert model.calls == []
    run(corpus, replace(CONFIG, seq_len=n, eval_every=0, steps=1, warmup_steps=0))


def test_a_folder_is_no_checkpoint_and_a_missing_gpu_is_named(corpus, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        run(corpus, checkpoint=tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda', but torch sees no GPU: use device='cpu'"):
        run(corpus, replace(CONFIG, device="cuda"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(corpus, bad):
    class Diverging(Bigram):
        def loss(self, input_ids, targets):
            return super().loss(input_ids, targets) * (bad if len(self.calls) == 3 else 1.0)

    model = Diverging()
    with pytest.raises(FloatingPointError, match=r"step 3: loss=.*lower the peak lr"):
        run(corpus, model=model)
    reference = Bigram()
    with pytest.raises(Interrupted):
        run(corpus, model=reference, callbacks=[stop_at(2)])
    assert_same(model, reference)
