"""`--verify` of a converted pipeline: weights, caption ids, logits, greedy tokens and pictures, against the original
where it is installed, else with itself.

How an original is built is its family's own file's; how image models are compared, that of the image models.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import ConfigMixin
from transformers import PreTrainedTokenizerBase

from hf_dalle import DalleDVAE, DalleFamilyPriorForCausalLM, DALLEPipeline, DalleVQGAN

from ..captions import make_captions
from ..cards import Check, Verification
from ..folders import Conversion
from .dalle_pytorch_vae import verify_discrete_vae
from .image_check import find_largest_difference
from .openai_dvae import verify_dvae
from .vqgan import verify_vqgan


NUM_CACHED_ROWS = 2  # of the grid: as many cells are computed one by one
# Of logits. Both sides have the source's weights in float32, so that nothing is rounded by which they could differ.
LIMIT = 1e-3
CAPTION = "A red fox, красная лиса"


class Original(NamedTuple):
    """
    What a pipeline is compared with.

    Args:
        name (`str`): of the program.
        version (`str`): which of them.
        compute (`Callable`, *optional*):
            From text ids 1 x T, 0 at pads where these have ids of their own, and image tokens 1 x N to the original's
            logits of the text (1 x states x text ids and pads) and of the image (1 x N x image tokens); `None` where
            it is not there.
        encode (`Callable`, *optional*): from a caption to its T text ids; `None` where it is not there.
    """

    name: str
    version: str = ""
    compute: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    encode: Callable[[str], list[int]] | None = None


@torch.no_grad()
def verify_pipeline(folder: Path, conversion: Conversion, original: Original) -> Verification:
    """
    Loads what was written as its users do, but in float32, and compares.

    First every weight of the prior with the source's, rounded once to what the files hold. Then, with the source's own
    weights in float32 on both sides, logits at every position, from the cache and not, and what is drawn greedily.

    Args:
        folder (`Path`): the pipeline's.
        conversion ([`Conversion`]): what it was written from.
        original ([`Original`]): the program that made the source.
    """
    pipe = DALLEPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prior = pipe.prior.eval()
    checks = [
        Check("weights that are not the source's, rounded once", count_other_weights(prior, conversion), 0),
        count_other_ids(pipe, conversion.parts["tokenizer"].content, original.encode),
        *compare_logits(prior, original),
        *compare_greedy(pipe, original),
    ]
    against, found = verify_image_model(pipe.dvae, conversion)
    checks += [check._replace(what=f"image model, against {against}: {check.what}") for check in found]
    name = f"{original.name} {original.version}".strip()
    return Verification(name if original.compute else f"itself ({name} is not there to compare with)", checks)


def verify_image_model(dvae: ConfigMixin, conversion: Conversion) -> Verification:
    """The comparison that fits the image model of a pipeline."""
    verify = {DalleVQGAN: verify_vqgan, DalleDVAE: verify_dvae}.get(type(dvae), verify_discrete_vae)
    return verify(dvae, conversion, "dvae")


def count_other_weights(prior: DalleFamilyPriorForCausalLM, conversion: Conversion) -> int:
    """
    How many weights are not the source's, rounded to what the files hold; then the prior has the source's, unrounded.
    """
    keys, dtype, num_other = conversion.parts["prior"].keys, conversion.find_dtype("prior"), 0
    loaded = prior.state_dict()
    for rule in keys.rules:
        stored = rule.apply([keys.source[name].read() for name in rule.sources])
        exact = rule.apply([keys.source[name].read().float() for name in rule.sources])
        for name, tensor in stored.items():
            num_other += not loaded[name].equal(tensor.to(dtype).float())
            loaded[name].copy_(exact[name])
    return num_other


def count_other_ids(
    pipe: DALLEPipeline, written: PreTrainedTokenizerBase, encode: Callable[[str], list[int]] | None
) -> Check:
    """
    Of the captions of `captions.py`, how many the prior reads otherwise than by the original's ids; without the
    original, how many the saved tokenizer encodes otherwise than the one that was saved.
    """
    captions, length = make_captions(), pipe.prior.config.text_length
    ours = encode_plainly(pipe.tokenizer, captions, length)
    if encode is None:
        theirs = encode_plainly(written, captions, length)
        what = f"captions of {len(captions)} whose ids are not those of the tokenizer before it was saved"
    else:
        ids = torch.tensor([encode(caption) for caption in captions])
        theirs = ids, torch.ones_like(ids)
        what = f"captions of {len(captions)} whose ids differ"
    streams = [pipe.prior.join_stream(*text)["input_ids"] for text in (ours, theirs)]
    return Check(what, (streams[0] != streams[1]).any(dim=1).sum().item(), 0)


def encode_plainly(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask as [`encode_captions`] gives them, without its warning for each caption that is cut."""
    rows = [ids[:length] for ids in tokenizer(captions, verbose=False)["input_ids"]]
    text_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids in rows])
    return text_ids, torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows])


def compare_logits(prior: DalleFamilyPriorForCausalLM, original: Original) -> list[Check]:
    """Logits of random ids at every position, and those of the last cells from a cache."""
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
    if original.compute is not None:
        text, image = original.compute(text_ids, image_tokens)
        checks += [
            Check("largest difference of text logits", find_largest_difference(output.text_logits, text), LIMIT),
            Check("largest difference of image logits", find_largest_difference(output.image_logits, image), LIMIT),
        ]
    difference = compare_cached(prior, stream, output.image_logits)
    return [*checks, Check("largest difference of logits, cached and uncached", difference, LIMIT)]


def compare_greedy(pipe: DALLEPipeline, original: Original) -> list[Check]:
    """
    What the pipeline draws greedily, from its cache. The original, or else the prior without a cache, would draw the
    same: given what was drawn before, each token has its highest logit. Of logits that differ by less than their limit
    either may be the highest.
    """
    prior, tokens = pipe.prior, pipe(CAPTION, top_k=1, guidance_scale=1.0, output_type="latent").images.flatten(1)
    text_ids, attention_mask = encode_plainly(pipe.tokenizer, [CAPTION], prior.config.text_length)
    if original.compute is not None:
        if prior.config.use_position_pads:
            text_ids = text_ids * attention_mask
        _, logits = original.compute(text_ids, tokens)
    else:
        stream = prior.join_stream(text_ids, attention_mask, tokens)["input_ids"][:, :-1]
        logits = prior(stream, use_cache=False).image_logits
    lacking = logits.amax(dim=2) - logits.gather(2, tokens[..., None])[..., 0]
    return [Check(f"greedy image tokens of {tokens.shape[1]} that differ", (lacking > LIMIT).sum().item(), 0)]


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
