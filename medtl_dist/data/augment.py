"""uint8 square ─► uint8 square: what histology and cytology allow and a radiograph does not, turns and other stains.

A stain absorbs light: the optical density ``-log(v / white)`` of a pixel is linear in the amounts of the stains on it
(Beer and Lambert), and slides differ in those amounts from laboratory to laboratory. So amounts are what is jittered, by
factors: bare glass stays white, and black bars stay black. OpenCV and NumPy only; loader processes import this.
"""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[Any]  # always uint8; OpenCV's stubs promise less
StainModel = Literal["hematoxylin_eosin", "color"]

# Optical density of haematoxylin, eosin and DAB (here: whatever is neither) in red, green and blue, and each of unit
# length: Ruifrok and Johnston 2001, "Quantification of histochemical staining by color deconvolution".
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)
_AMOUNTS = np.linalg.inv(_STAINS)  # density [3] @ _AMOUNTS = amounts [3]

# One more than the value over 256: white is density 0, and black, which has no density, gets the largest finite one.
_DENSITY = -np.log((np.arange(256) + 1) / 256)


def right_angle(image: Image, draw: float) -> Image:
    """uint8 [S, S, …] turned by 0, 90, 180 or 270 degrees, as ``draw`` in [0, 1) says."""
    return np.ascontiguousarray(np.rot90(image, int(draw * 4)))


def restain(image: Image, draws: npt.NDArray[np.floating], jitter: float, model: StainModel) -> Image:
    """The image with other amounts of stain: each times a factor from [1 - jitter, 1 + jitter].

    ``hematoxylin_eosin`` separates the two stains first; ``color`` varies the density of each colour channel by itself,
    for other stains (Papanicolaou's has five) and for grey images.

    Args:
        image: uint8 [S, S, 3] RGB, or [S, S] or [S, S, 1] with ``color``.
        draws: float [≥ 3] in [0, 1).
        jitter: in [0, 1).
    """
    factors = 1 + jitter * (2 * np.asarray(draws[:3]) - 1)
    if model == "color":
        channels = 1 if image.ndim == 2 else image.shape[2]
        table = np.round(256 * np.exp(-_DENSITY[:, None] * factors[:channels]) - 1).clip(0, 255).astype(np.uint8)
        stained = cv2.LUT(image, table[:, 0] if channels == 1 else table[:, None, :]).reshape(image.shape)
    else:
        density = cv2.LUT(image, _DENSITY.astype(np.float32))
        change = _AMOUNTS @ np.diag(factors) @ _STAINS  # density @ change: to amounts, times factors, and back
        light = cv2.exp(cv2.transform(density, -change.T))
        stained = np.clip(np.rint(256 * light - 1), 0, 255).astype(np.uint8)
    # Black is no amount of stain but a bar beside the image.
    black = image == 0 if image.ndim == 2 else (image == 0).all(axis=2)
    stained[black] = 0
    return stained
