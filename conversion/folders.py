"""Output folders, written a tensor at a time: sharded safetensors, configurations, the index of a pipeline.

What goes into them is `families/`' choice; the card is `cards.py`'s.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import torch
from diffusers import ConfigMixin
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_dalle import DalleImageProcessor, DALLEPipeline

from .key_map import KeyMap, list_parameters


MAX_SHARD_BYTES = 5 * 10**9
MAX_LOST_SHARE = 1e-3  # of a weight's values, those that a narrower type may round to 0
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass
class Part:
    """
    One component of a folder.

    Args:
        content: a model on the meta device, or anything with `save_pretrained` (a tokenizer, an image processor).
        keys ([`KeyMap`], *optional*): where a model's weights come from.
    """

    content: Any
    keys: KeyMap | None = None


@dataclass
class Facts:
    """
    What a card says of a source beyond what is in it.

    Args:
        title (`str`): as "OpenAI's discrete VAE".
        origin (`str`): who made it and where, in a sentence or two of Markdown.
        license (`str`): identifier for the Hub, "other" where none fits.
        license_words (`str`): what the licence asks of whoever uses the folder.
        language (`str`, *optional*): of the captions.
        notes (`list[str]`): what differs from the original.
        license_name, license_link (`str`, *optional*): for the Hub, with "other".
    """

    title: str
    origin: str
    license: str
    license_words: str
    language: str | None = None
    notes: list[str] = field(default_factory=list)
    license_name: str | None = None
    license_link: str | None = None

    def with_note(self, note: str) -> "Facts":
        """The same facts with one more note."""
        return replace(self, notes=[*self.notes, note])


@dataclass
class Conversion:
    """
    A source that was read, before anything is written.

    Args:
        parts (`dict[str, Part]`): a pipeline's by name; or one model under `""`, which becomes the folder itself.
        facts ([`Facts`]): for the card.
        files (`list[Path]`): what was read.
        inferred (`list[str]`): sizes and choices that no file says, and how they were found.
        dtype (`torch.dtype`, *optional*): what weights are written in; by default the widest that a part is stored in.
    """

    parts: dict[str, Part]
    facts: Facts
    files: list[Path]
    inferred: list[str] = field(default_factory=list)
    dtype: torch.dtype | None = None

    def find_dtype(self, name: str) -> torch.dtype:
        """What a part's weights are written in."""
        return self.dtype or find_dtype(self.parts[name])

    def read_stored(self, part: str) -> Iterator[tuple[str, torch.Tensor]]:
        """A part's source weights in float32, by their own names, not rounded to what our files hold."""
        keys = self.parts[part].keys
        used = {name for rule in keys.rules for name in rule.sources}
        for name, tensor in keys.source.items():
            if name in used:
                yield name, tensor.read().float()

    def read_rounded(self, part: str, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        """A part's source weights in float32 as our files hold them, by their own names without `prefix`."""
        keys = self.parts[part].keys
        used = {name for rule in keys.rules for name in rule.sources}
        for name, tensor in keys.source.items():
            if name.startswith(prefix) and name in used:
                yield name.removeprefix(prefix), tensor.read().to(self.find_dtype(part)).float()

    def check(self) -> None:
        """Raises `ValueError` where a source's keys or shapes do not fit."""
        for part in self.parts.values():
            if part.keys is not None:
                part.keys.check()


def build_on_meta(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """
    A model without memory, for its configuration and the shapes of its weights.

    Args:
        build (`Callable`): its class; the other arguments are its own.

    Raises:
        ValueError: for sizes that give no model.
    """
    try:
        with torch.device("meta"):
            return build(*args, **kwargs)
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"The sizes found give no {build.__name__} ({error}).") from error


def make_part(model: nn.Module, tensors: Mapping[str, Any]) -> Part:
    """
    A [`Part`] whose [`KeyMap`] has no rules yet.

    Args:
        model (`nn.Module`): on the meta device.
        tensors (`Mapping[str, StoredTensor]`): the source's.
    """
    return Part(model, KeyMap(tensors, list_parameters(model)))


def join_parts(prior: Part, dvae: Part, tokenizer: PreTrainedTokenizerBase) -> dict[str, Part]:
    """The parts of a pipeline by name; its image processor has the size of the dVAE's pictures."""
    image_processor = DalleImageProcessor(size=dvae.content.config.sample_size)
    return {"prior": prior, "dvae": dvae, "tokenizer": Part(tokenizer), "image_processor": Part(image_processor)}


def fill_module(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Fills all of an original's module for `--verify`; a weight that is missing or over raises `RuntimeError`."""
    module.load_state_dict(dict(weights), strict=True)
    module.eval()


def write_folder(folder: Path, conversion: Conversion, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """
    Writes what `from_pretrained` loads. Peak memory is that of the largest rule's tensors.

    Args:
        folder (`Path`): an empty folder.
        conversion ([`Conversion`]): checked.
        max_shard_bytes (`int`): of one file of weights.

    Raises:
        OSError: if the disk has no room.
    """
    dtypes = {name: conversion.find_dtype(name) for name, part in conversion.parts.items() if part.keys is not None}
    num_bytes = sum(
        dtypes[name].itemsize * sum(shape.numel() for shape in conversion.parts[name].keys.target.values())
        for name in dtypes
    )
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free; {num_bytes / 1e9:.1f} GB of weights are to be written.")
    for name, part in conversion.parts.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        if part.keys is None:
            part.content.save_pretrained(place)
            continue
        _save_config(part.content, place, dtypes[name])
        is_diffusers = isinstance(part.content, ConfigMixin)
        stem = "diffusion_pytorch_model" if is_diffusers else "model"
        write_weights(place, stem, part.keys, dtypes[name], max_shard_bytes)
    if "" not in conversion.parts:
        pipeline = DALLEPipeline(**{name: part.content for name, part in conversion.parts.items()})
        pipeline.save_config(folder)
        pipeline.save_processor_config(folder)


def find_dtype(part: Part) -> torch.dtype:
    """The widest type that a part's weights are stored in, float32 at most."""
    stored = [part.keys.source[name].dtype for rule in part.keys.rules for name in rule.sources]
    dtype = reduce(torch.promote_types, stored)
    return dtype if dtype in _DTYPE_NAMES else torch.float32


def _save_config(model: nn.Module, place: Path, dtype: torch.dtype) -> None:
    if isinstance(model, ConfigMixin):
        model.save_config(place)
        return
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.save_pretrained(place)
    if model.can_generate():
        model.generation_config.save_pretrained(place)


# ---------------------------------------------------------------------------------------------------- safetensors


def write_weights(place: Path, stem: str, keys: KeyMap, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """
    Writes a part's weights as safetensors, one tensor in memory at a time; several files get an index.

    Args:
        place (`Path`): the part's folder.
        stem (`str`): how its loader calls the file.
        keys ([`KeyMap`]): where the weights come from.
        dtype (`torch.dtype`): what they are written in.
        max_shard_bytes (`int`): of one file, unless one tensor alone is larger.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in keys.target.items():
        num_bytes = shape.numel() * dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    for file, names in zip(files, shards, strict=True):
        with (place / file).open("wb") as opened:
            _write_shard(opened, names, keys, dtype)
    if len(shards) > 1:
        total = sum(shape.numel() for shape in keys.target.values()) * dtype.itemsize
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (place / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_shard(file: BinaryIO, names: list[str], keys: KeyMap, dtype: torch.dtype) -> None:
    # The format: the header's length in 8 bytes, the header in JSON, the tensors one after the other. The library's
    # own writer takes a whole shard's tensors at once.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + keys.target[name].numel() * dtype.itemsize
        shape = list(keys.target[name])
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        file.write(_round(name, keys.read(name), dtype).flatten().view(torch.uint8).numpy().data)


def _round(name: str, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in another type, unless that is too narrow for it."""
    tensor = stored.to(dtype)
    words = f"{name} is stored as {str(stored.dtype).removeprefix('torch.')}; as {str(dtype).removeprefix('torch.')}"
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{words} it is not finite: choose a wider --dtype, or the file is damaged.")
    num_values = stored.count_nonzero().item()
    num_lost = num_values - tensor.count_nonzero().item()
    if num_lost > MAX_LOST_SHARE * num_values:
        raise ValueError(f"{words} {num_lost} of its {num_values} values become 0: choose float32 or bfloat16.")
    return tensor
