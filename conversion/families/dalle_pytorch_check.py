"""`--verify` of a DALLE-pytorch checkpoint: the original's class by its constructor, filled with tensors read safely.

Where dalle-pytorch is not installed, does not import, or computes conv_like otherwise than the version that trained
the checkpoint, the converted prior is compared with itself.
"""

import re
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_dalle import DalleFamilyPriorConfig

from ..cards import Verification
from ..folders import Conversion, fill_module
from .prior_check import Original, verify_pipeline


FIRST_CAUSAL_CONV = (1, 5)  # before, the window of conv_like was centred on the cell, with what comes after masked


def verify(folder: Path, conversion: Conversion) -> Verification:
    """
    Compares a written folder with the original, or with itself.

    Args:
        folder (`Path`): the pipeline's.
        conversion ([`Conversion`]): what it was made from.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import dalle_pytorch
            from dalle_pytorch import tokenizer as tokenizers
    except (ImportError, AttributeError):
        return verify_pipeline(folder, conversion, Original("dalle-pytorch"))
    config, installed = conversion.parts["prior"].content.config, find_version(dalle_pytorch)
    encode = make_encode(tokenizers, conversion.files[1], config.text_length)
    is_causal = tuple(map(int, re.findall(r"\d+", installed)[:2])) >= FIRST_CAUSAL_CONV
    if ("conv_bordered" if is_causal else "conv_like") in config.attention_types:
        name = Original("dalle-pytorch", f"{installed}, whose conv_like is another,", encode=encode)
        return verify_pipeline(folder, conversion, name)
    original = build_original(dalle_pytorch, conversion)
    return verify_pipeline(folder, conversion, Original("dalle-pytorch", installed, compute_with(original), encode))


def find_version(package: Any) -> str:
    """Of the installed dalle-pytorch; "0" where nothing says it."""
    try:
        return getattr(package, "__version__", None) or version("dalle-pytorch")
    except PackageNotFoundError:
        return "0"


def build_original(package: Any, conversion: Conversion) -> nn.Module:
    """DALLE-pytorch's prior with the checkpoint's weights; of its image model only the sizes are there."""
    config, dvae = conversion.parts["prior"].content.config, conversion.parts["dvae"].content
    vae = package.VQGanVAE.__new__(package.VQGanVAE)  # a class that its constructor lets pass
    nn.Module.__init__(vae)
    vae.image_size, vae.num_tokens = dvae.config.sample_size, dvae.config.vocab_size
    vae.num_layers = (dvae.config.sample_size // dvae.image_grid_size).bit_length() - 1
    original = package.DALLE(vae=vae, **list_options(config))
    # How many wrappers stand around a layer differs from version to version; angles are compared where they are read.
    names = {simplify(name): name for name in original.state_dict()}
    weights = {names.get(simplify(name), name): tensor for name, tensor in conversion.read_stored("prior")}
    if config.tie_word_embeddings:
        weights |= {
            name: weights[f"to_logits.1.{name.rpartition('.')[2]}"] for name in names.values() if ".linear." in name
        }
    if config.use_rotary_embedding:
        weights["transformer.pos_emb"] = original.transformer.pos_emb
    fill_module(original, weights)
    return original


def simplify(name: str) -> str:
    """A weight's name with one wrapper for any number of them."""
    return re.sub(r"\.(?:fn\.)+", ".fn.", name)


def list_options(config: DalleFamilyPriorConfig) -> dict[str, Any]:
    """What the original's constructor takes for a prior; what not all versions have, only where it is on."""
    names = {"column": "axial_col", "conv_bordered": "conv_like"}
    options = {
        **{"dim": config.hidden_size, "depth": config.num_hidden_layers, "heads": config.num_attention_heads},
        **{"dim_head": config.head_dim, "num_text_tokens": config.text_vocab_size, "text_seq_len": config.text_length},
        "attn_types": tuple(names.get(kind, kind) for kind in config.attention_types),
        **{"stable": config.use_max_norm, "shift_tokens": config.use_token_shift},
        "rotary_emb": config.use_rotary_embedding,
    }
    if config.use_sandwich_norm:
        options["sandwich_norm"] = True
    if config.tie_word_embeddings:
        options["share_input_output_emb"] = True
    return options


def compute_with(original: nn.Module) -> Callable:
    """The `compute` of an [`Original`]."""

    def compute(text_ids: torch.Tensor, image_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = original(text_ids.clone(), image_tokens)
        text, image = logits.tensor_split([original.text_seq_len], dim=1)
        return text[..., : original.num_text_tokens], image[..., original.num_text_tokens :]

    return compute


def make_encode(tokenizers: Any, file: Path, text_length: int) -> Callable[[str], list[int]]:
    """The `encode` of an [`Original`]: its tokenizer of such a file, what is too long cut, with 0 for pads."""
    if file.name == "vocab.txt":
        from transformers import BertTokenizer

        tokenizer = tokenizers.ChineseTokenizer.__new__(tokenizers.ChineseTokenizer)
        # Its constructor downloads bert-base-chinese, a cased one.
        tokenizer.tokenizer = BertTokenizer.from_pretrained(str(file.parent), do_lower_case=False)
    elif file.suffix == ".txt":
        tokenizer = tokenizers.SimpleTokenizer(file)
    elif file.suffix == ".gz":
        tokenizer = tokenizers.tokenizer  # of the same file, which lies in the package
    else:
        tokenizer = (tokenizers.HugTokenizer if file.suffix == ".json" else tokenizers.YttmTokenizer)(file)
    return lambda caption: tokenizer.tokenize(caption, text_length, truncate_text=True)[0].tolist()
