"""A zoo of small networks: one case for every construct that the package claims to handle."""

from zoo import (
    arithmetic,
    attention,
    dense,
    experts,
    frozen,
    functional,
    grouped,
    hostile,
    layers,
    movement,
    recurrent,
    structure,
)  # fmt: skip
from zoo.case import CLASSES, ZOO, Case, Inputs, conv, head, images, randomise, tensors

__all__ = [
    "CLASSES",
    "ZOO",
    "Case",
    "Inputs",
    "arithmetic",
    "attention",
    "conv",
    "dense",
    "experts",
    "frozen",
    "functional",
    "grouped",
    "head",
    "hostile",
    "images",
    "layers",
    "movement",
    "randomise",
    "recurrent",
    "structure",
    "tensors",
]
