"""The discrete VAE that DALLE-pytorch trains: strided convolutions, plain resblocks at the coarsest resolution only.

The paper's own is `autoencoder_dalle_dvae.py`. Training this one is not in this package.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .autoencoder_dalle import DalleAutoencoderMixin, DalleDecoderOutput, embed_codes


class DalleDiscreteResnetBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(conv3x3(x)))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_3 = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.conv_3(F.relu(self.conv_2(F.relu(self.conv_1(hidden_states)))))


class DalleDiscreteEncoder(nn.Module):
    """Normalised pictures to logits B x K x h x w."""

    def __init__(self, vocab_size: int, hidden_channels: int, num_layers: int, num_resnet_blocks: int):
        super().__init__()
        widths = [3] + [hidden_channels] * num_layers
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.downsamplers = nn.ModuleList(nn.Conv2d(*pair, 4, stride=2, padding=1) for pair in pairs)
        self.resnets = nn.Sequential(*(DalleDiscreteResnetBlock(hidden_channels) for _ in range(num_resnet_blocks)))
        self.conv_out = nn.Conv2d(hidden_channels, vocab_size, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for downsampler in self.downsamplers:
            hidden_states = F.relu(downsampler(hidden_states))
        return self.conv_out(self.resnets(hidden_states))


class DalleDiscreteDecoder(nn.Module):
    """Vectors of codes, B x D x h x w, to normalised pictures."""

    def __init__(self, codebook_dim: int, hidden_channels: int, num_layers: int, num_resnet_blocks: int):
        super().__init__()
        # Without resblocks the first upsampling takes the codes themselves.
        self.conv_in = nn.Conv2d(codebook_dim, hidden_channels, 1) if num_resnet_blocks else None
        self.resnets = nn.Sequential(*(DalleDiscreteResnetBlock(hidden_channels) for _ in range(num_resnet_blocks)))
        widths = [hidden_channels if num_resnet_blocks else codebook_dim] + [hidden_channels] * num_layers
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.upsamplers = nn.ModuleList(nn.ConvTranspose2d(*pair, 4, stride=2, padding=1) for pair in pairs)
        self.conv_out = nn.Conv2d(hidden_channels, 3, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.conv_in is not None:
            hidden_states = self.conv_in(hidden_states)
        hidden_states = self.resnets(hidden_states)
        for upsampler in self.upsamplers:
            hidden_states = F.relu(upsampler(hidden_states))
        return self.conv_out(hidden_states)


class DalleDiscreteVAE(DalleAutoencoderMixin, ModelMixin, ConfigMixin):
    r"""
    DALLE-pytorch's `DiscreteVAE`, except that its own `decode` returns pictures as normalised as its input was.

    Args:
        sample_size (`int`): side of the pictures, in pixels.
        vocab_size (`int`): number of codes, K.
        codebook_dim (`int`): length of a code's vector.
        hidden_channels (`int`): width of all convolutions between.
        num_layers (`int`): halvings of the picture.
        num_resnet_blocks (`int`): on each side of the codes.
        pixel_mean, pixel_std (`tuple[float]`, *optional*):
            What pictures are normalised by, a number a channel; `None` for both is no normalisation.

    Raises:
        ValueError: where sizes do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        vocab_size: int = 512,
        codebook_dim: int = 512,
        hidden_channels: int = 64,
        num_layers: int = 3,
        num_resnet_blocks: int = 0,
        pixel_mean: tuple[float, ...] | None = (0.5, 0.5, 0.5),
        pixel_std: tuple[float, ...] | None = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        if num_layers < 1 or sample_size < 1 or sample_size % 2**num_layers:
            raise ValueError(f"`sample_size` is {sample_size}, which 2 ** {num_layers} (num_layers) does not divide.")
        if (pixel_mean is None) != (pixel_std is None) or (pixel_mean and not len(pixel_mean) == len(pixel_std) == 3):
            raise ValueError(
                f"`pixel_mean` is {pixel_mean} and `pixel_std` {pixel_std}: give three numbers each, or none."
            )
        self.encoder = DalleDiscreteEncoder(vocab_size, hidden_channels, num_layers, num_resnet_blocks)
        self.codebook = nn.Embedding(vocab_size, codebook_dim)
        self.decoder = DalleDiscreteDecoder(codebook_dim, hidden_channels, num_layers, num_resnet_blocks)

    @property
    def downsampling_factor(self) -> int:
        """Pixels a side of one token's cell."""
        return 2**self.config.num_layers

    @property
    def widest_map(self) -> int:
        """How many numbers the decoder's widest map of a picture has."""
        config = self.config
        return max(config.hidden_channels * config.sample_size**2, config.codebook_dim * self.image_grid_size**2)

    def _get_normalization(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, 3 x 1 x 1."""
        mean, std = self.config.pixel_mean or (0.0,) * 3, self.config.pixel_std or (1.0,) * 3
        return like.new_tensor(mean)[:, None, None], like.new_tensor(std)[:, None, None]

    def _compute_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        mean, std = self._get_normalization(pixel_values)
        return self.encoder((pixel_values - mean) / std)

    def _decode(self, codes: torch.Tensor) -> DalleDecoderOutput:
        normalized = self.decoder(embed_codes(self.codebook.weight, codes))
        mean, std = self._get_normalization(normalized)
        return DalleDecoderOutput(sample=(normalized * std + mean).clamp(0, 1))

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True) -> DalleDecoderOutput | tuple:
        """Pictures through their tokens and back, as `encode` and `decode` say."""
        return self.decode(self.encode(pixel_values).tokens, return_dict)
