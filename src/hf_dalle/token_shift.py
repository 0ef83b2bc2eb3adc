"""DALLE-pytorch's token shift: before each attention and MLP, part of a state's channels are those of earlier states.

In text half of them come from the state before; in the image a quarter from the cell above and a quarter from the
cell to the left. Here is the shift, which has no weights, and the cache that keeps what later cells shift in.
"""

import torch
import torch.nn.functional as F

from .cache_dalle import DalleCache


def count_shift_bytes(config, dtype: torch.dtype) -> int:
    """Bytes an image that a [`DalleShiftCache`] holds beyond a [`DalleCache`]; 0 for a prior without token shift."""
    if not getattr(config, "use_token_shift", False):
        return 0
    return 2 * config.num_hidden_layers * config.image_grid_size * 2 * -(-config.hidden_size // 4) * dtype.itemsize


class ShiftedCells:
    """The channels that later cells shift in, of the last `image_grid_size` cells: rows x cells x half a width."""

    def __init__(self) -> None:
        self.states: torch.Tensor | None = None

    def join(self, new: torch.Tensor, grid_size: int) -> torch.Tensor:
        """
        Keeps new cells.

        Args:
            new (`torch.Tensor`): rows x cells x channels, those after the ones that there have been.
            grid_size (`int`): how many are kept.

        Returns:
            `torch.Tensor`: rows x (grid_size + cells) x channels, 0 above the first row of cells.
        """
        if self.states is None:
            joined = F.pad(new, (0, 0, grid_size, 0))
        else:  # the prefix of a prompt, read once, goes to each of its images
            joined = torch.cat([self.states.repeat_interleave(len(new) // len(self.states), dim=0), new], dim=1)
        self.states = joined[:, -grid_size:].detach().clone()
        return joined


class DalleShiftCache(DalleCache):
    """
    A [`DalleCache`] of a prior with token shift: with the keys and values, what the next cells shift in.

    Args:
        config ([`DalleFamilyPriorConfig`]): the model's.
        num_images_per_prompt (`int`, *optional*, defaults to 1): as there.
    """

    def __init__(self, config, num_images_per_prompt: int = 1):
        super().__init__(config, num_images_per_prompt)
        self.shifted_cells = [(ShiftedCells(), ShiftedCells()) for _ in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        kept = [cells.states for pair in self.shifted_cells for cells in pair if cells.states is not None]
        return super().nbytes + sum(states.nbytes for states in kept)

    def reset(self) -> None:
        """Empties it."""
        super().reset()
        for pair in self.shifted_cells:
            for cells in pair:
                cells.states = None

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what earlier cells shifted in is kept no more."""
        raise ValueError("The cache of a prior with token shift cannot go back: draw from the start.")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused, as `crop`: rows are those of the images that drawing began with."""
        raise ValueError("The cache of a prior with token shift keeps its rows: beams cannot be reordered.")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused, as `batch_select_indices`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, as `batch_select_indices`: set `num_images_per_prompt` while the cache is empty."""
        raise ValueError("Set `num_images_per_prompt` before the first states of a cache of a prior with token shift.")


def shift_tokens(
    hidden_states: torch.Tensor, first_state: int, config, shifted_cells: ShiftedCells | None = None
) -> torch.Tensor:
    """
    Shifts the states of one piece of the stream, which holds all of the text or none.

    Args:
        hidden_states (`torch.Tensor`): B x states x width, normalised.
        first_state (`int`): place in the stream of the first of them.
        config ([`DalleFamilyPriorConfig`]): the model's.
        shifted_cells (`ShiftedCells`, *optional*): of the cells before them; without, the image starts with them.

    Returns:
        `torch.Tensor`: of the same shape.
    """
    grid_size, width = config.image_grid_size, hidden_states.shape[-1]
    text, image = hidden_states.tensor_split([max(config.num_text_states - first_state, 0)], dim=1)
    # Halves and quarters rounded up, as `torch.chunk` cuts them.
    before, same = text.tensor_split([-(-width // 2)], dim=2)
    text = torch.cat([F.pad(before, (0, 0, 1, -1)), same], dim=2) if text.shape[1] else text
    if image.shape[1] == 0:
        return text
    quarter, num_cells = -(-width // 4), image.shape[1]
    moved, same = image.tensor_split([2 * quarter], dim=2)
    joined = (shifted_cells or ShiftedCells()).join(moved, grid_size)
    above, left = joined.tensor_split([quarter], dim=2)
    above, left = above[:, :num_cells], left[:, grid_size - 1 : -1]
    first_cell = max(first_state - config.num_text_states, 0)
    columns = torch.arange(first_cell, first_cell + num_cells, device=image.device) % grid_size
    left = left.masked_fill((columns == 0)[:, None], 0)
    return torch.cat([text, torch.cat([above, left, same], dim=2)], dim=1)
