"""`DalleFamilyPriorConfig`: the shapes of the priors of DALL-E's public reimplementations, which left the paper's.

Each field that is a choice is one that a published checkpoint or a published program makes: DALLE-pytorch, ruDALL-E
or minDALL-E. What the fields mean to a forward pass lives in `modeling_family_prior.py`.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .bordered_attention import BORDERED_TYPES
from .configuration_dalle_prior import check_shape


FAMILY_ATTENTION_TYPES = ("full", "row", "column", *BORDERED_TYPES)


@strict
class DalleFamilyPriorConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DalleFamilyPriorForCausalLM`]. `conversion/` makes it from a checkpoint of another program;
    none of its priors is the paper's, which is [`DallePriorConfig`]'s.

    The stream has no start-of-image: the last text state predicts the first image token, and the state at a cell reads
    that cell's own token. The joint vocabulary holds the tokenizer's ids, a pad id for each text position where
    `use_position_pads`, and the image tokens.

    Args:
        hidden_size (`int`): width of the residual stream.
        num_hidden_layers (`int`): number of layers.
        num_attention_heads (`int`): heads a layer.
        head_dim (`int`, *optional*): width of a head; `None` means `hidden_size / num_attention_heads`.
        intermediate_size (`int`, *optional*): width inside the MLP; `None` means `4 * hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP; `"geglu"` is half of a twice as wide layer times the gelu of the other half.
        text_vocab_size (`int`): number of ids of the tokenizer.
        text_length (`int`): number of ids of a caption.
        start_token_id (`int`, *optional*):
            Id that the prior puts before each caption, as DALLE-pytorch does; the tokenizer then has no start-of-text.
        use_position_pads (`bool`, *optional*, defaults to `True`):
            Whether pads, and text id 0 wherever it stands, become the id of their position; else pads are the
            tokenizer's own, a token like any other.
        image_vocab_size (`int`): number of codes of the image tokenizer.
        image_grid_size (`int`): side of the square grid of image tokens.
        attention_types (`list[str]`, *optional*):
            One of `"full"`, `"row"`, `"column"` (as in `image_attention.py`), `"axial_row"`, `"conv_like"`,
            `"conv_bordered"` and `"conv_wrapped"` (as in `bordered_attention.py`) for each layer; `None` means
            `"full"` in all.
        conv_kernel_size (`int`, *optional*, defaults to 11): odd side of the window of the conv layers.
        use_early_masks (`bool`, *optional*, defaults to `False`):
            Whether the masks of the image begin at the last text state, as in ruDALL-E's v2 form: it is masked as the
            first cell, and cell k as cell k + 1.
        use_rotary_embedding (`bool`, *optional*, defaults to `False`):
            Whether positions are rotations of queries, keys and values (`grid_rotary.py`) and not learned.
        use_token_shift (`bool`, *optional*, defaults to `False`): whether states mix with earlier ones before each
            attention and MLP (`token_shift.py`).
        use_sandwich_norm (`bool`, *optional*, defaults to `False`): whether what a layer adds is normalised again.
        use_head_norm (`bool`, *optional*, defaults to `False`): whether the head has a layer norm after the last one.
        use_max_norm (`bool`, *optional*, defaults to `False`):
            Whether the last states are divided by their largest channel (DALLE-pytorch's `stable`).
        attention_output_limit (`float`, *optional*): what the attention's output is clamped to (ruDALL-E's 65504).
        layer_norm_eps (`float`, *optional*, defaults to 1e-05): epsilon of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of initial weights.
        text_loss_weight (`float`, *optional*, defaults to 0.125): weight of the text loss; the image has the rest.
        caption_dropout (`float`, *optional*, defaults to 0.0):
            The share of captions that training dropped, which guidance and the empty prompt need; `None` where nothing
            says it and the original program draws with both.
        use_cache (`bool`, *optional*, defaults to `True`): whether the model returns keys and values.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): whether the head shares the token embedding.
        bos_token_id (`int`, *optional*): start-of-text where the tokenizer puts it first.
        pad_token_id, eos_token_id (`int`, *optional*): stay `None`.

    Raises:
        `ValueError`: for an unknown attention type, a list of them of the wrong length, an even kernel, or a size that
            is not positive.
    """

    model_type = "dalle_family_prior"
    keys_to_ignore_at_inference = ["past_key_values"]

    hidden_size: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    text_vocab_size: int = 16384
    text_length: int = 256
    start_token_id: int | None = None
    use_position_pads: bool = True
    image_vocab_size: int = 8192
    image_grid_size: int = 32
    attention_types: list[str] | None = None
    conv_kernel_size: int = 11
    use_early_masks: bool = False
    use_rotary_embedding: bool = False
    use_token_shift: bool = False
    use_sandwich_norm: bool = False
    use_head_norm: bool = False
    use_max_norm: bool = False
    attention_output_limit: float | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    text_loss_weight: float | int = 1 / 8
    caption_dropout: float | int | None = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.attention_types is None:
            self.attention_types = ["full"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        # The strict dataclass runs this too, but hides the ValueError inside an exception of its own.
        self.validate_architecture()

    def validate_architecture(self):
        """Raises `ValueError` for numbers that give no model."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size")
        check_shape(self, sizes, FAMILY_ATTENTION_TYPES)

    @property
    def pad_token_offset(self) -> int:
        """Where `use_position_pads`, the pad id of caption position t is `pad_token_offset + t`."""
        return self.text_vocab_size

    @property
    def image_token_offset(self) -> int:
        """Image token k has the id `image_token_offset + k`; the ids below it are what a text state can predict."""
        return self.text_vocab_size + (self.text_length if self.use_position_pads else 0)

    @property
    def vocab_size(self) -> int:
        """Size of the joint vocabulary."""
        return self.image_token_offset + self.image_vocab_size

    @property
    def num_text_states(self) -> int:
        """Number of text states, a start-of-text that the prior puts first included."""
        return self.text_length + (self.start_token_id is not None)

    @property
    def num_shared_states(self) -> int:
        """Number of text states that all later states see; with `use_early_masks` the last one is masked as a cell."""
        return self.num_text_states - self.use_early_masks

    @property
    def num_image_tokens(self) -> int:
        """Number of image tokens; the last is predicted and gets no state."""
        return self.image_grid_size**2

    @property
    def stream_length(self) -> int:
        """Number of states of a whole stream."""
        return self.num_text_states + self.num_image_tokens - 1


__all__ = ["DalleFamilyPriorConfig"]
