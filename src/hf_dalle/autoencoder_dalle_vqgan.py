"""The VQGAN (Esser et al., 2021) that several models of the DALL-E family draw with: f16 with 1,024 or 16,384 codes,
f8 with 8,192 codes chosen by logits (GumbelVQ).

Encoder and decoder are diffusers'; with `quantizer="nearest"` the weights have the names of diffusers' `VQModel`. That
model has no tokens in its interface and no logits for codes: hence a class of our own. Training one is not here.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .autoencoder_dalle import DalleAutoencoderMixin, DalleDecoderOutput, compare_codes, embed_codes


class DalleVQGANQuantizer(nn.Module):
    """The codes: `embedding`, and where logits choose among them `proj`, which gives these."""

    def __init__(self, vocab_size: int, codebook_dim: int, use_logits: bool):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, codebook_dim)
        self.proj = nn.Conv2d(codebook_dim, vocab_size, 1) if use_logits else None

    def forward(self, encoded: torch.Tensor) -> torch.Tensor:
        """B x D x h x w to logits B x K x h x w."""
        return self.proj(encoded) if self.proj is not None else compare_codes(self.embedding.weight, encoded)


class DalleVQGAN(DalleAutoencoderMixin, ModelMixin, ConfigMixin):
    r"""
    A VQGAN between pictures and image tokens. The defaults are the f16 model with 16,384 codes of taming-transformers,
    which minDALL-E draws with too.

    Args:
        sample_size (`int`): side of the pictures, in pixels.
        vocab_size (`int`): number of codes, K.
        block_out_channels (`tuple[int]`):
            Width of each resolution, from the finest, multiples of `norm_num_groups`; downsampling is two to the
            power of one less than their number.
        layers_per_block (`int`): resblocks at each resolution of the encoder; the decoder has one more.
        attention_levels (`tuple[int]`): resolutions with self-attention, as indices into `block_out_channels`.
        latent_channels (`int`): width of what the encoder gives and the decoder takes.
        codebook_dim (`int`): length of a code's vector.
        quantizer (`str`):
            "nearest" (the nearest code's vector), or "gumbel" (the code of the largest logit, to which taming's
            GumbelVQ adds noise in `encode` too).
        norm_num_groups (`int`): groups of the group norms.

    Raises:
        ValueError: where sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        vocab_size: int = 16384,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] = (4,),
        latent_channels: int = 256,
        codebook_dim: int = 256,
        quantizer: str = "nearest",
        norm_num_groups: int = 32,
    ):
        super().__init__()
        self._check_config()
        has_attention = [level in attention_levels for level in range(len(block_out_channels))]
        shared = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
        }
        self.encoder = Encoder(
            in_channels=3,
            out_channels=latent_channels,
            down_block_types=tuple("AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in has_attention),
            double_z=False,
            **shared,
        )
        self.quant_conv = nn.Conv2d(latent_channels, codebook_dim, 1)
        self.quantize = DalleVQGANQuantizer(vocab_size, codebook_dim, use_logits=quantizer == "gumbel")
        self.post_quant_conv = nn.Conv2d(codebook_dim, latent_channels, 1)
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=3,
            up_block_types=tuple(
                "AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(has_attention)
            ),
            **shared,
        )

    def _check_config(self) -> None:
        config = self.config
        widths, levels = config.block_out_channels, config.attention_levels
        if config.quantizer not in ("nearest", "gumbel"):
            raise ValueError(f"`quantizer` is {config.quantizer!r}; expected 'nearest' or 'gumbel'.")
        if not widths or any(width < 1 or width % config.norm_num_groups for width in widths):
            raise ValueError(
                f"`block_out_channels` are {list(widths)}; expected multiples of `norm_num_groups`,"
                f" {config.norm_num_groups}."
            )
        if not set(levels) <= set(range(len(widths))):
            raise ValueError(f"`attention_levels` are {list(levels)}; `block_out_channels` has {len(widths)}.")
        if config.sample_size < 1 or config.sample_size % self.downsampling_factor:
            raise ValueError(
                f"`sample_size` is {config.sample_size}, which the downsampling of {self.downsampling_factor} does not"
                " divide."
            )

    @property
    def downsampling_factor(self) -> int:
        """Pixels a side of one token's cell."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def widest_map(self) -> int:
        """How many numbers the decoder's widest map of a picture has."""
        widths, side = self.config.block_out_channels, self.config.sample_size
        # A resolution's first map comes upsampled from the one below, as wide as that.
        incoming = [*widths[1:], widths[-1]]
        pairs = zip(widths, incoming, strict=True)
        return max(max(pair) * (side // 2**level) ** 2 for level, pair in enumerate(pairs))

    def _compute_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.quantize(self.quant_conv(self.encoder(2 * pixel_values - 1)))

    def _decode(self, codes: torch.Tensor) -> DalleDecoderOutput:
        vectors = embed_codes(self.quantize.embedding.weight, codes)
        return DalleDecoderOutput(sample=(self.decoder(self.post_quant_conv(vectors)).clamp(-1, 1) + 1) / 2)

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True) -> DalleDecoderOutput | tuple:
        """Pictures through their tokens and back, as [`~DalleVQGAN.encode`] and [`~DalleVQGAN.decode`] say."""
        return self.decode(self.encode(pixel_values).tokens, return_dict)
