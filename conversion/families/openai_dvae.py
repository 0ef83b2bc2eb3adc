"""OpenAI's discrete VAE: encoder.pkl and decoder.pkl, whole pickled modules of the DALL-E package, into `DalleDVAE`.

The pickles' classes become inert shells, of which the weights are taken; so the torch that saved them does not matter.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from hf_dalle import DalleDVAE
from hf_dalle.logit_laplace import map_pixels, unmap_pixels

from ..cards import Check, Verification
from ..folders import Conversion, Facts, Part, build_on_meta, fill_module, make_part
from ..safe_load import StoredTensor, list_tensors, load_checkpoint
from ..sizes import count_numbered, find_shape
from .image_check import draw_pixels, find_largest_difference


NUM_GROUPS = 4
CLASSES = [
    *("dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.utils.Conv2d"),
    *("dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock"),
    *("torch.nn.modules.container.Sequential", "torch.nn.modules.linear.Identity"),
    *("torch.nn.modules.activation.ReLU", "torch.nn.modules.pooling.MaxPool2d"),
    "torch.nn.modules.upsampling.Upsample",
]
FACTS = Facts(
    title="OpenAI's discrete VAE of DALL-E",
    origin=(
        "The discrete VAE that OpenAI released with DALL-E (https://github.com/openai/DALL-E, Ramesh et al., 2021,"
        " https://arxiv.org/abs/2102.12092): 256 x 256 pictures as 32 x 32 tokens out of 8,192. The prior was not"
        " released."
    ),
    license="other",
    license_name="modified-mit",
    license_link="https://github.com/openai/DALL-E/blob/master/LICENSE",
    license_words=(
        "OpenAI's modified MIT licence (https://github.com/openai/DALL-E/blob/master/LICENSE). It claims no ownership"
        " of what is made with the model, and asks to use it responsibly and to **indicate clearly that it was used**."
        " Its copyright notice, Copyright (c) 2021 OpenAI, and permission notice go with every copy of the model."
    ),
)


def read_source(source: Path) -> Conversion:
    """
    Reads a folder with encoder.pkl and decoder.pkl.

    Args:
        source (`Path`): the folder.

    Raises:
        OSError: if one is missing or damaged.
        ValueError: for a pickle that is refused, or of another shape.
    """
    files = [source / "encoder.pkl", source / "decoder.pkl"]
    for file in files:
        if not file.is_file():
            raise OSError(f"{file} is missing: the source is a folder with encoder.pkl and decoder.pkl.")
    tensors, attributes = {}, set()
    for side, file in zip(("encoder", "decoder"), files, strict=True):
        found = list_tensors(load_checkpoint(file, CLASSES).content, attributes)
        tensors |= {f"{side}.{name}": tensor for name, tensor in found.items()}
    part, inferred = map_dvae(tensors)
    part.keys.drop_beside(attributes, "attributes of the pickled modules, whose values are not looked at")
    return Conversion({"": part}, FACTS, files, inferred)


def map_dvae(tensors: Mapping[str, StoredTensor], sample_size: int = 256) -> tuple[Part, list[str]]:
    """
    The rules from the package's two modules to a [`DalleDVAE`].

    Args:
        tensors (`Mapping[str, StoredTensor]`): under "encoder." and "decoder.", as "encoder.blocks.input.w".
        sample_size (`int`): side of the pictures, which no weight shows.

    Returns:
        `tuple[Part, list[str]]`: with sizes found from the weights, and how.
    """
    width = find_shape(tensors, "encoder.blocks.input.w", 4)[0]
    vocab_size = find_shape(tensors, "encoder.blocks.output.conv.w", 4)[0]
    layers_per_block = count_numbered(tensors, r"encoder\.blocks\.group_1\.block_(\d+)\.")
    num_groups = count_numbered(tensors, r"encoder\.blocks\.group_(\d+)\.")
    if num_groups != NUM_GROUPS:
        raise ValueError(f"The encoder has {num_groups} groups; OpenAI's has {NUM_GROUPS}.")
    decoder_width = find_shape(tensors, "decoder.blocks.output.conv.w", 4)[1]
    config = {
        "sample_size": sample_size,
        "vocab_size": vocab_size,
        "encoder_block_out_channels": [width * 2**group for group in range(NUM_GROUPS)],
        "decoder_block_out_channels": [decoder_width * 2**group for group in reversed(range(NUM_GROUPS))],
        "decoder_in_channels": find_shape(tensors, "decoder.blocks.input.w", 4)[0],
        "layers_per_block": layers_per_block,
    }
    part = make_part(build_on_meta(DalleDVAE, **config), tensors)
    for name in part.keys.target:
        part.keys.add(name, _name_original(name))
    inferred = [f"`{key}` is {value}, from the shapes of the weights" for key, value in config.items()]
    inferred[0] = f"`sample_size` is {sample_size}: no weight shows it, the paper says 256"
    return part, inferred


def _name_original(name: str) -> str:
    name = re.sub(r"weight$", "w", re.sub(r"bias$", "b", name))
    name = re.sub(r"\.conv_in\.", ".blocks.input.", re.sub(r"\.conv_out\.", ".blocks.output.conv.", name))
    name = name.replace(".shortcut.", ".id_path.")
    name = re.sub(r"\.(conv_\d)\.", r".res_path.\1.", name)
    # ours count from 0
    return re.sub(
        r"\.groups\.(\d+)\.(\d+)\.",
        lambda found: f".blocks.group_{int(found[1]) + 1}.block_{int(found[2]) + 1}.",
        name,
    )


# --------------------------------------------------------------------------------------------------------- --verify


def verify(folder: Path, conversion: Conversion) -> Verification:
    """
    Compares a written folder with OpenAI's package, or its encoder with FLAVA's codebook of transformers, which is
    that encoder, where the package is not installed. Both get the weights that were read safely, rounded as ours are.

    Args:
        folder (`Path`): what was written.
        conversion ([`Conversion`]): what it was written from.
    """
    return verify_dvae(DalleDVAE.from_pretrained(folder), conversion, "")


@torch.no_grad()
def verify_dvae(dvae: DalleDVAE, conversion: Conversion, part: str) -> Verification:
    """[`verify`] for the model that was converted as a part of several."""
    pixels = draw_pixels(dvae.config.sample_size)
    encoded = dvae.encode(pixels)
    decoded = dvae.decode(encoded.tokens)
    against, logits, maps = run_original(dvae, conversion, part, map_pixels(pixels), encoded.tokens)
    checks = [
        Check("largest difference of the encoder's logits", find_largest_difference(encoded.logits, logits), 1e-3),
        Check("tokens that differ", (encoded.tokens != logits.argmax(dim=1)).sum().item(), 0),
        Check("pixels that are not finite", (~decoded.sample.isfinite()).sum().item(), 0),
    ]
    if maps is not None:
        own_maps, sample = torch.cat([decoded.mu, decoded.log_b], dim=1), unmap_pixels(torch.sigmoid(maps[:, :3]))
        checks += [
            Check("largest difference of the decoder's maps", find_largest_difference(own_maps, maps), 1e-3),
            Check("largest difference of pixels in [0, 1]", find_largest_difference(decoded.sample, sample), 1e-4),
        ]
    return Verification(against, checks)


def run_original(
    dvae: DalleDVAE, conversion: Conversion, part: str, mapped: torch.Tensor, tokens: torch.Tensor
) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    """What the original is, its logits for mapped pixels, and its six maps for tokens if it has a decoder."""
    config = dvae.config
    try:
        from dall_e import Decoder, Encoder
    except ImportError:
        logits = _run_flava(dict(conversion.read_rounded(part, "encoder.")), config, mapped)
        return "the codebook of transformers' FLAVA (its encoder alone)", logits, None
    sizes = {"vocab_size": config.vocab_size, "n_blk_per_group": config.layers_per_block}
    encoder = Encoder(n_hid=config.encoder_block_out_channels[0], **sizes)
    decoder = Decoder(n_hid=config.decoder_block_out_channels[-1], n_init=config.decoder_in_channels, **sizes)
    for side, module in (("encoder", encoder), ("decoder", decoder)):
        fill_module(module, dict(conversion.read_rounded(part, f"{side}.")))
    one_hot = nn.functional.one_hot(tokens, config.vocab_size).movedim(-1, 1).float()
    return "OpenAI's DALL-E package", encoder(mapped), decoder(one_hot)


def _run_flava(stored: Mapping[str, torch.Tensor], config: dict, mapped: torch.Tensor) -> torch.Tensor:
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    codebook = FlavaImageCodebook(
        FlavaImageCodebookConfig(
            num_groups=NUM_GROUPS,
            num_blocks_per_group=config.layers_per_block,
            hidden_size=config.encoder_block_out_channels[0],
            vocab_size=config.vocab_size,
        )
    )
    weights = {}
    for name, tensor in stored.items():
        name = re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name))
        name = name.replace(".res_path.", ".res_path.path.")
        weights[re.sub(r"(group_\d)\.block", r"\1.group.block", name)] = tensor
    fill_module(codebook, weights)
    return codebook.blocks(mapped)
