"""The data flow of a model: what feeds each of its layers."""

from .flow import LayerFlow
from .trace import is_layer, trace

__all__ = ["LayerFlow", "is_layer", "trace"]
