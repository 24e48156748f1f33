"""GGUF files, known by their headers: whether one is whole, what it holds, and whether two fit together."""

from __future__ import annotations

from .header import Header, Overrides, read_header, same_tensors
from .heads import (
    DS4_HEAD,
    DSPARK,
    HEAD,
    OTHER,
    TRUNK,
    TRUNK_AND_HEAD,
    Model,
    check_base,
    check_head,
    check_inside,
    check_pair,
    read_model,
)

__all__ = [
    "DS4_HEAD",
    "DSPARK",
    "HEAD",
    "OTHER",
    "TRUNK",
    "TRUNK_AND_HEAD",
    "Header",
    "Model",
    "Overrides",
    "check_base",
    "check_head",
    "check_inside",
    "check_pair",
    "read_header",
    "same_tensors",
    "read_model",
]
