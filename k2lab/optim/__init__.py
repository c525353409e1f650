"""Optimisers of the Kimi K2 report: Muon, QK-Clip, MuonClip and the learning-rate schedule."""

from k2lab.optim.muon import Muon, newton_schulz, split_parameters
from k2lab.optim.qk_clip import MuonClip, qk_clip_, scale_mha_qk_
from k2lab.optim.schedule import wsd_lr
