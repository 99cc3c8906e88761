"""Drawings of a part that lies as it fell."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw


def part(
    angle: float, *, size: int = 160, centre: tuple[float, float] = (80, 80), ground: int = 200, length: float = 90
) -> np.ndarray:
    """A grey wedge with a bright spot near its wide end, turned by ``angle`` degrees; uint8 [size, size]."""
    fine = 4
    turn = np.deg2rad(angle)
    down, right = np.array([-np.sin(turn), np.cos(turn)]), np.array([np.cos(turn), np.sin(turn)])

    def at(along: float, across: float) -> tuple[float, float]:
        x, y = centre + length * (along * down + across * right)
        return x * fine, y * fine

    canvas = Image.new("L", (size * fine, size * fine), ground)
    draw = ImageDraw.Draw(canvas)
    draw.polygon([at(-0.5, -0.25), at(-0.5, 0.25), at(0.5, 0.06), at(0.5, -0.06)], fill=60)
    draw.polygon([at(-0.4, -0.15), at(-0.4, -0.02), at(-0.3, -0.02), at(-0.3, -0.15)], fill=140)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))
