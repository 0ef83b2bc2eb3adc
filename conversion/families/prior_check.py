"""`--verify` of a converted pipeline: its prior against the original where it is installed, else with itself.

How an original is built is its family's own file's; a VQGAN in the pipeline is compared by `vqgan.py`.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from hf_dalle import DalleFamilyPriorForCausalLM, DalleVQGAN

from ..cards import Check, Verification
from ..folders import Conversion
from .vqgan import verify_vqgan


NUM_CACHED_ROWS = 2  # of the grid: as many cells are computed one by one
# Of logits. Where weights are rounded to 16 bits, ours are after scales were folded into them, the original's before.
LIMIT, ROUNDED_LIMIT = 1e-3, 0.5
ComputeLogits = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def verify_pipeline(
    folder: Path, conversion: Conversion, name: str, compute_original: ComputeLogits | None
) -> Verification:
    """
    Loads what was written, the prior in float32, and compares logits at every position.

    Args:
        folder (`Path`): the pipeline's.
        conversion ([`Conversion`]): what it was written from.
        name (`str`): of the original, as "dalle-pytorch 1.6.6".
        compute_original (`Callable`, *optional*):
            From text ids 1 x T, 0 at pads, and image tokens 1 x N to the original's logits of the text (1 x states x
            text ids and pads) and of the image (1 x N x image tokens); `None` where it is not installed.
    """
    prior = DalleFamilyPriorForCausalLM.from_pretrained(folder / "prior", dtype=torch.float32).eval()
    config, generator = prior.config, torch.Generator().manual_seed(0)
    text_ids = torch.randint(1, config.text_vocab_size, (1, config.text_length), generator=generator)
    attention_mask = torch.ones_like(text_ids)
    if config.use_position_pads:
        attention_mask[:, config.text_length // 2 :] = 0
        text_ids = text_ids * attention_mask
    image_tokens = torch.randint(config.image_vocab_size, (1, config.num_image_tokens), generator=generator)
    stream = prior.join_stream(text_ids, attention_mask, image_tokens)["input_ids"][:, :-1]
    output = prior(stream, use_cache=False)
    num_broken = (~output.image_logits.isfinite()).sum() + (~output.text_logits.isfinite()).sum()
    checks = [Check("logits that are not finite", num_broken.item(), 0)]
    if compute_original is not None:
        limit = LIMIT if conversion.find_dtype("prior") == torch.float32 else ROUNDED_LIMIT
        text, image = compute_original(text_ids, image_tokens)
        checks += [
            Check("largest difference of text logits", find_largest_difference(output.text_logits, text), limit),
            Check("largest difference of image logits", find_largest_difference(output.image_logits, image), limit),
        ]
    difference = compare_cached(prior, stream, output.image_logits)
    checks.append(Check("largest difference of logits, cached and uncached", difference, LIMIT))
    if isinstance(conversion.parts["dvae"].content, DalleVQGAN):
        pictures = verify_vqgan(DalleVQGAN.from_pretrained(folder / "dvae"), conversion, "dvae")
        checks += [check._replace(what=f"image model: {check.what}") for check in pictures.checks]
    return Verification(name if compute_original is not None else f"itself ({name} is not installed)", checks)


def compare_cached(prior: DalleFamilyPriorForCausalLM, stream: torch.Tensor, image_logits: torch.Tensor) -> float:
    """The last rows of the image one cell after the other, from a cache, against all at once."""
    num_cells = min(NUM_CACHED_ROWS * prior.config.image_grid_size, prior.config.num_image_tokens - 1)
    cache = prior.new_cache()
    prior(stream[:, :-num_cells], past_key_values=cache, use_cache=True, logits_to_keep=1)
    differences = [0.0]
    for state in range(-num_cells, 0):
        step = prior(stream[:, state, None], past_key_values=cache, use_cache=True)
        differences.append(find_largest_difference(step.image_logits[:, 0], image_logits[:, state]))
    return max(differences)


def find_largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest of the absolute differences."""
    return (ours - theirs).abs().max().item()
