"""Drawing image tokens from the prior: seeds, filters, prefill once a prompt, then one cell at a time from a cache.

Exact for every attention type: what is drawn depends on the caption, the seed and the settings, not on the batch.
Texts and pictures are the pipeline's; here are ids only.
"""

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig

from .cache_dalle import DalleCache
from .modeling_dalle_prior import DallePriorForCausalLM


# The buffers of each prior's last drawing, for the next one: kept beside the priors, which are copied and saved.
_kept_caches: WeakKeyDictionary[DallePriorForCausalLM, DalleCache] = WeakKeyDictionary()


def spawn_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int
) -> list[torch.Generator]:
    """
    One child generator an image, on the CPU, so that a picture does not depend on the batch or device it is drawn in.

    Seeds are drawn one at a time, in the images' order: image 0 of one image is image 0 of four.

    Args:
        generator (`torch.Generator`, list of them, *optional*):
            The source of all seeds, or one source an image; `None` is torch's default generator.
        num_images (`int`): how many images.

    Raises:
        ValueError: if there are not as many generators as images, or something is not a generator.
    """
    sources: list[Any] = list(generator) if isinstance(generator, list | tuple) else [generator] * num_images
    if len(sources) != num_images:
        raise ValueError(f"`generator` holds {len(sources)} generators for {num_images} images: give 1 or as many.")
    for source in sources:
        if not (isinstance(source, torch.Generator) or (source is None and generator is None)):
            kind = type(source).__name__
            raise ValueError(f"`generator` must be a `torch.Generator` or a list of them, not {kind}.")
    children = []
    for source in sources:
        device = source.device if source is not None else "cpu"
        seed = torch.randint(2**63 - 1, (1,), generator=source, device=device).item()
        children.append(torch.Generator().manual_seed(seed))
    return children


