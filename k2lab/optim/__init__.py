"""Optimisers of the Kimi K2 report: Muon, QK-Clip and the learning-rate schedule."""
