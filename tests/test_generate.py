"""Generation against uncached one-row decoding, and sampling against its stated distribution."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from k2lab.model import TINY, Transformer
from k2lab.model.generate import generate, sample


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(replace(TINY, initializer_range=0.2, max_position_embeddings=64))


PROMPTS = [[5, 6, 7], [8], [1, 2, 3, 4, 5, 6, 7]]


def greedy(model, prompt, steps):
    """Decode one row without a cache, from the start each time."""
    ids, logprobs = list(prompt), []
    for _ in range(steps):
        logp = model.eval()(torch.tensor([ids]))[0, -1].log_softmax(-1)
        logprobs.append(logp.max().item())
        ids.append(logp.argmax().item())
    return ids[len(prompt) :], logprobs


def test_ragged_greedy_equals_uncached_rows(model):
    out = generate(model, PROMPTS, max_new_tokens=6, temperature=0)
    for i, prompt in enumerate(PROMPTS):
        tokens, logprobs = greedy(model, prompt, 6)
        assert out.row(i) == tokens
        assert out.logprobs[i].tolist() == pytest.approx(logprobs, abs=1e-4)
    assert not out.stopped.any()


def test_stops_and_limits_are_per_row(model):
    free = generate(model, PROMPTS, max_new_tokens=6, temperature=0)
    stops = [[free.row(0)[2]], [], [free.row(2)[0]]]
    out = generate(model, PROMPTS, max_new_tokens=[6, 4, 6], temperature=0, stop_ids=stops)
    first = free.row(0).index(stops[0][0]) + 1
    assert out.lengths.tolist() == [first, 4, 1]
    assert out.stopped.tolist() == [True, False, True]
    for i, length in enumerate(out.lengths.tolist()):
        assert out.row(i) == free.row(i)[:length]
        assert out.tokens[i, length:].sum() == 0
        assert out.logprobs[i, length:].sum() == 0


def test_sampling_is_reproducible_and_logprobs_are_the_models(model):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, PROMPTS, max_new_tokens=8, temperature=0.7, generator=generator)

    a, b, c = draw(1), draw(1), draw(2)
    assert torch.equal(a.tokens, b.tokens)
    assert not torch.equal(a.tokens, c.tokens)
    ids = torch.tensor([PROMPTS[0] + a.row(0)])
    logp = model.eval()(ids)[0, 2:-1].log_softmax(-1)
    torch.testing.assert_close(a.logprobs[0], logp.gather(1, ids[0, 3:, None])[:, 0], atol=1e-4, rtol=0)


def test_sample_follows_temperature_and_nucleus():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(**options):
        return sample(logits, generator=generator, **options)[0].bincount(minlength=4) / 20_000

    torch.testing.assert_close(shares(), probs, atol=0.015, rtol=0)
    sharp = probs**2 / (probs**2).sum()
    torch.testing.assert_close(shares(temperature=0.5), sharp, atol=0.015, rtol=0)
    nucleus = torch.tensor([0.625, 0.375, 0, 0])  # 0.5 alone is short of 0.75, two tokens reach it
    torch.testing.assert_close(shares(top_p=0.75), nucleus, atol=0.015, rtol=0)
    assert shares(top_p=0.4).tolist() == [1, 0, 0, 0]
    _, logp = sample(logits[:1], temperature=0, top_p=0.4)
    assert logp.item() == pytest.approx(torch.tensor(0.5).log().item())


def test_mode_is_restored(model):
    model.train()
    generate(model, [[1]], max_new_tokens=1)
    assert model.training
    with pytest.raises(ValueError, match="temperature"):
        generate(model, [[1]], max_new_tokens=1, temperature=-1)
    assert model.training


def test_numbers_of_any_kind():
    model = Transformer(TINY)
    out = generate(model, torch.ones(2, 3), max_new_tokens=np.int64(2), stop_ids=torch.tensor([1]))
    assert out.tokens.shape[1] <= 2
    assert generate(model, [[1]], max_new_tokens=1, stop_ids=np.int64(5)).lengths.tolist() == [1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens has 2 entries"),
        ({"max_new_tokens": 60}, "max_position_embeddings"),
        ({"max_new_tokens": 1, "temperature": -1}, "temperature=-1"),
        ({"max_new_tokens": 1, "top_p": 0}, "top_p=0"),
        ({"max_new_tokens": 1, "stop_ids": [[1]]}, "stop_ids has 1 entries"),
        ({"max_new_tokens": 1, "stop_ids": [TINY.vocab_size]}, "stop_ids"),
    ],
)
def test_bad_input(model, options, named):
    with pytest.raises(ValueError, match=named):
        generate(model, PROMPTS, **options)


@pytest.mark.parametrize("prompts", [[[1], []], [], [1, 2]])
def test_empty_prompts_are_refused(model, prompts):
    with pytest.raises(ValueError, match="prompts="):
        generate(model, prompts, max_new_tokens=1)


def test_ids_outside_the_vocabulary_are_refused(model):
    with pytest.raises(ValueError, match="prompt ids 1 to 1024"):
        generate(model, [[1, 1024]], max_new_tokens=1)