def filter_logits(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """
    Divides logits by the temperature and sets those of the tokens that may not be drawn to -inf.

    Args:
        logits (`torch.Tensor`): ... x K.
        temperature (`float`): above 0.
        top_k (`int`): how many of the most likely tokens stay, of equals the lowest ids; 0 keeps all.
        top_p (`float`): in (0, 1]; of those the fewest most likely that together have at least this probability stay.

    Raises:
        ValueError: for a setting outside its range.
    """
    check_settings(temperature, top_k, top_p)
    logits = logits / temperature
    if top_k == 0 and top_p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        ordered[..., top_k:] = -torch.inf
    if top_p < 1:
        probabilities = ordered.softmax(dim=-1)
        share_above = probabilities.cumsum(dim=-1) - probabilities
        ordered = ordered.masked_fill(share_above >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def resolve_settings(
    generation_config: GenerationConfig,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> dict[str, Any]:
    """
    The settings of a drawing: those given, else the checkpoint's own, else the paper's (no guidance, no truncation).

    Args:
        generation_config (`GenerationConfig`): the prior's, which holds the checkpoint's own.
        guidance_scale, temperature, top_k, top_p: see [`draw_image_tokens`].

    Returns:
        `dict`: the four by name, as [`draw_image_tokens`] takes them.

    Raises:
        ValueError: for a setting outside its range.
    """
    given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings: dict[str, Any] = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    for name in settings:
        for value in (getattr(generation_config, name, None), given[name]):
            settings[name] = settings[name] if value is None else value
    check_settings(**settings)
    return settings


def check_settings(temperature: float, top_k: int, top_p: float, guidance_scale: float = 1.0) -> None:
    """Raises `ValueError`, with words for the user, where a sampling setting is outside its range."""
    if not (isinstance(temperature, Real) and 0 < temperature < math.inf):
        raise ValueError(f"`temperature` is {temperature!r}; it must be above 0 (`top_k=1` takes the likeliest).")
    if not (isinstance(top_k, int) and top_k >= 0):
        raise ValueError(f"`top_k` is {top_k!r}; it must be a whole number, 0 (keep all tokens) or more.")
    if not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise ValueError(f"`top_p` is {top_p!r}; it must be in (0, 1], where 1 keeps all tokens.")
    if not (isinstance(guidance_scale, Real) and 1 <= guidance_scale < math.inf):
        raise ValueError(f"`guidance_scale` is {guidance_scale!r}; it must be 1 (no guidance) or more.")


def choose_tokens(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    Draws by the inverse of the cumulative distribution: the first token at which it exceeds the uniform number.

    Args:
        logits (`torch.Tensor`): B x K, in float64; -inf is never drawn.
        uniforms (`torch.Tensor`): B numbers in [0, 1), in float64.

    Returns:
        `torch.LongTensor`: B tokens in [0, K).
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # A float64 below 1 times the total rounds to less than the total: some token exceeds it, and one with a share.
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)  # of logits that are not finite, some token too


def draw_image_tokens(
    prior: DallePriorForCausalLM,
    text_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    generators: Sequence[torch.Generator],
    num_images_per_prompt: int = 1,
    image_prefix: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    negative_text_ids: torch.Tensor | None = None,
    negative_attention_mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[tuple[int, torch.Tensor]]:
    r"""
    Draws the image tokens of B prompts times n images, cell after cell in raster order (paper, section 2.2).

    Args:
        prior ([`DallePriorForCausalLM`] or [`DalleFamilyPriorForCausalLM`]):
            The model, of which `join_stream`, `new_cache`, `forward` and the sizes in its config are used.
        text_ids, attention_mask (`torch.LongTensor`): B x T, as the tokenizer gives them; the mask is 0 at pads.
        generators (`list[torch.Generator]`): B * n of them, from [`spawn_generators`].
        num_images_per_prompt (`int`): n; the images of a prompt are neighbours in the batch.
        image_prefix (`torch.LongTensor`, *optional*):
            The first k < N image tokens, kept as they are: B x k, or (B * n) x k for a prefix an image.
        guidance_scale (`float`):
            s, at least 1. Above 1 the logits are uncond + s * (cond - uncond), uncond given the negative text.
        negative_text_ids, negative_attention_mask (`torch.LongTensor`, *optional*): B x T; needed with guidance.
        temperature, top_k, top_p: see [`filter_logits`].

    Returns:
        An iterator of `(cell, tokens)`, one a drawn cell: `tokens` is the (B * n) x N buffer being filled, -1 where
        nothing was drawn. `tokens[:, cell]` may be changed before the next step, which goes on from there.

    Raises:
        ValueError: for a setting outside its range, or shapes that do not fit.
    """
    check_settings(temperature, top_k, top_p, guidance_scale)
    num_prompts, num_images = len(text_ids), len(text_ids) * num_images_per_prompt
    num_cells, prefix_length = prior.config.num_image_tokens, 0
    texts: list[Any] = [(text_ids, attention_mask)]
    if guidance_scale > 1:
        if negative_text_ids is None or negative_text_ids.shape != text_ids.shape:
            raise ValueError("A `guidance_scale` above 1 needs `negative_text_ids` of the shape of `text_ids`.")
        texts.append((negative_text_ids, negative_attention_mask))
    if image_prefix is not None:
        num_prefixes, prefix_length = image_prefix.shape
        if num_prefixes not in (num_prompts, num_images) or prefix_length >= num_cells:
            raise ValueError(
                f"`image_prefix` is {num_prefixes} x {prefix_length}; expected a row a prompt ({num_prompts}) or an"
                f" image ({num_images}), and fewer than the grid's {num_cells} tokens."
            )
        # With a prefix an image, each is a row of its own, of which the text is read once a prompt.
        repeats = num_prefixes // num_prompts
        texts = [[part.repeat_interleave(repeats, dim=0) for part in text] for text in texts]
    streams = [prior.join_stream(ids, mask, image_prefix)["input_ids"] for ids, mask in texts]
    if len(generators) != num_images:
        raise ValueError(f"There are {len(generators)} `generators` for {num_images} images.")
    num_texts = num_prompts * len(texts)
    # All of an image's numbers at once: a cell's does not depend on where drawing starts, nor on the batch.
    uniforms = torch.stack([torch.rand(num_cells, dtype=torch.float64, generator=child) for child in generators])
    tokens = torch.full((num_images, num_cells), -1, device=text_ids.device)
    if prefix_length:
        tokens[:, :prefix_length] = image_prefix.repeat_interleave(num_images // num_prefixes, dim=0)
    filters: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return _draw(prior, torch.cat(streams), num_texts, tokens, prefix_length, uniforms, guidance_scale, filters)


def kept_bytes(prior: DallePriorForCausalLM, device: torch.device | None = None) -> int:
    """Bytes, on one device or all, that are kept for the prior's next drawing, which uses them or frees them first."""
    cache = _kept_caches.get(prior)
    return cache.nbytes if cache is not None and (device is None or cache.layers[0].is_on(device)) else 0


def drop_kept(prior: DallePriorForCausalLM) -> None:
    """Frees the buffers that are kept for the prior's next drawing."""
    _kept_caches.pop(prior, None)


@torch.no_grad()
def _draw(
    prior: DallePriorForCausalLM,
    input_ids: torch.Tensor,
    num_texts: int,
    tokens: torch.Tensor,
    first_cell: int,
    uniforms: torch.Tensor,
    guidance_scale: float,
    filters: dict[str, Any],
) -> Iterator[tuple[int, torch.Tensor]]:
    num_images, num_cells = tokens.shape
    num_rows = num_images * (2 if guidance_scale > 1 else 1)  # the conditional ones, then the unconditional ones
    cache = _kept_caches.pop(prior, None)  # a drawing that goes on at the same time makes its own
    if cache is None or not cache.is_for(prior.config):
        cache = prior.new_cache()
    is_finite = True
    try:
        logits = _prefill(prior, input_ids, cache, num_texts, num_rows)
        uniforms = uniforms.to(logits.device)
        for cell in range(first_cell, num_cells):
            if guidance_scale > 1:
                cond, uncond = logits.chunk(2)
                logits = uncond + guidance_scale * (cond - uncond)
            is_finite = logits.isfinite().all() & is_finite
            # Looked at once a row: a device is not waited for at each cell.
            if (cell + 1) % prior.config.image_grid_size == 0 and not is_finite:
                raise ValueError(
                    f"The prior's logits up to cell {cell} are not finite; float16 may overflow, try bfloat16."
                )
            tokens[:, cell] = choose_tokens(filter_logits(logits, **filters), uniforms[:, cell])
            yield cell, tokens
            if cell + 1 < num_cells:
                logits = _decode_one(prior, tokens[:, cell].repeat(num_rows // num_images), cache)
    except Exception:
        is_finite = False  # or unknown: these buffers are not used again
        raise
    finally:
        if is_finite:
            _kept_caches[prior] = cache


def _prefill(
    prior: DallePriorForCausalLM, input_ids: torch.Tensor, cache: DalleCache, num_texts: int, num_rows: int
) -> torch.Tensor:
    """Reads each text once, and each prefix once; gives the next cell's logits, rows x image_vocab_size."""
    cache.reset()
    cache.num_images_per_prompt = num_rows // num_texts
    if len(input_ids) > num_texts:  # a prefix an image
        text_ids, input_ids = input_ids.tensor_split([prior.config.num_text_states], dim=1)
        prior(text_ids[:: len(text_ids) // num_texts], past_key_values=cache, use_cache=True, logits_to_keep=1)
    output = prior(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return to_float64(output.image_logits[:, -1]).repeat_interleave(num_rows // len(input_ids), dim=0)


def _decode_one(prior: DallePriorForCausalLM, tokens: torch.Tensor, cache: DalleCache) -> torch.Tensor:
    """Puts one image token a row into the cache; gives the next cell's logits, rows x image_vocab_size."""
    input_ids = tokens[:, None] + prior.config.image_token_offset
    output = prior(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return to_float64(output.image_logits[:, -1])


def to_float64(logits: torch.Tensor) -> torch.Tensor:
    """In float64, in which alone a draw is exact to the last token; on the CPU where the device, Apple's, lacks it."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()
