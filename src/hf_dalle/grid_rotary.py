"""Rotary positions of DALLE-pytorch: text by its place in the caption, image cells by row and column of the grid.

Pure functions. Which states they are given, and that values are rotated too, is `modeling_family_prior.py`'s.
"""

import math

import torch

from .image_attention import cache_constants


FAR_FROM_TEXT = 8192  # the place in the caption that all image cells have
FAR_FROM_IMAGE = -10.0  # the row and column that all text has; those of cells are in [-1, 1]


@cache_constants
def rotary_table(
    num_text_states: int, grid_size: int, head_dim: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosine and sine of each state's angles: a third of the channels for the place in the caption, with frequencies as
    in language models, a third for the row and a third for the column, with pi to 5 pi across half the grid.

    Args:
        num_text_states (`int`): text states, start-of-text included.
        grid_size (`int`): side of the square grid of image tokens.
        head_dim (`int`): channels of a head, of which the first 6 * (head_dim // 3 // 2) are rotated.
        device (`torch.device`): where the tables are to be.

    Returns:
        Two float32 tensors, (num_text_states + grid_size ** 2) x rotated channels, each angle twice side by side. They
        are shared by all callers: do not write into them.
    """
    width = head_dim // 3
    with torch.inference_mode(False):
        words = 1.0 / (10000 ** (torch.arange(0, width, 2)[: width // 2].float() / width))
        pixels = torch.linspace(1.0, 5.0, width // 2) * math.pi
        num_cells = grid_size**2
        places = torch.cat([torch.arange(num_text_states), torch.full((num_cells,), FAR_FROM_TEXT)]).float()
        line = torch.linspace(-1.0, 1.0, steps=grid_size)
        outside = torch.full((num_text_states,), FAR_FROM_IMAGE)
        rows = torch.cat([outside, line.repeat_interleave(grid_size)])
        columns = torch.cat([outside, line.repeat(grid_size)])
        angles = torch.cat([places[:, None] * words, rows[:, None] * pixels, columns[:, None] * pixels], dim=1)
        angles = angles.repeat_interleave(2, dim=1).to(device)
        return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """
    Rotates pairs of neighbouring channels.

    Args:
        states (`torch.Tensor`): ... x head_dim.
        cosine, sine (`torch.Tensor`): rows of [`rotary_table`] that broadcast against `states`, but for the channels
            after them, which stay.
    """
    turned, kept = states.tensor_split([cosine.shape[-1]], dim=-1)
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack([-second, first], dim=-1).flatten(-2)
    return torch.cat([turned * cosine.to(states.dtype) + quarter_turn * sine.to(states.dtype), kept], dim=-1)
