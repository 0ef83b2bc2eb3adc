"""Attention of one new image state an image: to the text, which the images of a prompt share, and to its own ring.

Which states are in the ring, and where, is the cache's: `cache_dalle.py`. No weights here.
"""

from typing import NamedTuple

import torch


class DecodeWindow(NamedTuple):
    """
    What one new image state of a layer attends to: all of the text, and one ring, which it is put into first.

    Args:
        text_keys, text_values (`torch.Tensor`): B x heads x text_length x head width.
        keys, values (`torch.Tensor`): (B * n) x heads x slots x head width; for tensors of positions the slots are
            rings x places.
        slot (`int` or `torch.Tensor`): where the new state is put: its slot, or its place in its ring.
        ring (`slice` or `torch.Tensor`): the slots that it sees, or its ring.
        is_hidden (`torch.Tensor`, *optional*): bool, those of these slots that it does not see.
    """

    text_keys: torch.Tensor
    text_values: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slot: int | torch.Tensor
    ring: slice | torch.Tensor
    is_hidden: torch.Tensor | None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """Query, key and value of the new state, (B * n) x heads x 1 x head width, to (B * n) x 1 x heads x width."""
        check_dtype(key, self.keys)
        if isinstance(self.slot, int):
            self.keys[:, :, self.slot] = key[:, :, 0]
            self.values[:, :, self.slot] = value[:, :, 0]
            keys, values = self.keys[:, :, self.ring], self.values[:, :, self.ring]
        else:
            self.keys[:, :, self.ring, self.slot] = key
            self.values[:, :, self.ring, self.slot] = value
            keys, values = (part.index_select(2, self.ring).squeeze(2) for part in (self.keys, self.values))
        return attend_to_text_and_image(
            query, self.text_keys, self.text_values, keys, values, scaling, is_hidden=self.is_hidden
        )


def attend_to_text_and_image(
    query: torch.Tensor,
    text_keys: torch.Tensor,
    text_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    is_hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Attention of one state an image, with one softmax over the prompt's text, read once for its n images, and its own
    image states.

    Args:
        query (`torch.Tensor`): (B * n) x heads x 1 x head width.
        text_keys, text_values (`torch.Tensor`): B x heads x text_length x head width.
        keys, values (`torch.Tensor`): (B * n) x heads x states x head width.
        scaling (`float`): what the scores are multiplied by.
        is_hidden (`torch.Tensor`, *optional*): bool, states that get no weight.

    Returns:
        `torch.Tensor`: (B * n) x 1 x heads x head width.
    """
    (num_rows, num_heads, _, width), (num_prompts, _, text_length, _) = query.shape, text_keys.shape
    query = query * scaling
    scores = query @ keys.transpose(2, 3)
    if is_hidden is not None:
        scores = scores.masked_fill(is_hidden, -torch.inf)
    # (B * n) x heads x 1 x head width -> B x heads x n x head width
    grouped = query.reshape(num_prompts, -1, num_heads, width).transpose(1, 2)
    text_scores = grouped @ text_keys.transpose(2, 3)
    # B x heads x n x text_length -> (B * n) x heads x 1 x text_length, and back
    text_scores = text_scores.transpose(1, 2).reshape(num_rows, num_heads, 1, text_length)
    weights = torch.cat([text_scores, scores], dim=3)
    weights = weights.softmax(dim=3, dtype=torch.promote_types(weights.dtype, torch.float32)).to(values.dtype)
    text_weights, weights = weights.tensor_split([text_length], dim=3)
    text_weights = text_weights.reshape(num_prompts, -1, num_heads, text_length).transpose(1, 2)
    from_text = (text_weights @ text_values).transpose(1, 2).reshape(num_rows, 1, num_heads, width)
    return from_text + (weights @ values).transpose(1, 2)


def check_dtype(key: torch.Tensor, keys: torch.Tensor) -> None:
    """Raises `ValueError` if a new key is not like the `keys` of a cache."""
    if key.dtype != keys.dtype or key.device != keys.device:
        raise ValueError(
            f"The cache holds {keys.dtype} on {keys.device}, the new states are {key.dtype} on {key.device}: a cache"
            " goes with one dtype and device."
        )
