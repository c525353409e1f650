"""Pre-training at reading-group scale: a real text in deterministic batches, and a loop."""
