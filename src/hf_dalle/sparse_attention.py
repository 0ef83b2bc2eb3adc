"""Row, column and conv attention in blocks: scores are computed only where the masks allow them, up to block edges.

Functions without weights, for calls that have no earlier states (training, prefill). What a state sees is defined in
`image_attention.py`; a step that reads a cache attends in `decode_attention.py`.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .image_attention import cache_constants, image_attention_offsets, image_attention_window, stream_attention_mask


# Where FlexAttention runs at all, and where its backward pass does.
_FLEX_DEVICES, _FLEX_TRAINING_DEVICES = ("cpu", "cuda", "hpu", "mps", "xpu"), ("cuda", "hpu", "xpu")
# What a call costs besides its scores, counted in scores of all heads: measured at 4 to 8 heads of 64 on two cores.
_CALL_OVERHEAD = 6000
# What a block costs besides its scores, counted in keys a query: where keys are views, and where they are copied.
_VIEW_OVERHEAD = 32
_COPY_OVERHEAD = 128


class ImageBlocks(NamedTuple):
    """
    Equal blocks of image states, each of which attends to a window of them: block i holds the `num_queries` states
    from `first_query + i * num_queries`, its window the `num_keys` states from `first_key + i * num_queries`.
    """

    first_query: int
    first_key: int
    num_queries: int
    num_keys: int
    num_blocks: int

    def select_queries(self, states: torch.Tensor) -> torch.Tensor:
        """A view of the blocks: heads x image states (x head width) -> blocks x heads x queries (x head width)."""
        return self._unfold(states, self.first_query, self.num_queries)

    def select_keys(self, states: torch.Tensor) -> torch.Tensor:
        """A view of the windows, which may overlap: heads x image states x width -> blocks x heads x keys x width."""
        return self._unfold(states, self.first_key, self.num_keys)

    def add_to_keys(self, states: torch.Tensor, windows: torch.Tensor):
        """Adds blocks x heads x keys x head width to the heads x image states x head width they are windows of."""
        # A slice of the windows that is no longer than their distance: there they do not overlap.
        for start in range(0, self.num_keys, self.num_queries):
            part = windows[:, :, start : start + self.num_queries]
            self._unfold(states, self.first_key + start, part.shape[2]).add_(part)

    def _unfold(self, states: torch.Tensor, first: int, length: int) -> torch.Tensor:
        # heads x states (x width) -> heads x blocks (x width) x length -> blocks x heads x length (x width)
        blocks = states[:, first:].unfold(1, length, self.num_queries)[:, : self.num_blocks].transpose(0, 1)
        return blocks.transpose(2, 3) if states.ndim == 3 else blocks


@cache_constants
def plan_image_blocks(
    attention_type: str, grid_size: int, kernel_size: int, num_states: int, num_copied_keys: int = 0
) -> tuple[ImageBlocks, ...]:
    """
    The blocks in which the first `num_states` image states attend to each other.

    Row and conv attention reach a fixed number of states back. Blocks of q states have windows of (m + 1) q states, m
    the fewest whose m q states hold that reach; the first m blocks, which have less before them, are one block, and
    so is what is left at the end. Column attention is causal in blocks of one column, with the states in column order.

    Args:
        attention_type, grid_size, kernel_size: as for [`~image_attention.image_attention_offsets`]; not `"full"`.
        num_states (`int`): how many image states there are, in [0, grid_size ** 2].
        num_copied_keys (`int`): keys besides the window that are copied for each block; 0: nothing is copied.

    Returns:
        `tuple` of [`ImageBlocks`]: each state is a query in exactly one block.
    """
    if attention_type == "column":
        num_rows, num_longer = num_states // grid_size, num_states % grid_size  # so many columns have one state more
        first = num_longer * (num_rows + 1)
        plan = [
            ImageBlocks(0, 0, num_rows + 1, num_rows + 1, num_longer),
            ImageBlocks(first, first, num_rows, num_rows, grid_size - num_longer),
        ]
        return tuple(blocks for blocks in plan if blocks.num_blocks and blocks.num_queries)
    reach = image_attention_offsets(attention_type, grid_size, kernel_size)[-1]

    def count_keys(size: int) -> float:
        """What one query costs with blocks of this size, in keys."""
        keys = num_copied_keys + (1 + math.ceil(reach / size)) * size
        return keys * (1 + _COPY_OVERHEAD / size) if num_copied_keys else keys + _VIEW_OVERHEAD * keys / size

    size = min(range(16, max(reach, 16) + 16, 16), key=count_keys)
    num_before = math.ceil(reach / size) * size
    num_first = min(num_states, num_before)
    num_blocks, num_last = (num_states - num_first) // size, (num_states - num_first) % size
    last = num_states - num_last
    plan = [
        ImageBlocks(0, 0, num_first, num_first, 1),
        ImageBlocks(num_first, 0, size, num_before + size, num_blocks),
        ImageBlocks(last, last - num_before, num_last, num_before + num_last, 1),
    ]
    return tuple(blocks for blocks in plan if blocks.num_blocks and blocks.num_queries)


def is_faster_in_blocks(
    attention_type: str, text_length: int, grid_size: int, kernel_size: int, num_states: int
) -> bool:
    """
    Whether [`attend_in_blocks`] is faster than dense attention with a mask: a count of scores, and of calls.

    Args:
        num_states (`int`): how many states of the stream there are, text and image.
        attention_type, text_length, grid_size, kernel_size: as for [`~image_attention.stream_attention_mask`].
    """
    num_image_states = num_states - text_length
    if attention_type == "full" or num_image_states <= 0:
        return False
    plan = plan_image_blocks(attention_type, grid_size, kernel_size, num_image_states)
    num_scores = text_length * num_states + sum(x.num_blocks * x.num_queries * x.num_keys for x in plan)
    return num_scores + _CALL_OVERHEAD * (1 + len(plan)) < num_states**2


def choose_start_mask(
    attn_implementation: str,
    attention_type: str,
    text_length: int,
    grid_size: int,
    kernel_size: int,
    hidden_states: torch.Tensor,
) -> torch.Tensor | BlockMask | None:
    """
    The mask of a call that has no earlier states.

    Args:
        attn_implementation (`str`): as transformers names them.
        attention_type, text_length, grid_size, kernel_size: as for [`~image_attention.stream_attention_mask`].
        hidden_states (`torch.Tensor`): B x states x width, from the first state of the stream.

    Returns:
        With `"sdpa"` `None` where [`attend_in_blocks`] is to be called, with `"flex_attention"` a `BlockMask`, else
        bool, 1 x 1 x states x states.

    Raises:
        `ValueError`: for `"flex_attention"` on a device that it does not know, or gradients where it has no backward
            pass, as on a CPU.
    """
    num_states, device = hidden_states.shape[1], hidden_states.device
    sizes = (attention_type, text_length, grid_size, kernel_size)
    if attn_implementation == "flex_attention":
        check_flex_device(hidden_states)
        return flex_attention_mask(*sizes, num_states, device)
    if attn_implementation == "sdpa" and (attention_type == "full" or is_faster_in_blocks(*sizes, num_states)):
        return None
    return stream_attention_mask(*sizes, device)[None, None, :num_states, :num_states]


def check_flex_device(*states: torch.Tensor) -> None:
    """Raises `ValueError` where `"flex_attention"` does not run, or does not train and `states` want gradients."""
    device = states[0].device.type
    known = _FLEX_TRAINING_DEVICES if any(part.requires_grad for part in states) else _FLEX_DEVICES
    if device not in known:
        purpose = "has no backward pass" if device in _FLEX_DEVICES else "does not run"
        raise ValueError(
            f"FlexAttention {purpose} on a device of type {device!r}, only on {', '.join(known)}: use "
            "attn_implementation='sdpa', which computes row, column and conv attention in blocks on any device"
            + (", or call the model under torch.no_grad()." if device in _FLEX_DEVICES else ".")
        )


def attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_type: str,
    text_length: int,
    grid_size: int,
    kernel_size: int = 11,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    What dense attention with the mask of [`~image_attention.stream_attention_mask`] gives, without the scores that the
    mask leaves out. The stream may end anywhere.

    On a CPU without dropout, attention to the text and attention among image states are two softmaxes, joined by their
    normalizers; elsewhere each block's keys are the text's, copied, and its window's.

    Args:
        query, key, value (`torch.Tensor`): B x heads x states x head width, from the first state of the stream.
        attention_type, text_length, grid_size, kernel_size: as for [`~image_attention.stream_attention_mask`].
        scale (`float`, *optional*): factor of the scores; `None` is `1 / sqrt(head width)`.
        dropout (`float`): the probability with which a weight is dropped.

    Returns:
        `torch.Tensor`: B x heads x states x head width, in memory B x states x heads x head width.
    """
    num_image_states = query.shape[2] - text_length
    if attention_type == "full" or num_image_states <= 0:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout, scale=scale)
    has_kernel = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    use_copies = query.device.type != "cpu" or dropout > 0 or not has_kernel
    sizes = (attention_type, grid_size, kernel_size)
    plan = plan_image_blocks(*sizes, num_image_states, text_length if use_copies else 0)
    masks = [_additive_mask(*sizes, blocks, query.dtype, query.device) for blocks in plan]
    orders = (None, None)
    if attention_type == "column":
        orders = _column_orders(text_length, grid_size, num_image_states, query.device)
    if use_copies:
        return _attend_to_copies(query, key, value, text_length, plan, masks, orders, scale, dropout)
    return _AttendInTwoParts.apply(query, key, value, text_length, plan, masks, orders, scale)


