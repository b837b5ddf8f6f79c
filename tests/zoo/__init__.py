"""A zoo of small networks: one case for every construct that the package claims to handle."""

from zoo import arithmetic, dense, frozen, functional, grouped, hostile, layers, movement, recurrent, structure
from zoo.case import CLASSES, UNTRACEABLE, ZOO, Case, Inputs, conv, head, images, randomise, tensors

__all__ = [
    "CLASSES",
    "UNTRACEABLE",
    "ZOO",
    "Case",
    "Inputs",
    "arithmetic",
    "conv",
    "dense",
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
