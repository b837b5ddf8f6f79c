"""A zoo of small networks: one case for every construct that the package claims to handle."""

from zoo import (
    arithmetic,
    attention,
    dense,
    frozen,
    functional,
    graphs,
    grouped,
    hostile,
    layers,
    movement,
    recurrent,
    states,
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
    "frozen",
    "functional",
    "graphs",
    "grouped",
    "head",
    "hostile",
    "images",
    "layers",
    "movement",
    "randomise",
    "recurrent",
    "states",
    "structure",
    "tensors",
]
