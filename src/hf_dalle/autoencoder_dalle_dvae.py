"""The discrete VAE of stage 1: encoder, quantizer and decoder between pictures and grids of image tokens.

`DalleDVAE` with `quantizer="gumbel"` is the paper's dVAE (section 2.1, appendix A); `quantizer="nearest"` is VQ-VAE
(van den Oord et al., 2017). The losses live in `losses.py`, the schedules of temperature and beta in `training/`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .autoencoder_dalle import DalleAutoencoderMixin, DalleDecoderOutput, compare_codes, embed_codes
from .logit_laplace import map_pixels, unmap_pixels


@dataclass
class DalleDVAEDecoderOutput(DalleDecoderOutput):
    """
    Output of [`DalleDVAE.decode`].

    Args:
        sample (`torch.Tensor`): B x 3 x H x W in [0, 1], the picture to show: phi^-1(sigmoid(mu)).
        mu (`torch.Tensor`): B x 3 x H x W, location of the logit-Laplace distribution.
        log_b (`torch.Tensor`): B x 3 x H x W, log of its scale.
    """

    mu: torch.Tensor | None = None  # never None, but accelerate makes outputs anew from a dict as the first argument
    log_b: torch.Tensor | None = None


@dataclass
class DalleDVAEOutput(DalleDVAEDecoderOutput):
    """
    Output of [`DalleDVAE.forward`]: the decoder's maps for the relaxed codes, with the encoder's logits and tokens.

    Args:
        logits (`torch.Tensor`): B x K x h x w, from the encoder.
        tokens (`torch.LongTensor`): B x h x w, their argmax.
        commitment_loss (`torch.Tensor`): scalar, to be added to the loss; zero with `quantizer="gumbel"`.
    """

    logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None


class DalleConv2d(nn.Conv2d):
    """A convolution that keeps the picture's size; its weights begin as N(0, 1 / fan_in), its bias as 0."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2)

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_channels * self.kernel_size[0] ** 2))
        nn.init.zeros_(self.bias)


class DalleCodeConv2d(DalleConv2d):
    """The 1x1 convolution of a map of codes; of tokens, the look-up that equals it on their one-hot vectors."""

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        if codes.is_floating_point():
            return super().forward(codes)
        # tokens B x h x w, each a column of the C x K weights -> C x B x h x w -> B x C x h x w
        return self.weight[:, :, 0, 0][:, codes].movedim(0, 1) + self.bias[:, None, None]


