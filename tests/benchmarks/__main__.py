"""Compare speed with peers, side by side in one process with threads pinned: `make bench`.

Each row of data/results/bench.csv is the median of interleaved runs (ours, peer, ours, ...) on the same
weights and inputs, after the outputs were checked to agree. A ratio above 1 means that ours is better.
The peers are Hugging Face's DeepseekV3ForCausalLM with its grouped expert kernel (its fastest on a CPU)
and, in optimizers.py, two implementations of Muon.
"""

import argparse
import copy
import os
import platform
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from k2lab.model import SMALL, Transformer
from k2lab.model.accounting import flops_per_token
from k2lab.model.attention import LatentCache
from k2lab.model.weights import to_hf
from tests.benchmarks import optimizers
from tests.benchmarks.timing import interleave

RESULTS = Path(__file__).parents[2] / "data" / "results" / "bench.csv"
BATCH, LENGTH = 4, 512  # 2,048 tokens a training step
DECODE_BATCH, DECODE_STEPS = 8, 16


def machine() -> str:
    """Name the processor, without anything that identifies the host."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def models():
    """Build ours and the peer with the same random weights; None without transformers."""
    torch.manual_seed(0)
    ours = Transformer(SMALL)
    try:
        import transformers
    except ImportError:
        return ours, None, "transformers is not installed"
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SMALL.to_hf()))
    theirs.set_experts_implementation("grouped_mm")
    theirs.load_state_dict(to_hf(ours.state_dict(), layout="fused"))
    return ours, theirs, f"transformers {transformers.__version__} grouped_mm"


def stepper(model, loss_of):
    """Return a function that does forward, backward and a fused AdamW step, and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def batch():
    """Return inputs and targets of one training step."""
    ids = torch.randint(0, SMALL.vocab_size, (BATCH, LENGTH + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def bench_train(ours, theirs, runs):
    """Time a training step; return tokens/s of both."""
    inputs, targets = batch()
    steps = [stepper(ours.train(), lambda m: m.loss(inputs, targets))]
    if theirs is not None:
        options = {"input_ids": inputs, "labels": targets, "shift_labels": targets, "use_cache": False}
        steps.append(stepper(theirs.train(), lambda m: m(**options).loss))
        losses = [step() for step in steps]
        assert abs(losses[0] - losses[1]) < 1e-4, f"losses differ: {losses}"
    return [BATCH * LENGTH / s for s in interleave(steps, runs)]


@torch.no_grad()
def bench_decode(ours, theirs, context, runs):
    """Time greedy decoding behind a filled cache; return tokens/s of both."""
    prompt = torch.randint(0, SMALL.vocab_size, (DECODE_BATCH, context))
    ours.eval()
    cache = LatentCache(SMALL, DECODE_BATCH, context + DECODE_STEPS)
    first = ours(prompt, cache)[:, -1:].argmax(-1)

    def decode_ours():
        cache.length, token, out = context, first, []
        for _ in range(DECODE_STEPS):
            token = ours(token, cache)[:, -1:].argmax(-1)
            out.append(token)
        return torch.cat(out, 1)

    functions = [decode_ours]
    if theirs is not None:
        filled = theirs.eval()(prompt, use_cache=True).past_key_values

        def decode_theirs():
            past, token, out = copies.pop(), first, []
            for _ in range(DECODE_STEPS):
                token = theirs(token, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)
                out.append(token)
            return torch.cat(out, 1)

        copies = [copy.deepcopy(filled) for _ in range(runs + 2)]
        agree = (decode_ours() == decode_theirs()).float().mean().item()
        assert agree == 1.0, f"only {agree:.0%} of the decoded tokens agree"
        functions.append(decode_theirs)
    return [DECODE_BATCH * DECODE_STEPS / s for s in interleave(functions, runs)]


def matmul_share(tokens_per_s, runs):
    """Return the training step's FLOP/s over those of a large float32 matrix product.

    Counts the multiplications really done: the latent (absorbed) form of attention, causal, times 3 for
    the backward pass; the optimizer's time is in the step, its arithmetic is not counted.
    """
    a, b = torch.randn(2, 2048, 2048)
    (time_s,) = interleave([lambda: a @ b], runs)
    peak = 2 * 2048**3 / time_s
    # half the context on average, as in a causal sequence
    per_token = 3 * flops_per_token(SMALL, LENGTH // 2, "absorbed")
    return tokens_per_s * per_token / peak, peak


def main():
    """Run every comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="timed rounds of each comparison (median)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, theirs, peer_name = models()
    rows = []

    def add(name, unit, pair, against=peer_name, threads=options.threads, runs=options.runs):
        mine, peer = (*pair, None)[:2]
        ratio = mine / peer if peer else None
        rows.append([name, mine, peer, against, unit, ratio, threads, runs, machine()])

    add("train_step", "tokens/s", bench_train(ours, theirs, options.runs))
    share, peak = matmul_share(rows[0][1], options.runs)
    add("matmul_share", "share of peak", [share], f"float32 matmul 2048, {peak / 1e9:.0f} GFLOP/s")
    for context in tqdm((64, 512, 2048), desc="decode"):
        if theirs is not None:  # the training steps have moved ours
            theirs.load_state_dict(to_hf(ours.state_dict(), layout="fused"))
        add(f"decode_{context}", "tokens/s", bench_decode(ours, theirs, context, options.runs))
    for row, (peer, counts, make) in optimizers.peers().items():
        for threads in counts:
            torch.set_num_threads(threads)
            runs = 3 * options.runs
            add(f"{row}_{threads}t", "steps/s", optimizers.bench_muon(make, runs), peer, threads, runs)
    torch.set_num_threads(options.threads)
    runs = 10 * options.runs  # differences of a percent
    pair = optimizers.bench_tracking(runs)
    add("max_logit_overhead", "tokens/s", pair, "k2lab without the record", runs=runs)
    pair = optimizers.bench_clip(runs)
    add("qk_clip_overhead", "tokens/s", pair, "k2lab with Muon and AdamW, no clip", runs=runs)
    columns = ["name", "ours", "peer", "peer_name", "unit", "ratio", "threads", "runs", "machine"]
    table = pd.DataFrame(rows, columns=columns)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(RESULTS, index=False, float_format="%.4g")
    print(table.drop(columns="machine").to_string(index=False, float_format=lambda x: f"{x:.4g}"))


if __name__ == "__main__":
    main()
