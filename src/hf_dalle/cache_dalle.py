"""`DalleCache`: keys and values of the states so far; each attention type keeps those that a later state still sees.

The text's are held once a prompt and shared by that prompt's images; an image's lie in rings whose sizes follow from
`image_attention.py`. Here too: how many bytes that is. How a state attends to it lives in `decode_attention.py`.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .bordered_attention import BORDERED_TYPES, BorderedLayout, bordered_layout
from .decode_attention import DecodeWindow, check_dtype
from .image_attention import image_attention_offsets


class RingLayout(NamedTuple):
    """
    Where a layer keeps its image states: state i in ring `i % num_rings`, at place `i // num_rings % ring_length`.

    A new state sees states of its own ring only, so that what it reads is one piece of memory: for column attention
    there is a ring a column, for all others one. In a ring nothing is masked, except for conv attention.

    Args:
        num_rings, ring_length (`int`): their product is the number of states that are kept.
        steps (`tuple[int, ...]`): how many places back a state looks in its ring; 0 is the state itself.
    """

    num_rings: int
    ring_length: int
    steps: tuple[int, ...]

    @property
    def num_slots(self) -> int:
        """How many image states are kept."""
        return self.num_rings * self.ring_length

    @property
    def is_masked(self) -> bool:
        """Whether a ring holds states that the newest one does not see."""
        return len(self.steps) < self.ring_length

    def locate(self, state: int) -> tuple[int, int, int]:
        """The ring of an image state, its place there, and how many places of the ring are filled with it."""
        step, ring = divmod(state, self.num_rings)
        return ring, step % self.ring_length, min(step + 1, self.ring_length)

    def slots(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """The slots of the image states from `start` to `stop`, ring after ring in one row."""
        states = torch.arange(start, stop, device=device)
        steps = torch.div(states, self.num_rings, rounding_mode="floor")
        return states % self.num_rings * self.ring_length + steps % self.ring_length

    def hidden_places(self, state: int, device: torch.device) -> torch.Tensor:
        """Bool, ring_length: the places of its ring that image state `state` does not see."""
        return _hidden_places(self, device)[self.locate(state)[1]]


@cache
def ring_layout(attention_type: str, grid_size: int, kernel_size: int = 11) -> RingLayout | BorderedLayout:
    """The layout of an attention type; arguments and errors as for [`image_attention_offsets`]."""
    if attention_type in BORDERED_TYPES:
        return bordered_layout(attention_type, grid_size, kernel_size)
    offsets = image_attention_offsets(attention_type, grid_size, kernel_size)
    num_rings = math.gcd(*offsets) or 1
    return RingLayout(num_rings, offsets[-1] // num_rings + 1, tuple(offset // num_rings for offset in offsets))


def cache_bytes(config, num_prompts: int = 1, num_images: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """
    Bytes that a [`DalleCache`] holds, from its first states on.

    Args:
        config ([`DallePriorConfig`]): the prior's.
        num_prompts, num_images (`int`): texts, and images of all of them together; guidance doubles both.
        dtype (`torch.dtype`): of the keys and values.
    """
    slots = [layout.num_slots for layout in _layouts(config)]
    return _count_bytes(config, slots, num_prompts, num_images, dtype)


def cache_bytes_read(
    config, image_state: int, num_prompts: int = 1, num_images: int = 1, dtype: torch.dtype = torch.float32
) -> int:
    """
    Bytes of a [`DalleCache`] that image state `image_state`, from 0, attends to; other arguments as [`cache_bytes`].
    """
    slots = [layout.locate(image_state)[2] for layout in _layouts(config)]
    return _count_bytes(config, slots, num_prompts, num_images, dtype)


def _layouts(config) -> list[RingLayout | BorderedLayout]:
    sizes = (config.image_grid_size, config.conv_kernel_size)
    return [ring_layout(attention_type, *sizes) for attention_type in config.attention_types]


def _count_bytes(config, slots: Sequence[int], num_prompts: int, num_images: int, dtype: torch.dtype) -> int:
    num_states = len(slots) * config.num_shared_states * num_prompts + sum(slots) * num_images
    return 2 * num_states * config.num_attention_heads * config.head_dim * dtype.itemsize


class DalleCache(Cache):
    """
    A transformers `Cache` for a [`DallePriorForCausalLM`]; `generate()` and the drawing loop use it by default.

    Its buffers are made by the first states and kept by [`~DalleCache.reset`]; empty, it takes any batch. It is for
    inference: no gradient reaches earlier states through it.

    Args:
        config ([`DallePriorConfig`]): the model's.
        num_images_per_prompt (`int`, *optional*, defaults to 1):
            n: the text is fed once a prompt, B rows, and so is an image prefix in the same call; what comes after that
            is B * n rows, the images of a prompt side by side.
    """

    def __init__(self, config, num_images_per_prompt: int = 1):
        self.sizes = _describe_sizes(config)
        text_length = config.num_shared_states
        super().__init__(layers=[DalleCacheLayer(layout, text_length) for layout in _layouts(config)])
        self.num_images_per_prompt = num_images_per_prompt

    def is_for(self, config) -> bool:
        """Whether it fits a prior of this configuration."""
        return self.sizes == _describe_sizes(config)

    @property
    def num_images_per_prompt(self) -> int:
        """n; it may be set while the cache is empty."""
        return self.layers[0].num_images_per_prompt

    @num_images_per_prompt.setter
    def num_images_per_prompt(self, number: int):
        if self.get_seq_length() and number != self.num_images_per_prompt:
            raise ValueError("`num_images_per_prompt` of a cache that holds states cannot change: `reset()` it first.")
        for layer in self.layers:
            layer.num_images_per_prompt = number

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return sum(layer.nbytes for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """
        Removes the newest states.

        Args:
            tokens_to_remove (`int`): how many of them, as a negative number, as transformers has it.

        Raises:
            `ValueError`: for a positive number, or where earlier states that would be seen again are kept no more.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes the number of states to remove as a negative one, not {tokens_to_remove}.")
        if not all(layer.can_crop(tokens_to_remove) for layer in self.layers):
            raise ValueError(
                f"A `DalleCache` of {self.get_seq_length()} states keeps only what later states see and cannot go back"
                f" by {-tokens_to_remove}: use a `DynamicCache(config=model.config)`."
            )
        super().crop(tokens_to_remove)


