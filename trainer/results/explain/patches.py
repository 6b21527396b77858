"""Where an image's tokens are: their grid, the part of the photo below it, windows of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.families import num_patches
from featstore.encoders.pixels import seen_box
from featstore.encoders.spec import VisionSpec

MOST_CELLS = 256
"""Windows of one size that are hidden, one after the other, in a row's check."""
WINDOWS = (1, 3)
"""Side of the windows, in cells."""


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of an encoder, from the upper left, line by line, after the leading tokens.

    Attributes:
        rows, columns: Of the grid.
        leading: Tokens before them that the head reads too: class, distillation, registers.
        cell: Side of a cell, in patches: 1, or more where patches are many; see `MOST_CELLS`.
        size: Height and width of the pixels.
        covered: Height and width of the pixels that have a patch.
        crop, pad: What the image converter does with a photo of another shape.
    """

    rows: int
    columns: int
    leading: int
    cell: int
    size: tuple[int, int]
    covered: tuple[int, int]
    crop: bool
    pad: bool

    @classmethod
    def of(cls, spec: VisionSpec, tokens: int) -> Patches:
        """Return those of a spec.

        Args:
            spec: Of the image features.
            tokens: That the head reads.
        """
        converter: Mapping[str, Any] = spec.converter
        patch = spec.architecture["patch_size"]
        high, wide = (patch, patch) if isinstance(patch, int) else patch
        height, width = spec.architecture["image_shape"][:2]
        rows, columns = height // high, width // wide
        count = num_patches(spec.architecture)
        cell = next(
            side
            for side in range(1, max(rows, columns) + 1)
            if math.ceil(rows / side) * math.ceil(columns / side) <= MOST_CELLS
        )
        return cls(
            rows,
            columns,
            tokens - count,
            cell,
            (height, width),
            (rows * high, columns * wide),
            bool(converter["crop_to_aspect_ratio"]),
            bool(converter["pad_to_aspect_ratio"]),
        )

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the grid of cells."""
        return math.ceil(self.rows / self.cell), math.ceil(self.columns / self.cell)

    def box(self, shape: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part of a photo that has patches.

        Args:
            shape: Height and width of the photo.

        Returns:
            Top, left, height and width, in pixels of the photo; parts of one, and beyond the
            photo where the converter pads.
        """
        top, left, height, width = seen_box(shape, self.size, self.crop, self.pad)
        high, wide = (a / b for a, b in zip(self.covered, self.size, strict=True))
        return float(top), float(left), height * high, width * wide

    def windows(self, side: int) -> NDArray[np.bool_]:
        """Return windows of cells, one around each cell, cut at the edges.

        Args:
            side: Of a window, in cells; odd.

        Returns:
            bool of shape (cells, rows * columns): the patches of each.
        """
        high, wide = self.cells
        row, column = np.arange(self.rows) // self.cell, np.arange(self.columns) // self.cell
        near_row = np.abs(row - np.arange(high)[:, None]) <= side // 2
        near_column = np.abs(column - np.arange(wide)[:, None]) <= side // 2
        found = near_row[:, None, :, None] & near_column[None, :, None, :]
        return found.reshape(high * wide, self.rows * self.columns)

    def kept(self, hidden: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the tokens that stay, (choices, tokens), where some patches are hidden."""
        leading = np.ones((len(hidden), self.leading), bool)
        return np.concatenate([leading, ~hidden], axis=1)

    def grid(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return numbers of patches, or of cells, as they lie: (..., rows, columns)."""
        high, wide = self.cells
        if values.shape[-1] == high * wide:
            return values.reshape(*values.shape[:-1], high, wide)
        return values.reshape(*values.shape[:-1], self.rows, self.columns)
