"""Short training loops that methods share."""

from .adapters import answer_loss, train_adapter
from .batches import labelled_batch
from .losses import row_losses
from .resume import training_history
from .settings import TrainSettings
from .trainees import trained_names
from .weights import train_delta

__all__ = [
    "TrainSettings",
    "answer_loss",
    "labelled_batch",
    "row_losses",
    "train_adapter",
    "train_delta",
    "trained_names",
    "training_history",
]