def make_cache(config) -> Cache:
    """The cache of a call that is given none: a [`DalleCache`], except where gradients or a graph go through it."""
    is_traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return DynamicCache(config=config) if is_traced else DalleCache(config)


def open_windows(past_key_values: Cache | None, num_states: int, is_static: bool = False) -> list[DecodeWindow] | None:
    """
    Counts one new image state on in a [`DalleCache`].

    Args:
        past_key_values (`Cache`, *optional*): of any kind.
        num_states (`int`): how many states are to follow.
        is_static (`bool`): positions in tensors and one shape for all states, as a compiled graph needs them.

    Returns:
        `list[DecodeWindow]`: for each layer what the state writes to and attends to; `None` for another cache, for
        several states or text, and where gradients are computed: there is `update` for.
    """
    is_ours = isinstance(past_key_values, DalleCache) and not torch.is_grad_enabled()
    if not is_ours or num_states != 1 or past_key_values.get_seq_length() < past_key_values.sizes["text_length"]:
        return None
    return [layer.open_window(is_static) for layer in past_key_values.layers]


def check_cache(past_key_values: Cache, config, num_rows: int) -> None:
    """
    Raises `ValueError` if a cache is another model's, or of another batch.

    Args:
        past_key_values (`Cache`): of any kind.
        config ([`DallePriorConfig`]): the model's.
        num_rows (`int`): of the states that are to follow.
    """
    if isinstance(past_key_values, DalleCache):
        sizes = _describe_sizes(config)
        if past_key_values.sizes != sizes:
            wrong = ", ".join(
                f"{name} {past_key_values.sizes[name]}, not {size}"
                for name, size in sizes.items()
                if past_key_values.sizes[name] != size
            )
            raise ValueError(f"The cache is of another model ({wrong}): use `DalleCache(model.config)`.")
    layer = past_key_values.layers[0] if len(past_key_values.layers) else None
    keys = getattr(layer, "keys", None)
    if keys is None or keys.ndim != 4 or layer.get_seq_length() == 0:
        return
    own_rows = layer.num_rows if isinstance(layer, DalleCacheLayer) else len(keys)
    expected = (num_rows, config.num_attention_heads, config.head_dim)
    if (own_rows, keys.shape[1], keys.shape[3]) != expected:
        raise ValueError(
            f"The cache holds {own_rows} rows, {keys.shape[1]} heads and {keys.shape[3]} channels a head, but the"
            f" states that are to follow have {expected[0]}, {expected[1]} and {expected[2]}: a cache goes with one"
            " model and one batch."
        )


