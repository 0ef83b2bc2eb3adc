"""The priors of DALL-E's public reimplementations, as `conversion/` makes them: DALLE-pytorch, ruDALL-E, minDALL-E.

From outer to inner: `DalleFamilyPriorForCausalLM` (stream, head and loss), `DalleFamilyPriorModel` (embeddings and
layers), the layer and its parts. To the sampler and the pipeline it is what `DallePriorForCausalLM`, the paper's, is.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .bordered_attention import BORDERED_TYPES, bordered_attention_mask
from .cache_dalle import DalleCache, check_cache, open_windows
from .configuration_family_prior import DalleFamilyPriorConfig
from .decode_attention import DecodeWindow
from .grid_rotary import rotary_table, rotate
from .image_attention import cache_constants, image_attention_mask
from .linear_dalle import DalleLinear, linear
from .losses import stream_losses
from .modeling_dalle_prior import (
    DallePriorCausalLMOutput,
    DallePriorMLP,
    DallePriorPreTrainedModel,
    check_range,
    eager_attention_forward,
)
from .token_shift import DalleShiftCache, ShiftedCells, shift_tokens


@cache_constants
def family_attention_mask(
    attention_type: str,
    num_shared_states: int,
    grid_size: int,
    kernel_size: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """
    The mask among all states of the stream, text first: text attends causally to text, a cell to all of the text and
    to those cells that its attention type says. With `use_early_masks` the last text state counts as the first cell.

    Args:
        attention_type (`str`): as `DalleFamilyPriorConfig.attention_types` names them.
        num_shared_states (`int`): T, the config's.
        grid_size, kernel_size (`int`): as for [`bordered_window`].
        device (`torch.device`): where the mask is to be.

    Returns:
        `torch.Tensor`: bool, S x S with S = T + grid_size ** 2. It is shared by all callers: do not write into it.
    """
    with torch.inference_mode(False):
        among_cells = bordered_attention_mask if attention_type in BORDERED_TYPES else image_attention_mask
        mask = torch.ones(num_shared_states + grid_size**2, num_shared_states + grid_size**2, dtype=torch.bool).tril()
        mask[num_shared_states:, num_shared_states:] = among_cells(attention_type, grid_size, kernel_size)
        return mask.to(device)


class DalleFamilyPriorPreTrainedModel(DallePriorPreTrainedModel):
    """Base class: initial and loaded weights."""

    config: DalleFamilyPriorConfig
    _no_split_modules = ["DalleFamilyPriorLayer"]
    _supports_flex_attn = False


class DalleFamilyPriorForCausalLM(DalleFamilyPriorPreTrainedModel, GenerationMixin):
    """The prior with its joint head, of which states that predict text use the first rows, the others the last."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = False

    def __init__(self, config: DalleFamilyPriorConfig):
        super().__init__(config)
        self.model = DalleFamilyPriorModel(config)
        self.lm_head = DalleFamilyPriorHead(config.hidden_size, config.vocab_size)
        self.post_init()
        self.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> DallePriorCausalLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor`):
                B x states, ids of the joint vocabulary as [`~DalleFamilyPriorForCausalLM.join_stream`] gives them. The
                first piece of a stream holds all of its text.
            attention_mask (`torch.Tensor`, *optional*): ignored: pads are ids of the stream, attended to like any.
            past_key_values (`Cache`, *optional*): the states so far; the positions go on from its length.
            labels (`torch.LongTensor`, *optional*):
                Ids like `input_ids`, usually the same tensor, -100 where nothing is to be predicted; the shift happens
                here. The last id is a target only and gets no state.
            use_cache (`bool`, *optional*): whether to return keys and values; by default not with `labels`.
            logits_to_keep (`int`, *optional*, defaults to 0): without `labels`, logits of so many last states; 0: all.

        Raises:
            `ValueError`: for a state past the end of the stream, or a first piece without all of the text.
        """
        first_state = past_key_values.get_seq_length() if past_key_values is not None else 0
        if labels is not None:
            input_ids, use_cache, logits_to_keep = input_ids[:, :-1], bool(use_cache), 0
        outputs = self.model(input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        hidden_states = outputs.last_hidden_state[:, -logits_to_keep:]
        first_state += outputs.last_hidden_state.shape[1] - hidden_states.shape[1]
        # The last text state predicts the first image token.
        num_text = min(max(self.config.num_text_states - 1 - first_state, 0), hidden_states.shape[1])
        text_logits, image_logits = self.lm_head(hidden_states, num_text, self.config.image_token_offset)
        scores = {}
        if labels is not None:
            # State t predicts the id of position t + 1.
            text_labels, image_labels = labels[:, 1:].tensor_split([num_text], dim=1)
            scores = stream_losses(self.config, text_logits, text_labels, image_logits, image_labels)
        return DallePriorCausalLMOutput(
            **scores,
            text_logits=text_logits,
            image_logits=image_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def join_stream(self, text_ids, attention_mask=None, image_tokens=None) -> dict[str, torch.Tensor]:
        """
        Joins a caption and the image tokens so far into one stream: start-of-text where the prior puts it, text, pads,
        image.

        Args:
            text_ids (`torch.LongTensor`): B x text_length, as the tokenizer gives them, padded on the right.
            attention_mask (`torch.Tensor`, *optional*): B x text_length, 0 at pads.
            image_tokens (`torch.LongTensor`, *optional*): B x k in raster order, each in [0, image_vocab_size).

        Returns:
            `dict`: `input_ids`, B x (num_text_states + k) of the joint vocabulary, and `attention_mask`, all ones.

        Raises:
            `ValueError`: for a wrong length or range, or a caption that is not padded on the right.
        """
        config = self.config
        attention_mask, image_tokens = self._check_parts(text_ids, attention_mask, image_tokens, min_text_length=0)
        check_range("Text ids", text_ids, config.text_vocab_size)
        check_range("Image tokens", image_tokens, config.image_vocab_size)
        if config.use_position_pads:
            # Text id 0 too, also inside a caption: in these programs it is the pad's.
            pad_ids = config.pad_token_offset + torch.arange(config.text_length, device=text_ids.device)
            text_ids = torch.where((attention_mask == 0) | (text_ids == 0), pad_ids, text_ids)
        if config.start_token_id is not None:
            text_ids = F.pad(text_ids, (1, 0), value=config.start_token_id)
        input_ids = torch.cat([text_ids, image_tokens.to(text_ids) + config.image_token_offset], dim=1)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def new_cache(self) -> DalleCache:
        """An empty cache for drawing."""
        return self.model.new_cache()

    def generate(self, *args, **kwargs):
        """Refused: transformers' loop knows nothing of these streams."""
        raise ValueError("This prior draws through `DALLEPipeline` or `sampling.draw_image_tokens`, not `generate`.")


class DalleFamilyPriorHead(nn.Linear):
    """A linear head of which states that predict text use the first rows only, the others the last."""

    def forward(
        self, hidden_states: torch.Tensor, num_text_states: int, num_text_logits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """B x states x width, to B x num_text_states x num_text_logits and B x the others x the other rows."""
        text, image = hidden_states.tensor_split([num_text_states], dim=1)
        text_weight, image_weight = self.weight.tensor_split([num_text_logits])
        text_bias, image_bias = self.bias.tensor_split([num_text_logits])
        return linear(text, text_weight, text_bias), linear(image, image_weight, image_bias)


class DalleFamilyPriorModel(DalleFamilyPriorPreTrainedModel):
    """Embeddings, layers and the last norms: ids of the joint vocabulary to states of the stream."""

    def __init__(self, config: DalleFamilyPriorConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if not config.use_rotary_embedding:
            self.text_position_embedding = nn.Embedding(config.num_text_states, config.hidden_size)
            self.image_position_embedding = nn.Embedding(config.num_image_tokens, config.hidden_size)
        self.layers = nn.ModuleList(
            [DalleFamilyPriorLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head_norm = make_norm(config, config.use_head_norm)
        self.post_init()

    def new_cache(self) -> DalleCache:
        """An empty cache."""
        return (DalleShiftCache if self.config.use_token_shift else DalleCache)(self.config)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Arguments and errors as for [`DalleFamilyPriorForCausalLM`]; gives B x states x width."""
        config = self.config
        use_cache = (config.use_cache and not torch.is_grad_enabled()) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        num_states = input_ids.shape[1]
        if past_length + num_states > config.stream_length:
            raise ValueError(
                f"The stream has {config.stream_length} states ({config.num_text_states} of text, the others of the "
                f"image), but {past_length + num_states} are asked for: the image is complete."
            )
        if past_length == 0 and num_states < config.num_text_states:
            raise ValueError(f"The text is {config.num_text_states} ids and read at once, got {num_states} of them.")
        if past_key_values is not None:
            check_cache(past_key_values, config, len(input_ids))
            if config.use_token_shift and not isinstance(past_key_values, DalleShiftCache):
                raise ValueError("A prior with token shift needs its own cache: `prior.new_cache()`.")
        positions = torch.arange(past_length, past_length + num_states, device=input_ids.device)
        hidden_states = self.embed_tokens(input_ids)
        if config.use_rotary_embedding:
            sizes = (config.num_text_states, config.image_grid_size, config.head_dim)
            kwargs["angles"] = [table[positions] for table in rotary_table(*sizes, input_ids.device)]
        else:
            hidden_states = hidden_states + self._embed_positions(positions)
        windows = None if self.training else open_windows(past_key_values, num_states)
        masks = windows or self._attention_masks(positions)
        for layer, mask in zip(self.layers, masks, strict=True):
            hidden_states = layer(
                hidden_states, attention_mask=mask, past_key_values=past_key_values, first_state=past_length, **kwargs
            )
        hidden_states = self.norm(self._divide_by_max(hidden_states))
        return BaseModelOutputWithPast(self.head_norm(hidden_states), past_key_values)

    def _embed_positions(self, positions: torch.Tensor) -> torch.Tensor:
        num_text = self.config.num_text_states
        text, image = positions[positions < num_text], positions[positions >= num_text] - num_text
        return torch.cat([self.text_position_embedding(text), self.image_position_embedding(image)])

    def _divide_by_max(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.config.use_max_norm:
            return hidden_states
        return hidden_states / hidden_states.amax(dim=-1, keepdim=True).detach()

    def _attention_masks(self, positions: torch.Tensor) -> list[torch.Tensor]:
        """For each layer bool, 1 x 1 x states x all states so far."""
        config = self.config
        sizes = (config.num_shared_states, config.image_grid_size, config.conv_kernel_size, positions.device)
        rows = slice(int(positions[0]), int(positions[-1]) + 1)
        return [family_attention_mask(kind, *sizes)[None, None, rows, : rows.stop] for kind in config.attention_types]


def make_norm(config: DalleFamilyPriorConfig, is_there: bool) -> nn.Module:
    """A layer norm, or nothing in its place."""
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if is_there else nn.Identity()


class DalleFamilyPriorLayer(GradientCheckpointingLayer):
    """A pre-LN transformer layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: DalleFamilyPriorConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.input_layernorm = make_norm(config, True)
        self.self_attn = DalleFamilyPriorAttention(config, layer_idx)
        self.attention_output_norm = make_norm(config, config.use_sandwich_norm)
        self.post_attention_layernorm = make_norm(config, True)
        self.mlp = (DalleFamilyPriorGatedMLP if config.hidden_act == "geglu" else DallePriorMLP)(config)
        self.mlp_output_norm = make_norm(config, config.use_sandwich_norm)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | DecodeWindow,
        past_key_values: Cache | None = None,
        first_state: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        before_attention = before_mlp = None
        if isinstance(past_key_values, DalleShiftCache):
            before_attention, before_mlp = past_key_values.shifted_cells[self.layer_idx]
        inputs = self._shift(self.input_layernorm(hidden_states), first_state, before_attention)
        attended, _ = self.self_attn(inputs, attention_mask, past_key_values, is_start=first_state == 0, **kwargs)
        hidden_states = hidden_states + self.attention_output_norm(attended)
        inputs = self._shift(self.post_attention_layernorm(hidden_states), first_state, before_mlp)
        return hidden_states + self.mlp_output_norm(self.mlp(inputs))

    def _shift(self, inputs: torch.Tensor, first_state: int, cells: ShiftedCells | None) -> torch.Tensor:
        return shift_tokens(inputs, first_state, self.config, cells) if self.config.use_token_shift else inputs


class DalleFamilyPriorAttention(nn.Module):
    """Multi-head attention whose mask says which of the earlier states a state sees."""

    def __init__(self, config: DalleFamilyPriorConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        width = config.num_attention_heads * config.head_dim
        self.qkv_proj = DalleLinear(config.hidden_size, 3 * width)
        self.o_proj = DalleLinear(width, config.hidden_size)
        self.o_proj.is_residual = True

    def forward(self, hidden_states, attention_mask, past_key_values=None, is_start=True, angles=None, **kwargs):
        config = self.config
        # B x states x 3 width -> B x states x 3 x heads x head width
        states = self.qkv_proj(hidden_states).unflatten(-1, (3, config.num_attention_heads, config.head_dim))
        if angles is not None:  # values too, as DALLE-pytorch does
            states = rotate(states, *(table[:, None, None] for table in angles))
        query, key, value = states.permute(2, 0, 3, 1, 4)  # each B x heads x states x head width
        weights = None
        if isinstance(attention_mask, DecodeWindow):
            output = attention_mask.attend(query, key, value, self.scaling)
        else:
            if past_key_values is not None:
                cached = past_key_values.update(key, value, self.layer_idx)
                key, value = (key, value) if is_start else cached
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
            output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        # B x states x heads x head width -> B x states x width
        output = self.o_proj(output.flatten(2))
        if config.attention_output_limit is not None:
            output = output.clamp(-config.attention_output_limit, config.attention_output_limit)
        return output, weights


class DalleFamilyPriorGatedMLP(nn.Module):
    """Two linear layers, of which the first gives values and, after them, gates."""

    def __init__(self, config: DalleFamilyPriorConfig):
        super().__init__()
        self.fc1 = DalleLinear(config.hidden_size, 2 * config.intermediate_size)
        self.fc2 = DalleLinear(config.intermediate_size, config.hidden_size)
        self.fc2.is_residual = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        values, gates = self.fc1(hidden_states).chunk(2, dim=-1)
        return self.fc2(values * F.gelu(gates))


DalleFamilyPriorPreTrainedModel._can_record_outputs = {
    "hidden_states": DalleFamilyPriorLayer,
    "attentions": DalleFamilyPriorAttention,
}

__all__ = ["DalleFamilyPriorForCausalLM", "DalleFamilyPriorModel", "DalleFamilyPriorPreTrainedModel"]
