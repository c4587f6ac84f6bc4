"""What lies in a model folder: described, loaded, saved, with its card; and the paper's checkpoints brought in."""

from vora.checkpoint.layout import AdapterInfo, CheckpointInfo, read_info
from vora.checkpoint.load import load_adapter, load_model, merge_run
from vora.checkpoint.save import merge, save_adapter, save_merged, save_training

__all__ = [
    "AdapterInfo",
    "CheckpointInfo",
    "load_adapter",
    "load_model",
    "merge",
    "merge_run",
    "read_info",
    "save_adapter",
    "save_merged",
    "save_training",
]
