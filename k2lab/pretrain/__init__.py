"""Text, training and what to watch while training."""

from k2lab.pretrain.corpus import load_corpus
from k2lab.pretrain.trainer import TrainConfig, train
