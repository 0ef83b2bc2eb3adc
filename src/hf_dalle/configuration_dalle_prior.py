"""`DallePriorConfig`: every number that gives the prior its shape, the paper's attention layout, and named presets.

The layout of ids in the joint vocabulary is derived here, in one place. What the numbers mean to a forward pass lives
in `modeling_dalle_prior.py`.
"""

from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .image_attention import ATTENTION_TYPES


_PRESETS: dict[str, dict[str, Any]] = {
    "12b": {"hidden_size": 3968, "num_hidden_layers": 64, "num_attention_heads": 62},
    "1.2b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32},
    "emoji-mini": {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "text_length": 32,
        "text_vocab_size": 3072,
        "image_grid_size": 12,
        "image_vocab_size": 1024,
        "attention_types": ["full"] * 8,
    },
}


def paper_attention_types(num_hidden_layers: int) -> list[str]:
    """The paper's layout: of layers 1, 2, ... every fourth from the second is column, the last conv, the rest row."""
    layers = range(1, num_hidden_layers)
    return ["column" if (layer - 2) % 4 == 0 else "row" for layer in layers] + ["conv"]


def check_shape(config: Any, sizes: Sequence[str], attention_types: Sequence[str]) -> None:
    """Raises `ValueError` where a prior has one of `sizes` below 1, a type beside these, or a kernel that is even."""
    for name in (*sizes, "text_vocab_size", "text_length", "image_vocab_size", "image_grid_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(config, name)}.")
    unknown = sorted(set(config.attention_types) - set(attention_types))
    if unknown:
        raise ValueError(
            f"`attention_types` holds {', '.join(map(repr, unknown))}; the valid ones are "
            f"{', '.join(attention_types)}."
        )
    if len(config.attention_types) != config.num_hidden_layers:
        raise ValueError(
            f"`attention_types` must name one type for each of the {config.num_hidden_layers} layers, got "
            f"{len(config.attention_types)} of them."
        )
    if config.conv_kernel_size < 1 or config.conv_kernel_size % 2 == 0:
        raise ValueError(f"`conv_kernel_size` must be a positive odd number, got {config.conv_kernel_size}.")


@strict
class DallePriorConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DallePriorModel`], the transformer over one stream of text and image tokens (paper, section
    2.2). The defaults are the `"1.2b"` preset; [`~DallePriorConfig.from_preset`] has the others.

    The joint vocabulary holds, in this order: the tokenizer's ids, one pad id for each text position, start-of-image,
    and the image tokens.

    Args:
        hidden_size (`int`, *optional*, defaults to 2048): width of the residual stream.
        num_hidden_layers (`int`, *optional*, defaults to 24): number of layers.
        num_attention_heads (`int`, *optional*, defaults to 32): heads a layer; must divide `hidden_size`.
        intermediate_size (`int`, *optional*): width inside the MLP; `None` means `4 * hidden_size`.
        text_vocab_size (`int`, *optional*, defaults to 16384): number of ids of the tokenizer.
        text_length (`int`, *optional*, defaults to 256): number of text positions, start-of-text included.
        image_vocab_size (`int`, *optional*, defaults to 8192): number of codes of the image tokenizer.
        image_grid_size (`int`, *optional*, defaults to 32): side of the square grid of image tokens.
        attention_types (`list[str]`, *optional*):
            One of `"full"`, `"row"`, `"column"`, `"conv"` for each layer; `None` means the paper's layout.
        conv_kernel_size (`int`, *optional*, defaults to 11): odd side of the window of `"conv"` layers.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): activation of the MLP.
        hidden_dropout (`float`, *optional*, defaults to 0.0): dropout on what a layer adds to the residual stream.
        attention_dropout (`float`, *optional*, defaults to 0.0): dropout on attention weights.
        embedding_dropout (`float`, *optional*, defaults to 0.0): dropout on the embeddings.
        layer_norm_eps (`float`, *optional*, defaults to 1e-05): epsilon of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of initial weights; projections back to the residual stream are divided by
            `sqrt(2 * num_hidden_layers)`.
        text_loss_weight (`float`, *optional*, defaults to 0.125): weight of the text loss; the image has the rest.
        caption_dropout (`float`, *optional*, defaults to 0.0):
            The share of captions that training dropped, a record: guidance and the empty prompt need it above 0.
        use_cache (`bool`, *optional*, defaults to `True`): whether the model returns keys and values.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): whether the head shares the token embedding.
        bos_token_id (`int`, *optional*, defaults to 0): start-of-text, which the tokenizer puts first.
        pad_token_id (`int`, *optional*): stays `None`; pads are learned and attended to like any token.
        eos_token_id (`int`, *optional*): stays `None`; an image ends where its grid does.

    Raises:
        `ValueError`: for an unknown attention type, a list of them of the wrong length, heads that do not divide the
            width, an even kernel, a size that is not positive, or a share outside [0, 1].
    """

    model_type = "dalle_prior"
    keys_to_ignore_at_inference = ["past_key_values"]

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    intermediate_size: int | None = None
    text_vocab_size: int = 16384
    text_length: int = 256
    image_vocab_size: int = 8192
    image_grid_size: int = 32
    attention_types: list[str] | None = None
    conv_kernel_size: int = 11
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    text_loss_weight: float | int = 1 / 8
    caption_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int = 0
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.attention_types is None:
            self.attention_types = paper_attention_types(self.num_hidden_layers)
        super().__post_init__(**kwargs)
        # The strict dataclass runs this too, but hides the ValueError inside an exception of its own.
        self.validate_architecture()

    def validate_architecture(self):
        """Raises `ValueError` for numbers that give no model."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        check_shape(self, sizes, ATTENTION_TYPES)
        shares = ("hidden_dropout", "attention_dropout", "embedding_dropout", "text_loss_weight", "caption_dropout")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must divide `hidden_size` ({self.hidden_size})."
            )

    @classmethod
    def from_preset(cls, name: str, **kwargs) -> "DallePriorConfig":
        """
        A configuration by name.

        Args:
            name (`str`): `"12b"` (the paper's), `"1.2b"` or `"emoji-mini"`.
            kwargs: fields that override the preset's.

        Raises:
            `ValueError`: for an unknown name.
        """
        if name not in _PRESETS:
            raise ValueError(f"Unknown preset {name!r}. The valid ones are {', '.join(_PRESETS)}.")
        return cls(**{**_PRESETS[name], **kwargs})

    @property
    def pad_token_offset(self) -> int:
        """The pad id of text position t is `pad_token_offset + t`."""
        return self.text_vocab_size

    @property
    def image_start_token_id(self) -> int:
        """Start-of-image; the ids below it are all that a text state can predict."""
        return self.pad_token_offset + self.text_length

    @property
    def image_token_offset(self) -> int:
        """Image token k has the id `image_token_offset + k`."""
        return self.image_start_token_id + 1

    @property
    def vocab_size(self) -> int:
        """Size of the joint vocabulary."""
        return self.image_token_offset + self.image_vocab_size

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_text_states(self) -> int:
        """Number of text states: the first states of a stream, which the pictures of a caption share."""
        return self.text_length

    @property
    def num_shared_states(self) -> int:
        """Number of text states that all later states see: all of them."""
        return self.num_text_states

    @property
    def num_image_tokens(self) -> int:
        """Number of image tokens, and of image states."""
        return self.image_grid_size**2

    @property
    def stream_length(self) -> int:
        """Number of states: one for each text position, then one for each image token that they predict."""
        return self.text_length + self.num_image_tokens


__all__ = ["DallePriorConfig"]
