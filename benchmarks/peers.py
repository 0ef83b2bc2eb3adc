"""The contenders that other projects made, with random weights: transformers' Llama, DALLE-pytorch, OpenAI's DALL-E.

Each draws or decodes through calls of its own. None is a dependency: a builder raises `ImportError`, with how to
install, where its package is not there. What is timed lives in the scripts beside this file.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from hf_dalle import DalleDVAE, DallePriorConfig


def build_llama(config: DallePriorConfig) -> LlamaForCausalLM:
    """A Llama of the prior's width, depth, heads, vocabulary and, though its MLP has three matrices, weights."""
    inner_size = 2 * config.intermediate_size // 3
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=max(inner_size - inner_size % 8, 8),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.stream_length,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(llama).eval()


def draw_with_llama(model: LlamaForCausalLM, input_ids: torch.Tensor, num_images: int) -> Iterator[torch.Tensor]:
    """
    Reads the 1 x k `input_ids` into a static cache when first asked, then draws a token for each image each time, by
    the model's forward and one draw, without what `generate()` does around them.
    """
    cache = StaticCache(model.config, max_cache_len=model.config.max_position_embeddings)
    with torch.no_grad():
        logits = model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        for layer in cache.layers:
            layer.keys, layer.values = (
                part.repeat_interleave(num_images, dim=0) for part in (layer.keys, layer.values)
            )
        tokens = logits.softmax(dim=-1).repeat_interleave(num_images, dim=0).multinomial(1)
    while True:
        yield tokens
        with torch.no_grad():
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            tokens = logits.softmax(dim=-1).multinomial(1)


def build_dalle_pytorch(config: DallePriorConfig) -> nn.Module:
    """A DALLE-pytorch of the prior's sizes with full attention, all else as its authors set it."""
    try:
        from dalle_pytorch import DALLE, DiscreteVAE
    except ImportError as error:
        raise ImportError(f"DALLE-pytorch does not import ({error}); `pip install dalle-pytorch==1.6.6`.") from error
    if config.image_grid_size & (config.image_grid_size - 1):
        raise ValueError(f"DALLE-pytorch has only grids of a power of 2, not of {config.image_grid_size}.")
    # The smallest VAE of the prior's grid and vocabulary: only its sizes are read.
    vae = DiscreteVAE(
        image_size=2 * config.image_grid_size,
        num_layers=1,
        num_tokens=config.image_vocab_size,
        codebook_dim=4,
        hidden_dim=4,
    )
    return DALLE(
        dim=config.hidden_size,
        vae=vae,
        num_text_tokens=config.text_vocab_size,
        text_seq_len=config.text_length,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        dim_head=config.hidden_size // config.num_attention_heads,
    ).eval()


def draw_with_dalle_pytorch(
    model: nn.Module, text_ids: torch.Tensor, image_tokens: torch.Tensor, num_images: int
) -> Iterator[torch.Tensor]:
    """
    What its `generate_images` does from the 1 x k `image_tokens` on, but with the cache handed to `forward`:
    `forward_with_cond_scale` drops it where there is no guidance. The images of a prompt are rows from the start.
    """
    text_ids, image_tokens = (ids.repeat(num_images, 1) for ids in (text_ids, image_tokens))
    cache = {}
    while True:
        with torch.no_grad():
            logits = model(text_ids, image_tokens, cache=cache)[:, -1]
            # Its vocabulary ends with the image tokens, and all others are masked out.
            tokens = logits.softmax(dim=-1).multinomial(1) - model.num_text_tokens
        image_tokens = torch.cat([image_tokens, tokens], dim=1)
        yield tokens


def build_openai_dvae(dvae: DalleDVAE) -> tuple[Callable, Callable]:
    """
    OpenAI's encoder and decoder with the weights of `dvae`, which is of their layout: four groups.

    Returns:
        `tuple[Callable, Callable]`: pictures in [0, 1] to logits, and tokens to pictures in [0, 1].
    """
    try:
        import dall_e
    except ImportError as error:
        how = "`pip install --no-deps DALL-E==0.1` and `pip install attrs blobfile`"
        raise ImportError(f"OpenAI's DALL-E does not import ({error}); {how}.") from error
    config = dvae.config
    sizes = {"vocab_size": config.vocab_size, "n_blk_per_group": config.layers_per_block}
    encoder = dall_e.Encoder(n_hid=config.encoder_block_out_channels[0], **sizes).eval()
    decoder = dall_e.Decoder(
        n_hid=config.decoder_block_out_channels[-1], n_init=config.decoder_in_channels, **sizes
    ).eval()
    for part, theirs in ((dvae.encoder, encoder), (dvae.decoder, decoder)):
        theirs.load_state_dict({_openai_key(name): value for name, value in part.state_dict().items()})

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        return encoder(dall_e.map_pixels(pixel_values))

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        codes = F.one_hot(tokens, config.vocab_size).movedim(-1, 1).float()
        return dall_e.unmap_pixels(torch.sigmoid(decoder(codes)[:, :3]))

    return encode, decode


def _openai_key(name: str) -> str:
    """`groups.1.0.conv_2.weight` is `blocks.group_2.block_1.res_path.conv_2.w` there."""
    *place, kind = name.split(".")
    if place[0] == "groups":
        _, group, block, layer = place
        path = "id_path" if layer == "shortcut" else f"res_path.{layer}"
        where = f"group_{int(group) + 1}.block_{int(block) + 1}.{path}"
    else:
        where = {"conv_in": "input", "conv_out": "output.conv"}[place[0]]
    return f"blocks.{where}.{kind[0]}"
