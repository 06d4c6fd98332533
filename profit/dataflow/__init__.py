"""The data flow of a model: what feeds each of its layers."""

from .flow import LayerFlow
from .trace import eval_mode, is_layer, trace

__all__ = ["LayerFlow", "eval_mode", "is_layer", "trace"]