class DalleEncoderBlock(nn.Module):
    """Bottleneck resblock: id(x) + residual_scale * res(x), where res is three 3x3 convolutions and then a 1x1."""

    def __init__(self, in_channels: int, out_channels: int, residual_scale: float):
        super().__init__()
        hidden_channels = out_channels // 4
        self.residual_scale = residual_scale
        self.shortcut = DalleConv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.conv_1 = DalleConv2d(in_channels, hidden_channels, 3)
        self.conv_2 = DalleConv2d(hidden_channels, hidden_channels, 3)
        self.conv_3 = DalleConv2d(hidden_channels, hidden_channels, 3)
        self.conv_4 = DalleConv2d(hidden_channels, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        for convolution in (self.conv_1, self.conv_2, self.conv_3, self.conv_4):
            residual = convolution(F.relu(residual))
        return torch.add(self.shortcut(hidden_states), residual, alpha=self.residual_scale)


class DalleDecoderBlock(nn.Module):
    """Bottleneck resblock: id(x) + residual_scale * res(x), where res is a 1x1 convolution and then three 3x3."""

    def __init__(self, in_channels: int, out_channels: int, residual_scale: float, use_upsample: bool):
        super().__init__()
        hidden_channels = out_channels // 4
        self.residual_scale = residual_scale
        self.use_upsample = use_upsample
        self.shortcut = DalleConv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.conv_1 = DalleConv2d(in_channels, hidden_channels, 1)
        self.conv_2 = DalleConv2d(hidden_channels, hidden_channels, 3)
        self.conv_3 = DalleConv2d(hidden_channels, hidden_channels, 3)
        self.conv_4 = DalleConv2d(hidden_channels, out_channels, 3)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # The paper upsamples before the block. Pointwise maps commute with nearest-neighbour upsampling, so those
        # that open the block run first, on a quarter of the pixels: the same numbers for less work.
        residual = self.conv_1(F.relu(hidden_states))
        hidden_states = self.shortcut(hidden_states)
        if self.use_upsample:
            residual = F.interpolate(residual, scale_factor=2.0, mode="nearest")
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        for convolution in (self.conv_2, self.conv_3, self.conv_4):
            residual = convolution(F.relu(residual))
        return torch.add(hidden_states, residual, alpha=self.residual_scale)


class DalleGroup(nn.Sequential):
    """The resblocks of one resolution; gradient checkpointing keeps what goes into a group and nothing inside it."""

    gradient_checkpointing = False  # set by `ModelMixin`, with the function to call

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(super().forward, hidden_states)
        return super().forward(hidden_states)


class DalleEncoder(nn.Module):
    """Pictures in (eps, 1 - eps) to a map of `out_channels` a cell; max-pooling between the groups."""

    def __init__(self, out_channels: int, block_out_channels: tuple[int, ...], layers_per_block: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        residual_scale = 1 / (len(block_out_channels) * layers_per_block) ** 2
        self.conv_in = DalleConv2d(3 * patch_size**2, block_out_channels[0], 7)
        self.groups = nn.ModuleList()
        in_channels = block_out_channels[0]
        for channels in block_out_channels:
            blocks = []
            for _ in range(layers_per_block):
                blocks.append(DalleEncoderBlock(in_channels, channels, residual_scale))
                in_channels = channels
            self.groups.append(DalleGroup(*blocks))
        self.conv_out = DalleConv2d(in_channels, out_channels, 1)

    def forward(self, mapped: torch.Tensor) -> torch.Tensor:
        # B x 3 x H x W -> B x 3 s^2 x H/s x W/s; channels last in memory, which all layers keep, is faster on CPUs
        patches = F.pixel_unshuffle(mapped, self.patch_size).contiguous(memory_format=torch.channels_last)
        hidden_states = self.conv_in(patches)
        for index, group in enumerate(self.groups):
            hidden_states = group(F.max_pool2d(hidden_states, kernel_size=2) if index > 0 else hidden_states)
        return self.conv_out(F.relu(hidden_states))


class DalleDecoder(nn.Module):
    """Tokens or a map of codes to the six maps mu and ln b; nearest-neighbour upsampling between the groups."""

    def __init__(
        self,
        in_channels: int,
        init_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        patch_size: int,
    ):
        super().__init__()
        self.patch_size = patch_size
        residual_scale = 1 / (len(block_out_channels) * layers_per_block) ** 2
        self.conv_in = DalleCodeConv2d(in_channels, init_channels, 1)
        self.groups = nn.ModuleList()
        in_channels = init_channels
        for index, channels in enumerate(block_out_channels):
            blocks = []
            for layer in range(layers_per_block):
                use_upsample = index > 0 and layer == 0
                blocks.append(DalleDecoderBlock(in_channels, channels, residual_scale, use_upsample))
                in_channels = channels
            self.groups.append(DalleGroup(*blocks))
        self.conv_out = DalleConv2d(in_channels, 6 * patch_size**2, 1)

    def forward(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens B x h x w or a map B x C x h x w to `(mu, log_b)`, each B x 3 x H x W."""
        hidden_states = self.conv_in(codes).contiguous(memory_format=torch.channels_last)  # as in the encoder
        for group in self.groups:
            hidden_states = group(hidden_states)
        # B x 6 s^2 x H/s x W/s -> B x 6 x H x W
        maps = F.pixel_shuffle(self.conv_out(F.relu(hidden_states)), self.patch_size)
        return maps[:, :3], maps[:, 3:]


class DalleCodebook(nn.Module):
    """The codebook of VQ-VAE: nearest codes, and their update by exponential moving averages instead of a gradient."""

    def __init__(self, vocab_size: int, codebook_dim: int, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.randn(vocab_size, codebook_dim))
        self.register_buffer("ema_count", torch.ones(vocab_size))
        self.register_buffer("ema_sum", self.codes.clone())

    def forward(self, encoded: torch.Tensor) -> torch.Tensor:
        """Minus the squared distance of each cell to each code: B x D x h x w -> B x K x h x w."""
        return compare_codes(self.codes, encoded)

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Tokens B x h x w or relaxed one-hot vectors B x K x h x w to code vectors B x D x h x w."""
        return embed_codes(self.codes, codes)

    @torch.no_grad()
    def update(self, encoded: torch.Tensor, tokens: torch.Tensor):
        """One step of the moving averages, over all processes' cells."""
        flat, flat_tokens = encoded.movedim(1, -1).flatten(0, 2).float(), tokens.flatten()  # (B h w) x D, (B h w)
        count = torch.zeros_like(self.ema_count).index_add_(0, flat_tokens, torch.ones_like(flat[:, 0]))
        total = torch.zeros_like(self.ema_sum).index_add_(0, flat_tokens, flat)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
            torch.distributed.all_reduce(total)
        self.ema_count.lerp_(count, 1 - self.decay)
        self.ema_sum.lerp_(total, 1 - self.decay)
        # Laplace smoothing keeps the division finite for codes that nothing uses.
        num_cells = self.ema_count.sum()
        smoothed = (self.ema_count + 1e-5) / (num_cells + 1e-5 * len(self.ema_count)) * num_cells
        self.codes.copy_(self.ema_sum / smoothed[:, None])


class DalleDVAE(DalleAutoencoderMixin, ModelMixin, ConfigMixin):
    r"""
    The discrete VAE of DALL-E (paper, section 2.1). The defaults are OpenAI's released model: 256 x 256 pictures,
    32 x 32 tokens out of 8192. Downsampling is `patch_size * 2 ** (len(encoder_block_out_channels) - 1)`.

    Args:
        sample_size (`int`): side of the pictures that the model was trained on, in pixels.
        vocab_size (`int`): number of codes, K.
        encoder_block_out_channels (`tuple[int]`): width of each group of the encoder, multiples of 4.
        decoder_block_out_channels (`tuple[int]`): width of each group of the decoder, as many.
        decoder_in_channels (`int`): width of the decoder's first 1x1 convolution.
        layers_per_block (`int`): resblocks a group.
        patch_size (`int`): 1 is the paper; s > 1 folds s x s pixels into channels on both ends, for slow machines.
        quantizer (`str`): "gumbel" (categorical, relaxed by gumbel-softmax) or "nearest" (VQ-VAE).
        codebook_dim (`int`, *optional*): with "nearest", the length of a code vector; needed there, unused otherwise.
        commitment_cost (`float`): with "nearest", weight of the commitment loss.
        codebook_decay (`float`): with "nearest", decay of the codebook's moving averages.
        logit_laplace_eps (`float`): eps of the pixel map phi, in (0, 0.5).

    Raises:
        ValueError: where sizes do not fit each other.
    """

    _no_split_modules = ["DalleEncoderBlock", "DalleDecoderBlock"]
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        vocab_size: int = 8192,
        encoder_block_out_channels: tuple[int, ...] = (256, 512, 1024, 2048),
        decoder_block_out_channels: tuple[int, ...] = (2048, 1024, 512, 256),
        decoder_in_channels: int = 128,
        layers_per_block: int = 2,
        patch_size: int = 1,
        quantizer: str = "gumbel",
        codebook_dim: int | None = None,
        commitment_cost: float = 0.25,
        codebook_decay: float = 0.99,
        logit_laplace_eps: float = 0.1,
    ):
        super().__init__()
        self._check_config()
        code_channels = vocab_size if quantizer == "gumbel" else codebook_dim
        self.encoder = DalleEncoder(code_channels, encoder_block_out_channels, layers_per_block, patch_size)
        if quantizer == "nearest":
            self.codebook = DalleCodebook(vocab_size, codebook_dim, codebook_decay)
        self.decoder = DalleDecoder(
            code_channels, decoder_in_channels, decoder_block_out_channels, layers_per_block, patch_size
        )

    def _check_config(self):
        config = self.config
        if config.quantizer not in ("gumbel", "nearest"):
            raise ValueError(f"`quantizer` is {config.quantizer!r}; expected 'gumbel' or 'nearest'.")
        if config.quantizer == "nearest" and not config.codebook_dim:
            raise ValueError("`quantizer='nearest'` needs `codebook_dim`, the length of a code vector.")
        encoder, decoder = config.encoder_block_out_channels, config.decoder_block_out_channels
        if len(encoder) != len(decoder) or not encoder or any(width % 4 for width in (*encoder, *decoder)):
            raise ValueError(
                "`encoder_block_out_channels` and `decoder_block_out_channels` must be of one length, of multiples of"
                f" 4; got {list(encoder)} and {list(decoder)}."
            )
        if min(config.layers_per_block, config.patch_size, config.vocab_size, config.decoder_in_channels) < 1:
            raise ValueError("`layers_per_block`, `patch_size`, `vocab_size` and `decoder_in_channels` start at 1.")
        if config.sample_size < 1 or config.sample_size % self.downsampling_factor:
            raise ValueError(
                f"`sample_size` is {config.sample_size}, which the downsampling of {self.downsampling_factor}"
                f" (patch_size {config.patch_size} * 2 ** {len(encoder) - 1}) does not divide."
            )
        if not 0 < config.logit_laplace_eps < 0.5:
            raise ValueError(f"`logit_laplace_eps` is {config.logit_laplace_eps}; expected a number in (0, 0.5).")

    @property
    def downsampling_factor(self) -> int:
        """Pixels a side of one token's cell."""
        return self.config.patch_size * 2 ** (len(self.config.encoder_block_out_channels) - 1)

    @property
    def widest_map(self) -> int:
        """How many numbers the decoder's widest map of a picture has."""
        widths = enumerate(self.config.decoder_block_out_channels)  # each twice the resolution of the one before
        return max(width * (self.image_grid_size * 2**doublings) ** 2 for doublings, width in widths)

    def _encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's output map and the logits made of it: the same tensor with "gumbel"."""
        encoded = self.encoder(map_pixels(pixel_values, self.config.logit_laplace_eps))
        return encoded, self.codebook(encoded) if self.config.quantizer == "nearest" else encoded

    def _compute_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._encode(pixel_values)[1]

    def _decode(self, codes: torch.Tensor) -> DalleDVAEDecoderOutput:
        codes = self.codebook.embed(codes) if self.config.quantizer == "nearest" else codes
        return DalleDVAEDecoderOutput(**self._compute_maps(codes))

    def _compute_maps(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        mu, log_b = self.decoder(codes)
        return {"sample": unmap_pixels(torch.sigmoid(mu), self.config.logit_laplace_eps), "mu": mu, "log_b": log_b}

    def forward(
        self,
        pixel_values: torch.Tensor,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DalleDVAEOutput | tuple:
        """
        The relaxed pass of training: encode, sample relaxed codes, decode.

        Args:
            pixel_values (`torch.Tensor`): B x 3 x H x W in [0, 1].
            temperature (`float`): tau of the gumbel-softmax, above 0; towards 0 the codes become one-hot samples.
                Unused with `quantizer="nearest"`, whose gradient passes straight through.
            generator (`torch.Generator`, *optional*): source of the gumbel noise, on the model's device.
            return_dict (`bool`): `False` returns a tuple in the order of [`DalleDVAEOutput`].
        """
        if temperature <= 0:
            raise ValueError(f"`temperature` is {temperature}; the gumbel-softmax needs one above 0.")
        self.check_pixels(pixel_values)
        encoded, logits = self._encode(pixel_values)
        tokens = logits.argmax(dim=1)
        commitment_loss = logits.new_zeros(())
        if self.config.quantizer == "nearest":
            quantized = self.codebook.embed(tokens)
            commitment_loss = self.config.commitment_cost * F.mse_loss(encoded, quantized)
            codes = encoded + (quantized - encoded).detach()  # straight-through
            if self.training:
                self.codebook.update(encoded, tokens)
        else:
            codes = gumbel_softmax(logits, temperature, generator)
        maps = self._compute_maps(codes)
        output = DalleDVAEOutput(**maps, logits=logits, tokens=tokens, commitment_loss=commitment_loss)
        return output if return_dict else output.to_tuple()


def gumbel_softmax(logits: torch.Tensor, temperature: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    A relaxed one-hot sample of the categorical of `logits` over dim 1, softmax((logits + gumbel) / temperature)
    (Jang et al. and Maddison et al., 2016). In float32 whatever the dtype, since small temperatures overflow halves.
    """
    noise = -torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator).log()
    return F.softmax((logits.float() + noise) / temperature, dim=1).to(logits.dtype)
