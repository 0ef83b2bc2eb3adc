"""Changes to training pictures that leave what they show: for networks that see few, a batch at a time.

Crops and flips of single pictures are `hf_dalle.data.RandomCrop`'s.
"""

import math

import torch
import torch.nn.functional as F


MAX_TURN, MAX_ZOOM, MAX_STRETCH, MAX_SHIFT = math.radians(15), 0.18, 0.1, 0.06  # of the side
COLOUR_SPREAD = 0.06  # of a colour matrix's entries about the identity's
GREY_SHARE, COVERED_SHARE = 0.1, 0.3  # of the pictures
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601's luma


def distort(pixel_values: torch.Tensor, strength: float) -> torch.Tensor:
    """
    Turns, zooms, stretches, moves and recolours each picture, and covers a part of some, at random.

    Args:
        pixel_values (`torch.Tensor`): B x 3 x H x W in [0, 1]; what comes in at the edges is white.
        strength (`float`): from 0, which changes nothing; angles, lengths, colours and shares are in proportion.

    Returns:
        `torch.Tensor`: the same shape, in [0, 1]. Random numbers come from torch's own generator, on the CPU.
    """
    if strength == 0:
        return pixel_values
    device, number = pixel_values.device, len(pixel_values)
    grid = F.affine_grid(_draw_affine(number, strength).to(device), pixel_values.shape, align_corners=False)
    # of the inverse, so that the zeros of `grid_sample` outside are white
    moved = F.grid_sample(1 - pixel_values, grid.to(pixel_values.dtype), align_corners=False)
    matrices = torch.eye(3) + COLOUR_SPREAD * strength * torch.randn(number, 3, 3)
    matrices[torch.rand(number) < GREY_SHARE * strength] = torch.tensor(GREY).expand(3, 3)
    recoloured = torch.einsum("bij,bjhw->bihw", matrices.to(moved), moved)
    return _cover_some((1 - recoloured).clamp(0, 1), COVERED_SHARE * strength)


def _draw_affine(number: int, strength: float) -> torch.Tensor:
    """Maps of places in the new picture to those in the old, N x 2 x 3, in units of half a side."""
    turn, zoom, stretch, right, down = (2 * torch.rand(5, number) - 1) * strength
    turn, zoom = MAX_TURN * turn, 1 + MAX_ZOOM * zoom
    wide = zoom * (1 + MAX_STRETCH * stretch)
    rows = [
        torch.stack([wide * turn.cos(), -zoom * turn.sin(), 2 * MAX_SHIFT * right], dim=1),
        torch.stack([wide * turn.sin(), zoom * turn.cos(), 2 * MAX_SHIFT * down], dim=1),
    ]
    return torch.stack(rows, dim=1)


def _cover_some(pixel_values: torch.Tensor, share: float) -> torch.Tensor:
    """A grey square of a quarter of the side on a share of the pictures, anywhere, of any grey."""
    number, _, height, width = pixel_values.shape
    is_chosen, grey = torch.rand(number) < share, torch.rand(number)
    inside = []
    for length in (height, width):
        first = torch.rand(number) * (length - length // 4)
        place = torch.arange(length)
        inside.append((place >= first[:, None]) & (place < first[:, None] + length // 4))  # N x length
    is_covered = inside[0][:, None, :, None] & inside[1][:, None, None, :] & is_chosen[:, None, None, None]
    return torch.where(is_covered.to(pixel_values.device), grey[:, None, None, None].to(pixel_values), pixel_values)
