"""Short training loops that methods share."""

from .adapters import answer_loss, train_adapter

__all__ = ["answer_loss", "train_adapter"]
