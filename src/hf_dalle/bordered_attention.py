"""Image attention of DALL-E's reimplementations, whose windows stop at the borders of the grid, or go round it.

Pure functions of the type, the grid and the kernel, with where a cache keeps what later states see. The paper's types,
which are the same for every state and wrap from row to row, live in `image_attention.py`.
"""

from functools import cache
from typing import NamedTuple

import torch


BORDERED_TYPES = ("axial_row", "conv_like", "conv_bordered", "conv_wrapped")


@cache
def bordered_window(attention_type: str, grid_size: int, kernel_size: int) -> tuple[tuple[int, int], ...]:
    """
    How far up and how far left a cell looks, itself (0, 0) included; what is outside of the grid is not seen.

    Args:
        attention_type (`str`): one of
            - `"axial_row"`: the cells to the left in its own row (DALLE-pytorch);
            - `"conv_like"`: the `kernel_size` x `kernel_size` window whose last cell it is (DALLE-pytorch);
            - `"conv_bordered"`: those of the window centred on it that come before it (ruDALL-E's v3 form, and
              DALLE-pytorch before 1.5 where it says conv_like).
        grid_size (`int`): side of the square grid of image tokens.
        kernel_size (`int`): odd side of the window; `"axial_row"` ignores it.

    Returns:
        `tuple[tuple[int, int]]`: pairs (rows up, columns left), by their raster distance.
    """
    if attention_type == "axial_row":
        window = [(0, left) for left in range(grid_size)]
    elif attention_type == "conv_like":
        window = [(up, left) for up in range(kernel_size) for left in range(kernel_size)]
    elif attention_type == "conv_bordered":
        reach = kernel_size // 2
        window = [(up, left) for up in range(reach + 1) for left in range(-reach, reach + 1) if up or left >= 0]
    else:
        raise ValueError(f"Unknown attention type {attention_type!r}: it has no window that ends at the borders.")
    inside = [(up, left) for up, left in window if up < grid_size and abs(left) < grid_size]
    return tuple(sorted(inside, key=lambda step: step[0] * grid_size + step[1]))


@cache
def bordered_attention_mask(attention_type: str, grid_size: int, kernel_size: int) -> torch.Tensor:
    """
    The mask among image cells: row i, column j is `True` where cell i sees cell j.

    Args:
        attention_type (`str`):
            As for [`bordered_window`], or `"conv_wrapped"`: those of the window centred on a cell that come before it,
            where a window that leaves the grid goes on at the opposite border (ruDALL-E's v2 form).
        grid_size, kernel_size: as for [`bordered_window`].

    Returns:
        `torch.Tensor`: bool, N x N with N = grid_size ** 2. It is shared by all callers: do not write into it.
    """
    with torch.inference_mode(False):
        cells = torch.arange(grid_size**2)
        rows, columns = cells // grid_size, cells % grid_size
        if attention_type == "conv_wrapped":
            reach = kernel_size // 2
            near = [(place[:, None] - place + reach) % grid_size <= 2 * reach for place in (rows, columns)]
            return (near[0] & near[1]).tril()
        mask = torch.zeros(grid_size**2, grid_size**2, dtype=torch.bool)
        for up, left in bordered_window(attention_type, grid_size, kernel_size):
            is_inside = (rows >= up) & (columns >= left) & (columns - left < grid_size)
            seeing = cells[is_inside]
            mask[seeing, seeing - up * grid_size - left] = True
        return mask


class BorderedLayout(NamedTuple):
    """
    Where a cache keeps the image states of such a layer: state i at place `i % ring_length` of the one ring.

    It answers as `cache_dalle.RingLayout` does; what a state sees there depends on its cell.

    Args:
        num_rings (`int`): 1.
        ring_length (`int`): how many states are kept.
        attention_type, grid_size, kernel_size: as for [`bordered_attention_mask`].
    """

    num_rings: int
    ring_length: int
    attention_type: str
    grid_size: int
    kernel_size: int

    @property
    def num_slots(self) -> int:
        """How many image states are kept."""
        return self.ring_length

    @property
    def is_masked(self) -> bool:
        """Whether the ring holds states that the newest one does not see."""
        return True

    def locate(self, state: int) -> tuple[int, int, int]:
        """The ring of an image state, its place there, and how many places of the ring are filled with it."""
        return 0, state % self.ring_length, min(state + 1, self.ring_length)

    def slots(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """The slots of the image states from `start` to `stop`."""
        return torch.arange(start, stop, device=device) % self.ring_length

    def hidden_places(self, state: int, device: torch.device) -> torch.Tensor:
        """Bool, ring_length: the places that image state `state` does not see."""
        return _hidden_places(self, device)[state]


def bordered_layout(attention_type: str, grid_size: int, kernel_size: int) -> BorderedLayout:
    """The [`BorderedLayout`] of an attention type; arguments as for [`bordered_attention_mask`]."""
    if attention_type == "conv_wrapped":  # the last row sees the first
        return BorderedLayout(1, grid_size**2, attention_type, grid_size, kernel_size)
    up, left = bordered_window(attention_type, grid_size, kernel_size)[-1]
    return BorderedLayout(1, up * grid_size + left + 1, attention_type, grid_size, kernel_size)


@cache
def _hidden_places(layout: BorderedLayout, device: torch.device) -> torch.Tensor:
    """Bool, cells x places."""
    with torch.inference_mode(False):
        mask = bordered_attention_mask(layout.attention_type, layout.grid_size, layout.kernel_size)
        num_cells = len(mask)
        is_hidden = torch.ones(num_cells, layout.ring_length, dtype=torch.bool)
        cells, seen = mask.nonzero(as_tuple=True)
        is_hidden[cells, seen % layout.ring_length] = False
        return is_hidden.to(device)