def _describe_sizes(config) -> dict:
    names = ("image_grid_size", "conv_kernel_size", "hidden_size", "num_attention_heads", "head_dim")
    sizes = {"text_length": config.num_shared_states, **{name: getattr(config, name) for name in names}}
    return {**sizes, "attention_types": list(config.attention_types)}


class DalleCacheLayer(CacheLayerMixin):
    """
    One layer of a [`DalleCache`]: `text_keys` and `text_values`, B x heads x text_length x head width, and `keys` and
    `values`, (B * n) x heads x slots x head width.
    """

    is_sliding = False
    supports_early_init = False  # the number of rows is known from the first states on
    is_initialized: bool
    keys: torch.Tensor
    values: torch.Tensor
    text_keys: torch.Tensor
    text_values: torch.Tensor

    def __init__(self, layout: RingLayout | BorderedLayout, text_length: int):
        super().__init__()
        self.layout, self.text_length = layout, text_length
        self.num_images_per_prompt, self.length = 1, 0
        self.text_keys = self.text_values = None

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return sum(buffer.nbytes for buffer in self._buffers()) if self.is_initialized else 0

    def is_on(self, device: torch.device) -> bool:
        """Whether its buffers are on that device."""
        return self.is_initialized and self.keys.device.type == device.type

    @property
    def batch_size(self) -> int:
        """B * n, the number of images."""
        return len(self.keys) if self.is_initialized else -1

    @property
    def num_rows(self) -> int:
        """How many rows the next states have."""
        return len(self.text_keys) if self.length < self.text_length else len(self.keys)

    @property
    def num_image_states(self) -> int:
        """How many image states there have been."""
        return max(self.length - self.text_length, 0)

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.text_keys, self.text_values, self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the buffers for B rows of states, unless those that are there fit."""
        num_prompts, num_heads, _, width = key_states.shape
        text_shape = (num_prompts, num_heads, self.text_length, width)
        shape = (num_prompts * self.num_images_per_prompt, num_heads, self.layout.num_slots, width)
        wanted = (text_shape, shape, key_states.dtype, key_states.device)
        has = self.is_initialized and (self.text_keys.shape, self.keys.shape, self.keys.dtype, self.keys.device)
        if has == wanted:
            return
        # Freed before the new ones are made, for which there may be no memory.
        self.text_keys = self.text_values = self.keys = self.values = None
        self.is_initialized = False
        # Buffers first made by a caller in inference mode must still serve one that is not.
        with torch.inference_mode(False):
            self.text_keys, self.text_values = (key_states.new_zeros(text_shape) for _ in range(2))
            self.keys, self.values = (key_states.new_zeros(shape) for _ in range(2))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Keeps new states.

        Args:
            key_states, value_states (`torch.Tensor`): rows x heads x new states x head width, of any positions.

        Returns:
            All keys and values so far, in the order of the stream, for a mask of new states x all states; 0 in place
            of those that no later state sees.
        """
        joined = key_states, value_states
        if self.length == 0:
            self.lazy_initialization(key_states, value_states)
        else:
            check_dtype(key_states, self.keys)
            joined = tuple(torch.cat([past, new], dim=2) for past, new in zip(self._gather(), joined, strict=True))
        num_text = min(max(self.text_length - self.length, 0), key_states.shape[2])
        self._store(key_states.detach(), value_states.detach(), num_text)
        self.length += key_states.shape[2]
        return joined

    def _store(self, key_states: torch.Tensor, value_states: torch.Tensor, num_text: int) -> None:
        """Puts the first `num_text` new states to the text, of the others those into the rings that stay there."""
        if num_text:
            text = slice(self.length, self.length + num_text)
            self.text_keys[:, :, text] = key_states[:, :, :num_text]
            self.text_values[:, :, text] = value_states[:, :, :num_text]
        start = self.num_image_states
        stop = start + key_states.shape[2] - num_text
        first = max(start, stop - self.layout.num_slots)
        slots = self.layout.slots(first, stop, self.keys.device)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            states = states[:, :, num_text + first - start :]
            if len(states) < len(buffer):  # a prefix of the prompt: B rows of states to B * n images
                states = states.repeat_interleave(self.num_images_per_prompt, dim=0)
            buffer[:, :, slots] = states

    def _gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all states so far, rows x heads x states x head width."""
        num_text, stop = min(self.length, self.text_length), self.num_image_states
        texts = [part[:, :, :num_text] for part in (self.text_keys, self.text_values)]
        if self.length < self.text_length:
            return tuple(texts)
        first = max(stop - self.layout.num_slots, 0)
        slots = self.layout.slots(first, stop, self.keys.device)
        gathered = []
        for text, image in zip(texts, (self.keys, self.values), strict=True):
            states = image.new_zeros(*image.shape[:2], num_text + stop, image.shape[3])
            states[:, :, :num_text] = text.repeat_interleave(len(image) // len(text), dim=0)
            states[:, :, num_text + first :] = image[:, :, slots]
            gathered.append(states)
        return tuple(gathered)

    def open_window(self, is_static: bool = False) -> DecodeWindow:
        """As [`open_windows`]."""
        ring, place, num_filled = self.layout.locate(self.num_image_states)
        start, device = ring * self.layout.ring_length, self.keys.device
        is_hidden = self.layout.hidden_places(self.num_image_states, device) if self.layout.is_masked else None
        self.length += 1
        if not is_static:
            is_hidden = is_hidden if is_hidden is None else is_hidden[:num_filled]
            return DecodeWindow(*self._buffers(), start + place, slice(start, start + num_filled), is_hidden)
        numbers = _count_up(self.layout.num_slots, device)
        is_empty = numbers[: self.layout.ring_length] >= num_filled
        is_hidden = is_empty if is_hidden is None else is_hidden | is_empty
        text_keys, text_values, keys, values = self._buffers()
        keys, values = (part.unflatten(2, self.layout[:2]) for part in (keys, values))
        buffers = text_keys, text_values, keys, values
        return DecodeWindow(*buffers, numbers[place : place + 1], numbers[ring : ring + 1], is_hidden)

    def get_seq_length(self) -> int:
        """How many states there have been, text included."""
        return self.length

    def get_max_length(self) -> int:
        """No limit here: the model refuses states past the end of its stream."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys [`~DalleCacheLayer.update`] gives back for so many new states, and from which state on."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Empties the layer; its buffers stay."""
        self.length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Puts row `beam_idx[r]` to row r."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the images `indices`, in that order; each has its own text from then on."""
        if not self.is_initialized:
            return
        indices = torch.arange(len(self.keys))[indices.cpu()].to(self.keys.device)  # a bool mask, or indices
        images_of_a_text = len(self.keys) // len(self.text_keys)
        texts = torch.div(indices, images_of_a_text, rounding_mode="floor")
        self.text_keys, self.text_values = (part.index_select(0, texts) for part in (self.text_keys, self.text_values))
        self.keys, self.values = (part.index_select(0, indices) for part in (self.keys, self.values))
        self.num_images_per_prompt = 1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes `repeats` images of each, side by side, that share its text."""
        self.num_images_per_prompt *= repeats
        if self.is_initialized:
            self.keys, self.values = (part.repeat_interleave(repeats, dim=0) for part in (self.keys, self.values))

    def can_crop(self, tokens_to_remove: int) -> bool:
        """Whether all that would be seen again without the newest states, a negative number, is still kept."""
        length = self.length + tokens_to_remove
        num_left = max(length - self.text_length, 0)
        first_kept = self.num_image_states - self.layout.num_slots
        first_seen = num_left - self.layout.num_rings * (self.layout.ring_length - 1)
        return length >= 0 and (num_left == 0 or first_kept <= max(first_seen, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest states, a negative number, if [`~DalleCacheLayer.can_crop`]."""
        self.length += tokens_to_remove


@cache
def _hidden_places(layout: RingLayout, device: torch.device) -> torch.Tensor:
    """Bool, row p: the places of a ring that the state at place p does not see."""
    with torch.inference_mode(False):
        places = torch.arange(layout.ring_length)
        steps = (places[:, None] - places) % layout.ring_length
        return (~torch.isin(steps, torch.tensor(layout.steps))).to(device)


@cache
def _count_up(number: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(number, device=device)