@cache_constants
def _column_orders(
    text_length: int, grid_size: int, num_image_states: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream's positions with the image states column by column, and the order that undoes it."""
    with torch.inference_mode(False):
        columns = torch.arange(num_image_states) % grid_size
        order = torch.cat([torch.arange(text_length), text_length + columns.argsort(stable=True)])
        return order.to(device), order.argsort().to(device)


def _reorder(states: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """B x heads x states x head width in another order of states; in memory B x states x heads x head width."""
    return states if order is None else states.transpose(1, 2).index_select(1, order).transpose(1, 2)


@cache_constants
def _additive_mask(
    attention_type: str,
    grid_size: int,
    kernel_size: int,
    blocks: ImageBlocks,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor | None:
    """What is added to the scores of a block, queries x keys; `None` where that is the causal mask."""
    num_queries, num_keys = blocks.num_queries, blocks.num_keys
    offsets = image_attention_offsets(attention_type, grid_size, kernel_size)
    if attention_type == "column" or (num_queries == num_keys and offsets[:num_keys] == tuple(range(num_keys))):
        return None
    with torch.inference_mode(False):
        mask = image_attention_window(attention_type, grid_size, kernel_size, num_queries, num_keys)
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf).to(device)


# ------------------------------------------------------------------------------------------- two parts, no copies


class _AttendInTwoParts(torch.autograd.Function):
    """
    All states attend to the text, image states to their windows; both parts are joined by their normalizers.

    The kernel is the one that `F.scaled_dot_product_attention` calls on a CPU, called by its own name since it returns
    the normalizers then. Its backward pass recomputes weights as exp(score - normalizer): given the joint output and
    the joint normalizers, each part's gradients are those of the joint softmax.
    """

    @staticmethod
    def forward(ctx, query, key, value, text_length, plan, masks, orders, scale):
        query, key, value = (_reorder(states, orders[0]) for states in (query, key, value))
        # T causal columns of S x S: text attends causally to text, image states to all of it
        text_key, text_value = key[:, :, :text_length], value[:, :, :text_length]
        output, normalizer = _attend(query, text_key, text_value, None, scale)
        states = (part[:, :, text_length:] for part in (query, key, value, output, normalizer))
        for image_query, image_key, image_value, image_output, image_normalizer in zip(*states, strict=True):
            for blocks, mask in zip(plan, masks, strict=True):
                keys, values = blocks.select_keys(image_key), blocks.select_keys(image_value)
                local, local_normalizer = _attend(blocks.select_queries(image_query), keys, values, mask, scale)
                joint, joint_normalizer = (blocks.select_queries(x) for x in (image_output, image_normalizer))
                local_share = torch.sigmoid(local_normalizer - joint_normalizer)
                joint.lerp_(local, local_share[..., None].to(joint.dtype))
                joint_normalizer.copy_(torch.logaddexp(joint_normalizer, local_normalizer))
        ctx.save_for_backward(query, key, value, output, normalizer)
        ctx.text_length, ctx.plan, ctx.masks, ctx.orders, ctx.scale = text_length, plan, masks, orders, scale
        return _reorder(output, orders[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad):
        query, key, value, output, normalizer = ctx.saved_tensors
        output_grad = _reorder(output_grad, ctx.orders[0])
        text, image = slice(ctx.text_length), slice(ctx.text_length, None)
        query_grad, text_key_grad, text_value_grad = _attend_backward(
            output_grad, query, key[:, :, text], value[:, :, text], output, normalizer, None, ctx.scale
        )
        key_grad, value_grad = (_pad_states(grad, query.shape[2]) for grad in (text_key_grad, text_value_grad))
        states = (
            part[:, :, image]
            for part in (output_grad, query, key, value, output, normalizer, query_grad, key_grad, value_grad)
        )
        for *inputs, image_query_grad, image_key_grad, image_value_grad in zip(*states, strict=True):
            for blocks, mask in zip(ctx.plan, ctx.masks, strict=True):
                selects = (blocks.select_queries,) * 2 + (blocks.select_keys,) * 2 + (blocks.select_queries,) * 2
                selected = (select(states) for select, states in zip(selects, inputs, strict=True))
                grads = _attend_backward(*selected, mask, ctx.scale)
                blocks.select_queries(image_query_grad).add_(grads[0])
                blocks.add_to_keys(image_key_grad, grads[1])
                blocks.add_to_keys(image_value_grad, grads[2])
        grads = (_reorder(grad, ctx.orders[1]) for grad in (query_grad, key_grad, value_grad))
        return *grads, None, None, None, None, None


def _attend(query, key, value, mask, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the logarithm of each softmax's denominator, B x heads x queries; without a mask causal."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, is_causal=mask is None, attn_mask=mask, scale=scale)


def _attend_backward(grad, query, key, value, output, normalizer, mask, scale) -> tuple[torch.Tensor, ...]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(grad, query, key, value, output, normalizer, 0.0, mask is None, attn_mask=mask, scale=scale)


def _pad_states(states: torch.Tensor, num_states: int) -> torch.Tensor:
    """Zeros for further states; in memory B x states x heads x head width, as projections want their gradients."""
    return F.pad(states.transpose(1, 2), (0, 0, 0, 0, 0, num_states - states.shape[2])).transpose(1, 2)


# --------------------------------------------------------------------------------------------- any device, dropout


def _attend_to_copies(query, key, value, text_length, plan, masks, orders, scale, dropout) -> torch.Tensor:
    """Each block is an entry of a batch, whose keys are the text's and its window's."""
    query, key, value = (_reorder(states, orders[0]) for states in (query, key, value))
    text, image = slice(text_length), slice(text_length, None)
    text_key, text_value = key[:, :, text], value[:, :, text]
    options = {"dropout_p": dropout, "scale": scale}
    outputs = [F.scaled_dot_product_attention(query[:, :, text], text_key, text_value, is_causal=True, **options)]
    for blocks, mask in zip(plan, masks, strict=True):
        # B x heads x states x width -> (B blocks) x heads x queries or keys x width
        queries = torch.cat([blocks.select_queries(states) for states in query[:, :, image]])
        keys, values = (
            torch.cat(
                [
                    torch.cat([shared.expand(blocks.num_blocks, -1, -1, -1), blocks.select_keys(states)], dim=2)
                    for shared, states in zip(text_part, part[:, :, image], strict=True)
                ]
            )
            for text_part, part in ((text_key, key), (text_value, value))
        )
        if mask is None:
            mask = queries.new_full((blocks.num_queries, blocks.num_keys), -torch.inf).triu(1)
        mask = F.pad(mask, (text_length, 0))
        output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, **options)
        # (B blocks) x heads x queries x width -> B x heads x states x width
        outputs.append(output.unflatten(0, (-1, blocks.num_blocks)).transpose(1, 2).flatten(2, 3))
    output = torch.cat([output.transpose(1, 2) for output in outputs], dim=1).transpose(1, 2)
    return _reorder(output, orders[1])


# -------------------------------------------------------------------------------------------------- FlexAttention


@lru_cache(maxsize=32)
def flex_attention_mask(
    attention_type: str,
    text_length: int,
    grid_size: int,
    kernel_size: int,
    num_states: int,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """
    The mask of [`~image_attention.stream_attention_mask`] for `torch.nn.attention.flex_attention`.

    Args:
        num_states (`int`): how many states of the stream there are, text and image.
        attention_type, text_length, grid_size, kernel_size, device: as there.

    Returns:
        `BlockMask`: for any batch and any heads, num_states x num_states. It is shared by all callers.
    """
    with torch.inference_mode(False):
        may_attend = torch.zeros(grid_size**2, dtype=torch.bool)
        may_attend[list(image_attention_offsets(attention_type, grid_size, kernel_size))] = True
        may_attend = may_attend.to(device)

        def sees(batch, head, query, key):
            # Outside [0, N) offsets are not among image states, or are of states that pad a block.
            is_allowed = may_attend[(query - key).clamp(0, grid_size**2 - 1)]
            return (query >= key) & ((key < text_length) | is_allowed)

        return create_block_mask(sees, None, None, num_states, num_states, device=str(device))
