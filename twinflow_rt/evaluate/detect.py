"""Finds coloured shapes in an image: colour lines, connected components, equal-area templates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError
from ..training.scenes import ARM, COLORS, DISTANCE, SHAPES

MIN_AREA = 30 / 64**2  # smaller components are specks; share of the image
MIN_FIT = 0.8  # overlap with the best template below which a component is no shape
MAX_RESIDUAL = 60.0  # distance of a pixel from its colour line, of 255
AREA = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 1 - (1 - ARM) ** 2}  # / size^2


@dataclass(frozen=True)
class Detection:
    """A shape found: box centre and size in pixels of the image; `fit` is its overlap in [0, 1]."""

    shape: str
    color: str
    cx: float
    cy: float
    size: float
    fit: float


def detect(image: ArrayLike) -> list[Detection]:
    """Return all shapes in `image` (uint8 [H, W, 3] or a PIL image), largest first.

    A pixel is modelled as p = b + a (c - b): background b (median of the border), palette colour c,
    cover a. It belongs to the colour of least residual, and to an object of it where a > 1/2; so
    blurred edges keep their object's colour. Each 4-connected component is compared with every
    shape of its own area and centroid, by sum(min) / sum(max) of the covers.
    """
    from scipy import ndimage

    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ConfigError(f"an image to examine is uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    cover, nearest = _unmix(pixels.astype(np.float32))
    least = MIN_AREA * nearest.size
    found = []
    for i, color in enumerate(COLORS):
        mask = (nearest == i) & (cover[i] > 0.5)
        if mask.sum() < least:
            continue
        labels, n = ndimage.label(mask)
        for k in range(1, n + 1):
            component = labels == k
            if component.sum() >= least:
                # one pixel further out lie the object's soft edges
                soft = np.where(ndimage.binary_dilation(component), cover[i], 0)
                best = _best_shape(soft, color)
                if best.fit >= MIN_FIT:
                    found.append(best)
    return sorted(found, key=lambda d: -d.size)


def _unmix(pixels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Return the cover [colours, H, W] in [0, 1] and the index [H, W] of the fitting colour, or -1 (none)."""
    border = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    background = np.median(np.concatenate([b.reshape(-1, 3) for b in border]), axis=0)
    lines = np.asarray(list(COLORS.values()), np.float32) - background
    offset = pixels - background
    cover = np.clip(np.einsum("hwc,kc->khw", offset, lines) / (np.square(lines).sum(1) + 1)[:, None, None], 0, 1)
    residual = np.linalg.norm(offset - cover[..., None] * lines[:, None, None], axis=-1)
    nearest = np.where(residual.min(0) <= MAX_RESIDUAL, residual.argmin(0), -1)
    return cover, nearest


def _best_shape(cover: NDArray[np.float32], color: str) -> Detection:
    """Return the shape that overlaps best with one object's cover [H, W]."""
    total = float(cover.sum())
    columns, rows = np.arange(cover.shape[1]) + 0.5, np.arange(cover.shape[0]) + 0.5
    cx, cy = float(cover.sum(0) @ columns) / total, float(cover.sum(1) @ rows) / total
    fits = []
    for shape in SHAPES:
        size = math.sqrt(total / AREA[shape])
        middle = cy - size / 6 if shape == "triangle" else cy  # its centroid lies below its box's centre
        distance = DISTANCE[shape](columns[None] - cx, rows[:, None] - middle, size / 2)
        template = np.clip(0.5 - distance, 0, 1)
        fit = float(np.minimum(cover, template).sum() / np.maximum(cover, template).sum())
        fits.append(Detection(shape, color, cx, middle, size, fit))
    return max(fits, key=lambda d: d.fit)
