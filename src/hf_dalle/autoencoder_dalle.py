"""What all autoencoders of pictures and image tokens share: `encode` and `decode`, loading, an honest configuration.

The models are `autoencoder_dalle_*.py`'s; what a pipeline asks of them is `encode(pixel_values).tokens`,
`decode(tokens).sample`, `image_grid_size`, `widest_map`, and `sample_size` and `vocab_size` in their `config`.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook


@dataclass
class DalleEncoderOutput(BaseOutput):
    """
    Output of an autoencoder's `encode`.

    Args:
        logits (`torch.Tensor`):
            B x K x h x w, unnormalised log-probabilities of the K codes in each cell; where the nearest code is
            taken, minus the squared distance to each.
        tokens (`torch.LongTensor`): B x h x w, the most probable code of each cell.
    """

    logits: torch.Tensor
    tokens: torch.Tensor


@dataclass
class DalleDecoderOutput(BaseOutput):
    """
    Output of an autoencoder's `decode`.

    Args:
        sample (`torch.Tensor`): B x 3 x H x W in [0, 1], the picture to show.
    """

    sample: torch.Tensor


class DalleAutoencoderMixin:
    """
    For a `ModelMixin` with `config.sample_size`, `config.vocab_size`, a `downsampling_factor`, and what `encode` and
    `decode` do behind their checks: `_compute_logits` and `_decode`.
    """

    config: Any

    @property
    def downsampling_factor(self) -> int:
        """Pixels a side of a token's cell."""
        raise NotImplementedError

    def _compute_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """B x 3 x H x W in [0, 1] to B x K x h x w, as [`DalleEncoderOutput`] has them."""
        raise NotImplementedError

    def _decode(self, codes: torch.Tensor) -> DalleDecoderOutput:
        """Tokens B x h x w or relaxed one-hot vectors B x K x h x w to pictures."""
        raise NotImplementedError

    @property
    def image_grid_size(self) -> int:
        """Tokens a side of a picture of `sample_size`."""
        return self.config.sample_size // self.downsampling_factor

    @apply_forward_hook
    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True) -> DalleEncoderOutput | tuple:
        """
        Pictures to image tokens.

        Args:
            pixel_values (`torch.Tensor`): B x 3 x H x W in [0, 1]; H and W multiples of the downsampling.
            return_dict (`bool`): `False` returns the tuple `(logits, tokens)`.

        Raises:
            ValueError: for pictures of another shape or range.
        """
        self.check_pixels(pixel_values)
        self.check_range(pixel_values)
        logits = self._compute_logits(pixel_values)
        output = DalleEncoderOutput(logits=logits, tokens=logits.argmax(dim=1))
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def decode(self, codes: torch.Tensor, return_dict: bool = True) -> DalleDecoderOutput | tuple:
        """
        Image tokens to pictures.

        Args:
            codes (`torch.Tensor`): tokens, B x h x w integers in [0, K), or relaxed one-hot vectors, B x K x h x w.
            return_dict (`bool`): `False` returns the output as a tuple.

        Raises:
            ValueError: for codes of another shape, or tokens outside [0, K).
        """
        self.check_codes(codes)
        output = self._decode(codes)
        return output if return_dict else output.to_tuple()

    def check_pixels(self, pixel_values: torch.Tensor) -> None:
        """Raises `ValueError` for what is no batch of floating-point pictures of whole cells."""
        shape, factor = pixel_values.shape, self.downsampling_factor
        is_whole = len(shape) == 4 and shape[1] == 3 and shape[2] % factor == shape[3] % factor == 0
        if not (is_whole and pixel_values.is_floating_point()):
            raise ValueError(
                "`pixel_values` must be floats B x 3 x H x W, where H and W are multiples of the downsampling of"
                f" {factor}; got {tuple(shape)} of {pixel_values.dtype}."
            )

    def check_range(self, pixel_values: torch.Tensor) -> None:
        """Raises `ValueError` for values outside [0, 1]."""
        lowest, highest = pixel_values.aminmax()
        if not (lowest >= 0 and highest <= 1):  # also where they are NaN
            raise ValueError(f"`pixel_values` must lie in [0, 1], not [-1, 1]; got {lowest:g} to {highest:g}.")

    def check_codes(self, codes: torch.Tensor) -> None:
        """Raises `ValueError` for what is neither B x h x w tokens in [0, K) nor B x K x h x w one-hot vectors."""
        vocab_size = self.config.vocab_size
        is_relaxed = codes.is_floating_point() and codes.ndim == 4 and codes.shape[1] == vocab_size
        is_tokens = codes.dtype in (torch.int64, torch.int32) and codes.ndim == 3
        if not (is_relaxed or is_tokens):
            raise ValueError(
                f"`decode` takes tokens (int64, B x h x w) or relaxed one-hot vectors (B x {vocab_size} x h x w); got"
                f" {tuple(codes.shape)} of {codes.dtype}."
            )
        if is_tokens and (codes.min() < 0 or codes.max() >= vocab_size):
            raise ValueError(f"Image tokens must lie in [0, {vocab_size}); got {codes.min()} to {codes.max()}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, output_loading_info: bool = False, **kwargs):
        """As [`ModelMixin.from_pretrained`], but weights that a file lacks are an `OSError`, not drawn at random."""
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise OSError(f"{pretrained_model_name_or_path} lacks weights of this model: {missing}.")
        return (model, info) if output_loading_info else model

    def to_json_string(self) -> str:
        """The content of config.json, without the place that this model was loaded from."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]  # `ModelMixin`'s
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def embed_codes(weight: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Tokens B x h x w or relaxed one-hot vectors B x K x h x w to vectors B x D x h x w, by weights K x D."""
    if codes.is_floating_point():
        return torch.einsum("bkhw,kd->bdhw", codes, weight)
    return weight[codes].movedim(-1, 1)


def compare_codes(weight: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
    """Minus the squared distance of each cell to each code: B x D x h x w and K x D -> B x K x h x w."""
    cross = torch.einsum("bdhw,kd->bkhw", encoded, weight)
    return 2 * cross - encoded.square().sum(1, keepdim=True) - weight.square().sum(1)[:, None, None]
