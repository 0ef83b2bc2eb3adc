"""`--verify` of a DALLE-pytorch checkpoint: the original's class by its constructor, filled with tensors read safely.

Where dalle-pytorch is not installed, or does not import, the converted prior is compared with itself.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cards import Verification
from ..folders import Conversion, fill_module
from ..safe_load import list_tensors, load_checkpoint
from .prior_check import verify_pipeline


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
            from dalle_pytorch.version import __version__
    except (ImportError, AttributeError):
        return verify_pipeline(folder, conversion, "dalle-pytorch", None)
    dvae = conversion.parts["dvae"].content
    original = build_original(dalle_pytorch, conversion.files[0], dvae)
    return verify_pipeline(folder, conversion, f"dalle-pytorch {__version__}", compute_with(original))


def build_original(package: Any, file: Path, dvae: nn.Module) -> nn.Module:
    """DALLE-pytorch's prior with the checkpoint's weights; of its image model only the sizes are there."""
    content = load_checkpoint(file).content
    tensors = {name: part for name, part in list_tensors(content["weights"]).items() if not name.startswith("vae.")}
    vae = package.VQGanVAE.__new__(package.VQGanVAE)  # a class that its constructor lets pass
    nn.Module.__init__(vae)
    vae.image_size, vae.num_tokens = dvae.config.sample_size, dvae.config.vocab_size
    vae.num_layers = (dvae.config.sample_size // dvae.image_grid_size).bit_length() - 1
    is_sandwich = any(name.endswith("norm_out.weight") for name in tensors)
    hparams = {**content["hparams"], "sandwich_norm": is_sandwich}
    original = package.DALLE(vae=vae, **hparams)
    fill_module(original, {name: part.read().float() for name, part in tensors.items()})
    return original


def compute_with(original: nn.Module) -> Callable:
    """What [`verify_pipeline`] compares with."""

    def compute(text_ids: torch.Tensor, image_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = original(text_ids.clone(), image_tokens)
        text, image = logits.tensor_split([original.text_seq_len], dim=1)
        return text[..., : original.num_text_tokens], image[..., original.num_text_tokens :]

    return compute
