"""`--verify` of a converted image model: tokens, logits and pictures, against the original where it is installed, else
with itself.

How an original is built is its family's own file's; of a whole pipeline the comparison is `prior_check.py`'s.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_dalle import DalleDiscreteVAE, DalleVQGAN

from ..cards import Check, Verification


def compare_image_model(
    model: DalleVQGAN | DalleDiscreteVAE,
    name: str,
    compute_logits: Callable[[torch.Tensor], torch.Tensor] | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Verification:
    """
    Compares what one random picture becomes; without the original, tokens with their one-hot vectors.

    Args:
        model: as it was loaded.
        name (`str`): of the original.
        compute_logits (`Callable`, *optional*):
            The original's logits, 1 x K x h x w, of pictures in [0, 1]; `None` where it is not installed.
        decode (`Callable`, *optional*): the original's pictures in [0, 1] of tokens 1 x h x w; with `compute_logits`.
    """
    pixels = draw_pixels(model.config.sample_size)
    encoded = model.encode(pixels)
    sample = model.decode(encoded.tokens).sample
    num_broken = sum((~values.isfinite()).sum().item() for values in (encoded.logits, sample))
    checks = [Check("values that are not finite", num_broken, 0)]
    if compute_logits is None or decode is None:
        one_hot = F.one_hot(encoded.tokens, model.config.vocab_size).movedim(-1, 1).float()
        difference = find_largest_difference(model.decode(one_hot).sample, sample)
        checks.append(Check("largest difference of pixels from tokens and from one-hot vectors", difference, 1e-4))
        return Verification(f"itself ({name} is not installed)", checks)
    logits = compute_logits(pixels)
    checks += [
        Check("tokens that differ", (encoded.tokens != logits.argmax(dim=1)).sum().item(), 0),
        Check("largest difference of logits", find_largest_difference(encoded.logits, logits), 1e-3),
        Check("largest difference of pixels", find_largest_difference(sample, decode(encoded.tokens)), 1e-4),
    ]
    return Verification(name, checks)


def draw_pixels(size: int) -> torch.Tensor:
    """A random picture, 1 x 3 x size x size in [0, 1], always the same."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def find_largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest of the absolute differences."""
    return (ours - theirs).abs().max().item()
