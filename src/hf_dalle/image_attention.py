"""Which earlier states each attention type may attend to (paper, section 2.2 and figure 11).

Pure functions of the type, the grid, the kernel and the text length: the one source for masks, for blocked attention
and for cache windows. How a mask is applied lives in `modeling_dalle_prior.py`, attention in blocks in
`sparse_attention.py`.
"""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch


ATTENTION_TYPES = ("full", "row", "column", "conv")


def cache_constants(function: Callable) -> Callable:
    """`lru_cache`, but not while `torch.compile` or `torch.export` traces, where tensors hold no values."""
    cached = lru_cache(function)

    @wraps(function)
    def call(*args, **kwargs):
        return (function if torch.compiler.is_compiling() else cached)(*args, **kwargs)

    call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]  # a function's attribute, as `lru_cache` has it
    return call


def image_attention_offsets(attention_type: str, grid_size: int, kernel_size: int = 11) -> tuple[int, ...]:
    """
    How far back an image state looks among the image states, in raster steps; 0 is the state itself.

    Every type is the same for every state: nothing is cut at the grid's borders, so that a window wraps from the start
    of a row to the end of the row above, as in the paper.

    Args:
        attention_type (`str`): one of
            - `"full"`: every earlier state;
            - `"row"`: the `grid_size` states before it, so the paper's five of a 4 x 4 grid with itself;
            - `"column"`: the states above it;
            - `"conv"`: the upper half of a `kernel_size` x `kernel_size` window around it.
        grid_size (`int`): side of the square grid of image tokens.
        kernel_size (`int`): odd side of the window of `"conv"`; the other types ignore it.

    Returns:
        `tuple[int, ...]`: the offsets, ascending, each in [0, grid_size ** 2).

    Raises:
        `ValueError`: for an unknown type, or an even kernel.
    """
    num_states = grid_size**2
    if attention_type == "full":
        return tuple(range(num_states))
    if attention_type == "row":
        return tuple(range(min(grid_size + 1, num_states)))
    if attention_type == "column":
        return tuple(range(0, num_states, grid_size))
    if attention_type == "conv":
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"The kernel of conv attention must be a positive odd number, got {kernel_size}.")
        reach = kernel_size // 2
        window = {dr * grid_size + dc for dr in range(reach + 1) for dc in range(-reach, reach + 1)}
        return tuple(sorted(offset for offset in window if 0 <= offset < num_states))
    raise ValueError(f"Unknown attention type {attention_type!r}. The valid ones are {', '.join(ATTENTION_TYPES)}.")


@cache_constants
def image_attention_window(
    attention_type: str, grid_size: int, kernel_size: int, num_queries: int, num_keys: int
) -> torch.Tensor:
    """
    The mask of any `num_keys` consecutive image states of which the last `num_queries` look at all: since offsets are
    the same for every state, it does not matter where in the grid they are.

    Args:
        attention_type, grid_size, kernel_size: as for [`image_attention_offsets`].
        num_queries, num_keys (`int`): lengths, `num_queries <= num_keys <= grid_size ** 2`.

    Returns:
        `torch.Tensor`: bool, num_queries x num_keys. It is shared by all callers: do not write into it.
    """
    # A mask first built by a caller in inference mode must still serve one that trains.
    with torch.inference_mode(False):
        may_attend = torch.zeros(grid_size**2, dtype=torch.bool)
        may_attend[list(image_attention_offsets(attention_type, grid_size, kernel_size))] = True
        queries = torch.arange(num_keys - num_queries, num_keys)
        offsets = queries[:, None] - torch.arange(num_keys)[None, :]
        return (offsets >= 0) & may_attend[offsets.clamp(min=0)]


def image_attention_mask(attention_type: str, grid_size: int, kernel_size: int = 11) -> torch.Tensor:
    """
    The mask among image states: row i, column j is `True` where state i may attend to state j.

    Args:
        attention_type, grid_size, kernel_size: as for [`image_attention_offsets`].

    Returns:
        `torch.Tensor`: bool, N x N with N = grid_size ** 2. It is shared by all callers: do not write into it.
    """
    return image_attention_window(attention_type, grid_size, kernel_size, grid_size**2, grid_size**2)


@cache_constants
def stream_attention_mask(
    attention_type: str,
    text_length: int,
    grid_size: int,
    kernel_size: int = 11,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """
    The mask among all states of the stream, text first: text attends causally to text, an image state attends to all
    text states and to those image states that [`image_attention_mask`] allows.

    Args:
        text_length (`int`): number of text states T.
        attention_type, grid_size, kernel_size: as for [`image_attention_offsets`].
        device (`torch.device`): where the mask is to be.

    Returns:
        `torch.Tensor`: bool, S x S with S = text_length + grid_size ** 2. It is shared by all callers: do not write
        into it.
    """
    with torch.inference_mode(False):
        stream_length = text_length + grid_size**2
        mask = torch.ones(stream_length, stream_length, dtype=torch.bool).tril()
        mask[text_length:, text_length:] = image_attention_mask(attention_type, grid_size, kernel_size)
        return mask.to(device)
