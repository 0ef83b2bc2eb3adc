"""The image models inside DALLE-pytorch's checkpoints: its own DiscreteVAE, OpenAI's, or a VQGAN.

Its prior is `dalle_pytorch.py`'s, which calls `map_image_model`.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from hf_dalle import DalleDiscreteVAE

from ..cards import Verification
from ..folders import Conversion, Part, build_on_meta, fill_module, make_part
from ..safe_load import StoredTensor
from ..settings import describe, expect_count
from ..sizes import count_numbered, find_shape
from .image_check import compare_image_model
from .openai_dvae import map_dvae
from .vqgan import map_vqgan


def map_image_model(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any] | None, image_size: int | None = None
) -> tuple[Part, list[str]]:
    """
    The rules for whichever model it is, known by its names.

    Args:
        tensors (`Mapping[str, StoredTensor]`): those under `vae.`, without that.
        settings (`Mapping`, *optional*): the checkpoint's `vae_params`, which only a DiscreteVAE has.
        image_size (`int`, *optional*): side of the pictures, where it is known.

    Returns:
        `tuple[Part, list[str]]`: with sizes found from the weights, and how.
    """
    if any(name.startswith("enc.blocks.") for name in tensors):
        sides = {"enc.": "encoder.", "dec.": "decoder."}
        named = {re.sub(r"^(enc|dec)\.", lambda found: sides[found[0]], name): part for name, part in tensors.items()}
        return map_dvae(named, image_size or 256)
    if any(name.startswith("model.encoder.down.") for name in tensors):
        return map_vqgan({name.removeprefix("model."): part for name, part in tensors.items()}, image_size)
    return map_discrete_vae(tensors, settings or {}, image_size)


def map_discrete_vae(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any], image_size: int | None = None
) -> tuple[Part, list[str]]:
    """
    The rules from a DiscreteVAE's state dict to a [`DalleDiscreteVAE`].

    Args:
        tensors (`Mapping[str, StoredTensor]`): as "codebook.weight", "encoder.0.0.weight".
        settings (`Mapping`): `vae_params` or `hparams`: `image_size`, and `normalization` where it is not the default.
        image_size (`int`, *optional*): in place of the settings'.

    Raises:
        ValueError: where the size of the pictures is nowhere, or they have other than three channels.
    """
    size = image_size or expect_count(settings, "image_size", "the DiscreteVAE's `vae_params`")
    num_layers = count_numbered(tensors, r"encoder\.(\d+)\.0\.")
    num_resnet_blocks = count_numbered(tensors, r"encoder\.(\d+)\.net\.")
    vocab_size, codebook_dim = find_shape(tensors, "codebook.weight")
    mean, std = _read_normalization(settings)
    config = {
        "sample_size": size,
        "vocab_size": vocab_size,
        "codebook_dim": codebook_dim,
        "hidden_channels": find_shape(tensors, "encoder.0.0.weight", 4)[0],
        "num_layers": num_layers,
        "num_resnet_blocks": num_resnet_blocks,
        "pixel_mean": mean,
        "pixel_std": std,
    }
    part = make_part(build_on_meta(DalleDiscreteVAE, **config), tensors)
    for name in part.keys.target:
        part.keys.add(name, _name_original(name, num_layers, num_resnet_blocks))
    inferred = [f"`{key}` is {value}, from the names and shapes of the weights" for key, value in config.items()]
    inferred[0] = f"`sample_size` is {size}, from the checkpoint's settings"
    said = "said by the checkpoint" if "normalization" in settings else "DALLE-pytorch's default: none is saved"
    inferred[-2:] = [f"pictures are normalised by the mean {mean} and the deviation {std}, {said}"]
    return part, inferred


def _read_normalization(settings: Mapping[str, Any]) -> tuple[list[float] | None, list[float] | None]:
    if "normalization" not in settings:
        return [0.5] * 3, [0.5] * 3
    if settings["normalization"] is None:
        return None, None
    given = settings["normalization"]
    are_lists = type(given) in (list, tuple) and [type(part) in (list, tuple) for part in given] == [True, True]
    # a number a channel, of which the fourth was for transparency
    numbers = [list(part[:3]) for part in given] if are_lists else []
    if [len(part) for part in numbers] != [3, 3] or not all(type(n) in (int, float) for n in sum(numbers, [])):
        raise ValueError(
            f"`normalization` of the DiscreteVAE is {describe(given)}; expected a mean and a deviation a channel."
        )
    return tuple([float(number) for number in part] for part in numbers)


def _name_original(name: str, num_layers: int, num_resnet_blocks: int) -> str:
    """Ours names what it is; theirs counts through one list: convolutions, resblocks, the last 1 x 1, or backwards."""
    name = re.sub(r"\.conv_([123])\.", lambda found: f".net.{2 * int(found[1]) - 2}.", name)
    name = re.sub(r"^encoder\.downsamplers\.(\d+)\.", r"encoder.\1.0.", name)
    name = re.sub(r"^encoder\.resnets\.(\d+)\.", lambda found: f"encoder.{num_layers + int(found[1])}.", name)
    name = name.replace("encoder.conv_out.", f"encoder.{num_layers + num_resnet_blocks}.")
    first = num_resnet_blocks + 1 if num_resnet_blocks else 0  # after the 1 x 1 and the resblocks
    name = name.replace("decoder.conv_in.", "decoder.0.")
    name = re.sub(r"^decoder\.resnets\.(\d+)\.", lambda found: f"decoder.{1 + int(found[1])}.", name)
    name = re.sub(r"^decoder\.upsamplers\.(\d+)\.", lambda found: f"decoder.{first + int(found[1])}.0.", name)
    return name.replace("decoder.conv_out.", f"decoder.{first + num_layers}.")


# --------------------------------------------------------------------------------------------------------- --verify


@torch.no_grad()
def verify_discrete_vae(vae: DalleDiscreteVAE, conversion: Conversion, part: str) -> Verification:
    """
    Compares a DiscreteVAE that was written with DALLE-pytorch's where that is installed, else tokens with their
    one-hot vectors, and asks whether all is finite.

    Args:
        vae ([`DalleDiscreteVAE`]): as it was loaded.
        conversion ([`Conversion`]): what it was written from.
        part (`str`): its name there.
    """
    config = vae.config
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from dalle_pytorch import DiscreteVAE
    except (ImportError, AttributeError):
        return compare_image_model(vae, "dalle-pytorch")
    original = DiscreteVAE(
        **{"image_size": config.sample_size, "num_tokens": config.vocab_size, "codebook_dim": config.codebook_dim},
        **{"num_layers": config.num_layers, "num_resnet_blocks": config.num_resnet_blocks},
        hidden_dim=config.hidden_channels,
    )
    means, stds = config.pixel_mean or [0.0] * 3, config.pixel_std or [1.0] * 3
    original.normalization = (means, stds)
    fill_module(original, dict(conversion.read_rounded(part)))
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (means, stds))

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        return (original.decode(tokens.flatten(1)) * std + mean).clamp(0, 1)  # its own are still normalised

    return compare_image_model(
        vae, "dalle-pytorch's DiscreteVAE", lambda pixels: original(pixels, return_logits=True), decode
    )
