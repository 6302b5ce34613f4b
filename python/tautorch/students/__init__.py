"""Smaller students made of a teacher: fewer blocks, fewer channels, cheaper convolutions."""

from tautorch.students.cost import Cost, LayerCost, StudentReport, compare, cost
from tautorch.students.depth import shrink_depth
from tautorch.students.rewrite import channel_shuffle, depthwise_separable
from tautorch.students.width import shrink_width

__all__ = [
    "Cost",
    "LayerCost",
    "StudentReport",
    "channel_shuffle",
    "compare",
    "cost",
    "depthwise_separable",
    "shrink_depth",
    "shrink_width",
]
