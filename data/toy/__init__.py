"""Toy cities: small drawn street scenes in the layouts of GTA5, SYNTHIA and Cityscapes.

The scenes hold all 19 Cityscapes classes with exact label maps and take seconds to draw, so that the whole pipeline
runs without any download.
"""

from data.toy.files import generate

__all__ = ["generate"]
