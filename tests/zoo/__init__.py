"""A small real model family for tests and figures, and a tiny random one for unit tests."""

from .cache import Zoo
from .domains import EXPERTS
from .encoding import encode_item
from .family import build, items, paths
from .item import extract_answer

__all__ = ["EXPERTS", "Zoo", "build", "encode_item", "extract_answer", "items", "paths"]
