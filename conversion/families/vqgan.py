"""VQGANs of taming-transformers (nearest code, or GumbelVQ) and of projects that kept its names, into `DalleVQGAN`.

ruDALL-E's, minDALL-E's and DALLE-pytorch's checkpoints hold such models too; their converters call `map_vqgan`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_dalle import DalleVQGAN

from ..cards import Verification
from ..folders import Conversion, Facts, Part, build_on_meta, fill_module, make_part
from ..safe_load import StoredTensor, list_tensors, load_checkpoint
from ..settings import describe, read_yaml
from ..sizes import count_numbered, find_shape
from ..sources import BESIDE, LIGHTNING_CLASSES, find_file, list_beside, take_weights
from .image_check import compare_image_model


SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
DEFAULT_RESOLUTION = 256
MAX_LEVELS = 10  # each halves the picture
FACTS = Facts(
    title="A VQGAN of taming-transformers",
    origin=(
        "A VQGAN in the form of taming-transformers (https://github.com/CompVis/taming-transformers, Esser et al.,"
        " 2021, https://arxiv.org/abs/2012.09841)."
    ),
    license="other",
    license_words=(
        "taming-transformers and its models are published under the MIT licence, Copyright (c) 2020 Patrick Esser and"
        " Robin Rombach and Björn Ommer, whose notice goes with every copy. A model that somebody else trained has its"
        " maker's terms, which are not in the file."
    ),
)
NOISE_NOTE = (
    "`encode` gives each cell's most probable code. Taming's GumbelVQ adds Gumbel noise to the logits there, so that"
    " its tokens of one picture vary from call to call."
)


def read_source(source: Path) -> Conversion:
    """
    Reads a checkpoint, and the YAML file of its configuration where one lies beside it.

    Args:
        source (`Path`): the file, or a folder with one checkpoint.

    Raises:
        OSError: if there is no such file, several, or it is damaged.
        ValueError: for a file that is refused, or of another shape.
    """
    file = find_file(source, SUFFIXES)
    content = load_checkpoint(file, LIGHTNING_CLASSES).content
    configs = sorted({*file.parent.glob("*.yaml"), *file.parent.glob("*.yml")})
    resolution = read_resolution(configs[0]) if len(configs) == 1 else None
    part, inferred = map_vqgan(list_tensors(take_weights(content)), resolution)
    part.keys.drop_beside(list_beside(content), BESIDE)
    files = [file, *(configs if resolution is not None else [])]
    facts = FACTS if part.content.config.quantizer == "nearest" else FACTS.with_note(NOISE_NOTE)
    return Conversion({"": part}, facts, files, inferred)


def count_levels(tensors: Mapping[str, StoredTensor], prefix: str = "") -> int:
    """How many resolutions a VQGAN has whose weights begin with `prefix`; `ValueError` where it is none."""
    num_levels = count_numbered(tensors, rf"{re.escape(prefix)}encoder\.down\.(\d+)\.")
    if not 1 <= num_levels <= MAX_LEVELS:
        some = ", ".join(list(tensors)[:5]) or "none"
        raise ValueError(
            f"The source has {num_levels} levels `encoder.down`; a VQGAN has 1 to {MAX_LEVELS}. Names: {some}."
        )
    return num_levels


def read_resolution(path: Path) -> int | None:
    """`model.params.ddconfig.resolution` of a configuration file; `None` if it has none."""
    return expect_resolution(read_yaml(path, "model", "params", "ddconfig", "resolution"), path)


def expect_resolution(value: Any, path: Path) -> int | None:
    """The side of the pictures that a configuration file says, where it does."""
    if value is not None and (type(value) is not int or not 1 <= value <= 2**16):
        raise ValueError(f"`resolution` of {path} is {describe(value)}; expected the side of the pictures in pixels.")
    return value


def map_vqgan(tensors: Mapping[str, StoredTensor], resolution: int | None = None) -> tuple[Part, list[str]]:
    """
    The rules from a VQGAN's state dict to a [`DalleVQGAN`].

    Args:
        tensors (`Mapping[str, StoredTensor]`): under taming's names, as "encoder.conv_in.weight", and no others.
        resolution (`int`, *optional*): side of the pictures, which no weight shows; 256 if it is not known.

    Returns:
        `tuple[Part, list[str]]`: with sizes found from the weights, and how.
    """
    num_levels = count_levels(tensors)
    widths = [find_shape(tensors, f"encoder.down.{level}.block.0.conv2.weight", 4)[0] for level in range(num_levels)]
    is_gumbel = "quantize.proj.weight" in tensors
    codes = "quantize.embed.weight" if is_gumbel else "quantize.embedding.weight"
    vocab_size, codebook_dim = find_shape(tensors, codes)
    config = {
        "sample_size": resolution or DEFAULT_RESOLUTION,
        "vocab_size": vocab_size,
        "block_out_channels": widths,
        "layers_per_block": count_numbered(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "attention_levels": [
            level for level in range(num_levels) if f"encoder.down.{level}.attn.0.q.weight" in tensors
        ],
        "latent_channels": find_shape(tensors, "decoder.conv_in.weight", 4)[1],
        "codebook_dim": codebook_dim,
        "quantizer": "gumbel" if is_gumbel else "nearest",
    }
    part = make_part(build_on_meta(DalleVQGAN, **config), tensors)
    for name, shape in part.keys.target.items():
        original = codes if name == "quantize.embedding.weight" else name_original(name, num_levels)
        # Attention's 1 x 1 convolutions are linear layers here.
        is_linear = ".attentions." in name and len(shape) == 2
        part.keys.add(name, original, _flatten_convolution if is_linear else None)
    part.keys.drop_all("loss.", "the discriminator and the perceptual loss, which only training needs")
    inferred = [f"`{key}` is {value}, from the names and shapes of the weights" for key, value in config.items()]
    inferred[0] = f"`sample_size` is {config['sample_size']}: " + (
        "the configuration file's resolution" if resolution else "no file says it; the published models have 256"
    )
    return part, inferred


_MODULES = {
    **{"upsamplers.0": "upsample", "resnets": "block", "conv_shortcut": "nin_shortcut", "attentions": "attn"},
    **{"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
}


def name_original(name: str, num_levels: int) -> str:
    """Taming's name of a weight of diffusers' encoder or decoder."""
    name = name.replace(".mid_block.resnets.0.", ".mid.block_1.").replace(".mid_block.resnets.1.", ".mid.block_2.")
    name = name.replace(".mid_block.attentions.0.", ".mid.attn_1.").replace(".conv_norm_out.", ".norm_out.")
    name = name.replace(".down_blocks.", ".down.").replace(".downsamplers.0.", ".downsample.")
    # the decoder's list begins at the finest resolution there, at the coarsest here
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{num_levels - 1 - int(found[1])}.", name)
    for ours, theirs in _MODULES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _flatten_convolution(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1)  # C x C x 1 x 1 -> C x C


# --------------------------------------------------------------------------------------------------------- --verify


def verify(folder: Path, conversion: Conversion) -> Verification:
    """
    Compares a written folder with taming-transformers' encoder and decoder where these are installed, else tokens with
    their one-hot vectors, and asks whether all is finite.

    Args:
        folder (`Path`): what was written.
        conversion ([`Conversion`]): what it was written from.
    """
    return verify_vqgan(DalleVQGAN.from_pretrained(folder), conversion, "")


@torch.no_grad()
def verify_vqgan(vqgan: DalleVQGAN, conversion: Conversion, part: str) -> Verification:
    """[`verify`] for the model that was converted as a part of several."""
    try:
        from taming.modules.diffusionmodules.model import Decoder, Encoder
    except ImportError:
        return compare_image_model(vqgan, "taming-transformers")
    original = OriginalVQGAN(Encoder, Decoder, dict(conversion.read_rounded(part)), vqgan.config)
    return compare_image_model(vqgan, "taming-transformers", original.compute_logits, original.decode)


class OriginalVQGAN:
    """Taming's encoder and decoder, filled with weights under taming's names, and the little between them."""

    def __init__(self, encoder: type[nn.Module], decoder: type[nn.Module], weights: dict, config: Mapping):
        widths, size = config.block_out_channels, config.sample_size
        sizes = {
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": config.layers_per_block,
            "attn_resolutions": [size // 2**level for level in config.attention_levels],
            **{"in_channels": 3, "out_ch": 3, "resolution": size, "z_channels": config.latent_channels},
            "double_z": False,
        }
        self.weights, self.encoder, self.decoder = weights, encoder(**sizes), decoder(**sizes)
        for side in ("encoder", "decoder"):
            own = {name: weight for name, weight in weights.items() if name.startswith(f"{side}.")}
            fill_module(getattr(self, side), {name.removeprefix(f"{side}."): weight for name, weight in own.items()})

    def _convolve(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        return F.conv2d(inputs, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def compute_logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits, or minus the squared distances to the codes."""
        encoded = self._convolve("quant_conv", self.encoder(2 * pixels - 1))
        if "quantize.proj.weight" in self.weights:
            return self._convolve("quantize.proj", encoded)
        codes, flat = self.weights["quantize.embedding.weight"], encoded.movedim(1, -1)
        return -torch.cdist(flat.flatten(0, 2), codes).square().view(*flat.shape[:3], -1).movedim(-1, 1)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens to pictures in [0, 1]."""
        codes = self.weights.get("quantize.embed.weight", self.weights.get("quantize.embedding.weight"))
        return (self.decoder(self._convolve("post_quant_conv", codes[tokens].movedim(-1, 1))).clamp(-1, 1) + 1) / 2
