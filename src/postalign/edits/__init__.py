"""What an alignment can change: hidden states, the next-token distribution, weights; and the gate that decides when."""

from .edit import Control, Edit, edit_from_state
from .gates import ProbeGate
from .guidance import AdapterGuide, CheckpointGuide, Guidance, Guide, PromptGuide, VectorGuide, union, union_order
from .hidden import HiddenEdit
from .sparse import SparsePatch
from .weights import LowRankPatch

__all__ = [
    "AdapterGuide",
    "CheckpointGuide",
    "Control",
    "Edit",
    "Guidance",
    "Guide",
    "HiddenEdit",
    "LowRankPatch",
    "ProbeGate",
    "PromptGuide",
    "SparsePatch",
    "VectorGuide",
    "edit_from_state",
    "union",
    "union_order",
]
