"""Candidates beyond memory: how many pictures fit at once, which are drawn together, what is said when they do not.

Sizes come from the parts' configurations, free memory from the device. Drawing itself lives in `sampling.py`, the
order of drawing and decoding in `drawing.py`.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import is_psutil_available

from .cache_dalle import cache_bytes
from .configuration_dalle_prior import DallePriorConfig
from .token_shift import count_shift_bytes


SHARE_OF_FREE_MEMORY = 0.75  # the rest is for what the formulas leave out, and for other processes


class Chunk(NamedTuple):
    """Candidates drawn together: which prompts, which rows of all B * n images, and how many of each prompt."""

    prompts: slice
    images: slice
    num_images_per_prompt: int

    @property
    def num_images(self) -> int:
        """How many pictures are drawn at once."""
        return self.images.stop - self.images.start


def check_max_batch_size(max_batch_size: int | None) -> None:
    """Raises `ValueError` for what is no number of pictures to draw or decode at once."""
    if max_batch_size is not None and not (isinstance(max_batch_size, int) and max_batch_size > 0):
        raise ValueError(
            f"`max_batch_size` is {max_batch_size!r}; expected a whole number from 1, or None for what fits."
        )


def split_candidates(num_prompts: int, num_images_per_prompt: int, max_batch_size: int) -> list[Chunk]:
    """
    Splits B prompts times n images, a prompt's images side by side, into chunks of at most `max_batch_size` images.

    Prompts stay whole where that many images hold one: each is prefilled once. A larger one is split by itself, and
    prefilled once a chunk.

    Args:
        num_prompts, num_images_per_prompt (`int`): B and n.
        max_batch_size (`int`): at least 1.
    """
    num_each = num_images_per_prompt
    if num_each <= max_batch_size:
        starts = range(0, num_prompts, max_batch_size // num_each)
        ends = [min(start + starts.step, num_prompts) for start in starts]
        return [
            Chunk(slice(start, end), slice(start * num_each, end * num_each), num_each)
            for start, end in zip(starts, ends, strict=True)
        ]
    chunks = []
    for prompt in range(num_prompts):
        for start in range(0, num_each, max_batch_size):
            size, first = min(max_batch_size, num_each - start), prompt * num_each + start
            chunks.append(Chunk(slice(prompt, prompt + 1), slice(first, first + size), size))
    return chunks


def count_drawing_bytes(
    config: DallePriorConfig,
    dtype: torch.dtype,
    num_streams: int = 1,
    num_images_per_prompt: int = 1,
    num_prefix_tokens: int = 0,
    num_images_per_prefix: int = 1,
) -> int:
    """
    About how many bytes a picture takes while it is drawn: its cache, its logits, its share of the prefill.

    Args:
        config ([`DallePriorConfig`]): the prior's.
        dtype (`torch.dtype`): of the prior's weights.
        num_streams (`int`): 2 with guidance, else 1.
        num_images_per_prompt (`int`): how many pictures share a text.
        num_prefix_tokens (`int`): image tokens that are given.
        num_images_per_prefix (`int`): how many pictures share those.
    """
    num_states = config.text_length / num_images_per_prompt + num_prefix_tokens / num_images_per_prefix
    layer = num_states * (6 * config.hidden_size + 2 * config.intermediate_size) * dtype.itemsize
    text = cache_bytes(config, num_prompts=1, num_images=0, dtype=dtype)
    image = cache_bytes(config, num_prompts=0, num_images=1, dtype=dtype) + count_shift_bytes(config, dtype)
    logits = 8 * torch.float64.itemsize * config.image_vocab_size  # sorted, filtered, summed up
    return num_streams * math.ceil(image + logits + layer + text / num_images_per_prompt)


def count_decoding_bytes(dvae: nn.Module) -> int:
    """
    About how many bytes a picture takes while an autoencoder decodes it: a resblock's maps where they are widest, and
    the six maps of the output.

    Args:
        dvae (`nn.Module`): a [`DalleDVAE`] or another with `widest_map`.
    """
    return (6 * dvae.widest_map + 24 * dvae.config.sample_size**2) * dvae.dtype.itemsize


def count_fitting(module: nn.Module, device: torch.device, bytes_each: int, kept_bytes: int = 0) -> int:
    """
    How many pictures fit into memory, or 1 if none does.

    Args:
        module (`nn.Module`): what draws or decodes them; its weights need room where they are not on the device yet.
        device (`torch.device`): where it runs.
        bytes_each (`int`): of a picture.
        kept_bytes (`int`): what is not free, but will be.
    """
    missing = sum(weight.nbytes for weight in module.parameters() if weight.device.type != device.type)
    free = measure_free_memory(device) + kept_bytes - missing
    return max(1, int(min(SHARE_OF_FREE_MEMORY * free / bytes_each, sys.maxsize)))


def measure_free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated: on an accelerator with memory of its own there, else in the system's."""
    accelerator = torch.get_device_module(device)
    if hasattr(accelerator, "mem_get_info"):
        free, _ = accelerator.mem_get_info(device)
        # What torch holds back from the device, but has given to no tensor.
        return free + accelerator.memory_reserved(device) - accelerator.memory_allocated(device)
    if not is_psutil_available():  # it comes with accelerate, which the code on the Hub can do without
        return math.inf
    import psutil

    free = [psutil.virtual_memory().available]
    groups = Path("/proc/self/cgroup")
    if groups.is_file():
        free.append(measure_group_memory(groups.read_text(encoding="utf-8")))
    if hasattr(psutil, "RLIMIT_AS"):
        limit, _ = psutil.Process().rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def measure_group_memory(groups: str, root: Path = Path("/sys/fs/cgroup")) -> float:
    """
    Bytes that Linux's control groups, those of a container or a batch job, leave to this process.

    Args:
        groups (`str`): what /proc/self/cgroup says.
        root (`Path`): where the groups are mounted.

    Returns:
        `float`: `inf` where nothing is limited.
    """
    free = math.inf
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, usage, idle = root, "memory.max", "memory.current", "inactive_file"
        if controllers:  # version 1
            mount, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            idle = "total_inactive_file"
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):  # a limit holds for all groups below; a container sees the mount only
            if not folder.is_relative_to(mount) or not (folder / limit).is_file():
                continue
            allowed = (folder / limit).read_text().strip()
            if allowed != "max":
                kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                # Pages of files that the kernel would drop are counted as used.
                free = min(free, int(allowed) - int((folder / usage).read_text()) + int(kinds[idle]))
    return free


@contextmanager
def explain_out_of_memory(doing: str, batch_size: int) -> Iterator[None]:
    """
    Says which number to lower where memory runs out.

    Args:
        doing (`str`): as "drawing".
        batch_size (`int`): how many pictures at once.

    Raises:
        torch.OutOfMemoryError: in place of the allocator's own error, of whatever type, which is its cause.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        advice = f"set `max_batch_size` below {batch_size}, or lower `num_images_per_prompt`"
        if batch_size == 1:
            advice = "lower `num_images_per_prompt`, leave out guidance, or load with a smaller `dtype`"
        pictures = f"{batch_size} pictures at once" if batch_size > 1 else "one picture at a time"
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise torch.OutOfMemoryError(f"Memory ran out while {doing} {pictures}: {advice}. ({cause[0]})") from error
