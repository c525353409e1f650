"""Time functions side by side: interleaved rounds, medians."""

import statistics
import time


def seconds(function) -> float:
    """Time one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(functions, runs) -> list[float]:
    """Return the median seconds of each function over `runs` rounds, after one warm-up round."""
    for function in functions:
        function()
    rounds = [[seconds(function) for function in functions] for _ in range(runs)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
