"""The prior: a decoder-only transformer over one stream of text and image tokens (paper, section 2.2).

From outer to inner: `DallePriorForCausalLM` (head and loss), `DallePriorModel` (embeddings and layers), the layer and
its parts. The masks are defined in `image_attention.py`; `generate()` lives in `generation_dalle_prior.py`, our own
drawing loop in `sampling.py`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_dalle import check_cache, make_cache, open_windows
from .configuration_dalle_prior import DallePriorConfig
from .decode_attention import DecodeWindow
from .generation_dalle_prior import DallePriorGenerationMixin, run_layer
from .image_attention import stream_attention_mask
from .linear_dalle import DalleLinear, DallePriorHead
from .losses import stream_losses
from .sparse_attention import attend_in_blocks, check_flex_device, choose_start_mask


@dataclass
class DallePriorCausalLMOutput(ModelOutput):
    """
    Output of [`DallePriorForCausalLM`]. Losses are means in nats a token, `None` where nothing is predicted.

    Args:
        loss (`torch.Tensor`, *optional*): with `labels`; `text_loss` and `image_loss`, weighted as the config says.
        text_loss (`torch.Tensor`, *optional*): of text ids, pads counted.
        caption_loss (`torch.Tensor`, *optional*): of real text ids only; a figure to report, without gradient.
        image_loss (`torch.Tensor`, *optional*): of image tokens.
        logits (`torch.Tensor`, *optional*):
            B x states x joint vocabulary, without `labels` only. What cannot follow a state has the lowest finite
            number: a text state gives text and pads, the last text state start-of-image, an image state image tokens.
        text_logits (`torch.Tensor`): B x text states x (text_vocab_size + text_length).
        image_logits (`torch.Tensor`): B x image states x image_vocab_size.
        past_key_values, hidden_states, attentions: as everywhere in transformers.
    """

    loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    caption_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    text_logits: torch.Tensor | None = None
    image_logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class DallePriorPreTrainedModel(PreTrainedModel):
    """Base class: initial and loaded weights, which of the stream's positions are pads, what a stream is made of."""

    config: DallePriorConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DallePriorLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if getattr(module, "is_residual", False):
            # As in GPT-2: what many layers add to one residual stream keeps its scale at any depth.
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As in transformers, except for weights that the files lack or hold in another shape: these are not initialised
        anew.

        Raises:
            `OSError`: that names such weights; with `ignore_mismatched_sizes=True` only those that are lacking.
        """
        use_loading_info = kwargs.pop("output_loading_info", False)
        is_shape_free = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        wrong = [f"no {key}" for key in info["missing_keys"]]
        if not is_shape_free:
            wrong += [f"{key} of {tuple(found)}, not {tuple(own)}" for key, found, own in info["mismatched_keys"]]
        if wrong:
            raise OSError(f"{pretrained_model_name_or_path} holds other weights: {', '.join(sorted(wrong))}.")
        return (model, info) if use_loading_info else model

    def _find_pads(self, attention_mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor | None:
        """B x positions: which of the stream's `positions` are text positions where `attention_mask` is 0."""
        if attention_mask is None:
            return None
        num_columns, text_length = attention_mask.shape[-1], self.config.text_length
        if not torch.compiler.is_compiling():
            num_needed = min(int(positions[-1]) + 1, text_length)
            if attention_mask.ndim != 2 or num_columns < num_needed:
                raise ValueError(
                    f"`attention_mask` must be 2-D and have a column for each text position so far, {num_needed} or "
                    f"more; got the shape {tuple(attention_mask.shape)}."
                )
        return (attention_mask[:, positions.clamp(max=num_columns - 1)] == 0) & (positions < text_length)

    def _check_parts(self, text_ids, attention_mask, image_tokens, min_text_length: int) -> tuple[torch.Tensor, ...]:
        """The mask and the image tokens that `join_stream` joins to a text; `ValueError` for a wrong length."""
        text_length, num_image_tokens = self.config.text_length, self.config.num_image_tokens
        attention_mask = torch.ones_like(text_ids) if attention_mask is None else attention_mask
        image_tokens = text_ids.new_empty(len(text_ids), 0) if image_tokens is None else image_tokens
        if text_ids.ndim != 2 or text_ids.shape[1] != text_length or attention_mask.shape != text_ids.shape:
            raise ValueError(
                f"The text and its mask must have {text_length} columns each (padding='max_length'), got the "
                f"shapes {tuple(text_ids.shape)} and {tuple(attention_mask.shape)}."
            )
        if (attention_mask[:, 1:] > attention_mask[:, :-1]).any() or not attention_mask[:, :min_text_length].all():
            raise ValueError("A caption must be padded on the right only: set the tokenizer's padding_side='right'.")
        if image_tokens.shape != (len(text_ids), min(image_tokens.shape[-1], num_image_tokens)):
            raise ValueError(
                f"Image tokens must be {len(text_ids)} rows, one for each text, of at most {num_image_tokens} "
                f"tokens, got the shape {tuple(image_tokens.shape)}."
            )
        return attention_mask, image_tokens


class DallePriorForCausalLM(DallePriorPreTrainedModel, DallePriorGenerationMixin):
    """The prior with its joint head, of which text states use the text and pad rows, image states the image rows."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # Each micro-batch has its own mean loss: transformers' Trainer must not pass a count to divide by.
    accepts_loss_kwargs = False
    compile = DallePriorGenerationMixin.compile  # not nn.Module's

    def __init__(self, config: DallePriorConfig):
        super().__init__(config)
        self.model = DallePriorModel(config)
        self.lm_head = DallePriorHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        # The whole distribution, as in the paper: transformers' own default keeps the 50 likeliest tokens.
        whole = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        self.generation_config.update(**whole, max_length=config.stream_length + 1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> DallePriorCausalLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor`):
                B x states, ids of the joint vocabulary as [`~DallePriorForCausalLM.join_stream`] gives them. Plain
                output of the tokenizer, padded to `text_length`, is a valid start.
            attention_mask (`torch.Tensor`, *optional*):
                B x columns, from the start of the stream. A text position where it is 0 gets its own learned pad,
                attended to like any token: nothing is masked out. Beyond the text it is ignored.
            past_key_values (`Cache`, *optional*): the states so far; the positions go on from its length.
            inputs_embeds (`torch.Tensor`, *optional*): B x states x width, token embeddings in place of `input_ids`.
            labels (`torch.LongTensor`, *optional*):
                Ids like `input_ids`, usually the same tensor, -100 where nothing is to be predicted; the shift happens
                here. The last id is a target only and gets no state: a whole stream has `stream_length + 1` ids.
            use_cache (`bool`, *optional*): whether to return keys and values; by default not with `labels`.
            logits_to_keep (`int`, *optional*, defaults to 0): without `labels`, logits of so many last states; 0: all.

        Raises:
            `ValueError`: for a state past the end of the stream, or a mask that does not cover the text.
        """
        # Read before the model counts a static cache on.
        first_state = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if labels is not None:
            input_ids, inputs_embeds = (x if x is None else x[:, :-1] for x in (input_ids, inputs_embeds))
            use_cache, logits_to_keep = bool(use_cache), 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state[:, -logits_to_keep:]
        first_state += outputs.last_hidden_state.shape[1] - hidden_states.shape[1]
        num_text_states = 0  # in a compiled graph of image states, a constant
        if first_state < self.config.text_length:
            num_text_states = min(self.config.text_length - first_state, hidden_states.shape[1])
        text, image = hidden_states.tensor_split([num_text_states], dim=1)
        num_logits = (self.config.image_start_token_id, self.config.image_vocab_size)
        text_logits, image_logits = self.lm_head(text, image, *num_logits)
        if labels is None:
            scores = {"logits": self._join_logits(text_logits, image_logits, first_state)}
        else:
            scores = self._compute_losses(text_logits, image_logits, labels, attention_mask, first_state)
        return DallePriorCausalLMOutput(
            **scores,
            text_logits=text_logits,
            image_logits=image_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _join_logits(self, text_logits: torch.Tensor, image_logits: torch.Tensor, first_state: int) -> torch.Tensor:
        config, lowest = self.config, torch.finfo(text_logits.dtype).min
        text = F.pad(text_logits, (0, config.vocab_size - config.image_start_token_id), value=lowest)
        if text.shape[1] and first_state + text.shape[1] == config.text_length:
            text[:, -1] = lowest  # the last text state: start-of-image follows, always
            text[:, -1, config.image_start_token_id] = 0.0
        return torch.cat([text, F.pad(image_logits, (config.image_token_offset, 0), value=lowest)], dim=1)

    def _compute_losses(self, text_logits, image_logits, labels, attention_mask, first_state: int) -> dict:
        config, num_text_states = self.config, text_logits.shape[1]
        # State t predicts the id of position t + 1.
        labels = labels[:, 1:]
        positions = torch.arange(labels.shape[1], device=labels.device) + first_state + 1
        is_pad = self._find_pads(attention_mask, positions)
        if is_pad is not None:
            labels = torch.where(is_pad & (labels != -100), config.pad_token_offset + positions, labels)
        # Start-of-image, the target of the last text state, is certain and not counted.
        text_labels = labels.masked_fill(positions >= config.text_length, -100)[:, :num_text_states]
        return stream_losses(config, text_logits, text_labels, image_logits, labels[:, num_text_states:])

    def join_stream(self, text_ids, attention_mask=None, image_tokens=None) -> dict[str, torch.Tensor]:
        """
        Joins a caption and the image tokens so far into one stream: text, pads, start-of-image, image.

        Args:
            text_ids (`torch.LongTensor`): B x text_length, as the tokenizer gives them, padded on the right.
            attention_mask (`torch.Tensor`, *optional*): B x text_length, 0 at pads.
            image_tokens (`torch.LongTensor`, *optional*): B x k in raster order, each in [0, image_vocab_size).

        Returns:
            `dict`: `input_ids`, B x (text_length + 1 + k) of the joint vocabulary, pads replaced, and `attention_mask`
            of the same shape. Both go to `forward` (for a whole grid the ids are the labels too) and to `generate`.

        Raises:
            `ValueError`: for a wrong length or range, or a caption that is not padded on the right.
        """
        config = self.config
        attention_mask, image_tokens = self._check_parts(text_ids, attention_mask, image_tokens, min_text_length=1)
        pad_ids = config.pad_token_offset + torch.arange(config.text_length, device=text_ids.device)
        text_ids = torch.where(attention_mask == 0, pad_ids, text_ids)
        check_range("Text ids", text_ids.where(text_ids != pad_ids, 0), config.text_vocab_size)
        check_range("Image tokens", image_tokens, config.image_vocab_size)
        start = text_ids.new_full((len(text_ids), 1), config.image_start_token_id)
        input_ids = torch.cat([text_ids, start, image_tokens.to(text_ids) + config.image_token_offset], dim=1)
        num_ones = input_ids.shape[1] - config.text_length
        return {"input_ids": input_ids, "attention_mask": F.pad(attention_mask, (0, num_ones), value=1)}


def check_range(name: str, ids: torch.Tensor, size: int) -> None:
    """Raises `ValueError` for ids that are not in [0, size)."""
    if ids.numel() and (ids.min() < 0 or ids.max() >= size):
        raise ValueError(f"{name} must be in [0, {size}), got {ids.min()} to {ids.max()}: of another model?")


class DallePriorModel(DallePriorPreTrainedModel):
    """Embeddings, layers and the final norm: ids of the joint vocabulary to states of the stream."""

    def __init__(self, config: DallePriorConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.text_position_embedding = nn.Embedding(config.text_length, config.hidden_size)
        self.image_row_embedding = nn.Embedding(config.image_grid_size, config.hidden_size)
        self.image_column_embedding = nn.Embedding(config.image_grid_size, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([DallePriorLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.run_layer = run_layer  # for one image state after others
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Arguments and errors as for [`DallePriorForCausalLM`]; gives B x states x width."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if use_cache and past_key_values is None:
            past_key_values = make_cache(self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length, config = past_length + hidden_states.shape[1], self.config
        # A static cache counts in a tensor, which a compiled graph must not read.
        if not torch.compiler.is_compiling() and length > config.stream_length:
            raise ValueError(
                f"The stream has {config.stream_length} states ({config.text_length} of text, "
                f"{config.num_image_tokens} of the image), but {int(length)} are asked for: the image is complete."
            )
        if past_key_values is not None and not torch.compiler.is_compiling():
            check_cache(past_key_values, config, len(hidden_states))
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device) + past_length
        is_pad = self._find_pads(attention_mask, positions)
        if is_pad is not None:
            pads = self.embed_tokens(config.pad_token_offset + positions.clamp(max=config.text_length - 1))
            hidden_states = torch.where(is_pad[..., None], pads, hidden_states)
        hidden_states = self.dropout(hidden_states + self._embed_positions(positions))
        if not self.training and not kwargs.get("output_attentions", config.output_attentions):
            windows = open_windows(past_key_values, len(positions), getattr(self.run_layer, "is_static", False))
            if windows is not None:
                for layer, window in zip(self.layers, windows, strict=True):
                    hidden_states = self.run_layer(layer, hidden_states, window)
                return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)
        # In a compiled graph a static cache's tensor of a length is not read: its start is masked like the rest.
        is_start = not (torch.compiler.is_compiling() and torch.is_tensor(past_length)) and int(past_length) == 0
        masks = self._attention_masks(hidden_states, positions, None if is_start else past_key_values)
        kwargs.update(past_key_values=past_key_values, is_start=is_start)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=masks[layer.attention_type], **kwargs)
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)

    def _embed_positions(self, positions: torch.Tensor) -> torch.Tensor:
        # Both kinds are looked up for every position, so that a static cache's tensor of a position needs no reading.
        config = self.config
        cells = (positions - config.text_length).clamp(min=0)
        rows = torch.div(cells, config.image_grid_size, rounding_mode="floor")
        image = self.image_row_embedding(rows) + self.image_column_embedding(cells % config.image_grid_size)
        text = self.text_position_embedding(positions.clamp(max=config.text_length - 1))
        return torch.where((positions < config.text_length)[:, None], text, image)

    def _attention_masks(self, states: torch.Tensor, positions: torch.Tensor, earlier: Cache | None) -> dict:
        """For each attention type that a layer has: with `earlier` states bool, 1 x 1 x states x keys."""
        config, masks = self.config, {}
        for kind in dict.fromkeys(config.attention_types):
            sizes = (kind, config.text_length, config.image_grid_size, config.conv_kernel_size)
            if earlier is None:
                masks[kind] = choose_start_mask(config._attn_implementation, *sizes, states)
                continue
            num_keys, _ = earlier.get_mask_sizes(len(positions), 0)
            # states x stream -> 1 x 1 x states x keys; a static cache may be longer than the stream
            mask = stream_attention_mask(*sizes, positions.device)[positions]
            mask = F.pad(mask, (0, max(num_keys - config.stream_length, 0)))
            masks[kind] = mask[None, None, :, :num_keys]
        return masks


class DallePriorLayer(GradientCheckpointingLayer):
    """A pre-LN transformer layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: DallePriorConfig, layer_idx: int):
        super().__init__()
        self.attention_type = config.attention_types[layer_idx]
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = DallePriorAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = DallePriorMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class DallePriorAttention(nn.Module):
    """Multi-head attention whose mask says which of the earlier states a state sees."""

    def __init__(self, config: DallePriorConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_type = config.attention_types[layer_idx]
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.q_proj = DalleLinear(config.hidden_size, config.hidden_size)
        self.k_proj = DalleLinear(config.hidden_size, config.hidden_size)
        self.v_proj = DalleLinear(config.hidden_size, config.hidden_size)
        self.o_proj = DalleLinear(config.hidden_size, config.hidden_size)
        self.o_proj.is_residual = True

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, is_start=False, **kwargs):
        # B x states x width -> B x heads x states x head width
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if isinstance(attention_mask, DecodeWindow):
            return self.o_proj(attention_mask.attend(query, key, value, self.scaling).flatten(2)), None
        if past_key_values is not None:
            cached = past_key_values.update(key, value, self.layer_idx)
            key, value = (key, value) if is_start else cached  # a static cache's has room for later states
        config, implementation = self.config, self.config._attn_implementation
        dropout = config.attention_dropout if self.training else 0.0
        if is_start and attention_mask is None:
            sizes = (config.text_length, config.image_grid_size, config.conv_kernel_size)
            output = attend_in_blocks(query, key, value, self.attention_type, *sizes, self.scaling, dropout)
            return self.o_proj(output.transpose(1, 2).flatten(2)), None
        if implementation == "flex_attention":
            check_flex_device(query, key, value)  # with adapters, what comes in may want no gradient
            implementation = implementation if is_start else "sdpa"  # a later step is too small for a block mask
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        kwargs.update(scaling=self.scaling, dropout=dropout)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        # B x states x heads x head width -> B x states x width
        return self.o_proj(output.flatten(2)), weights


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention step by step, the one that can return its weights; the mask is bool, `True` where a key is seen."""
    scores = (query @ key.transpose(-1, -2)) * scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class DallePriorMLP(nn.Module):
    """Two linear layers with the activation between them."""

    def __init__(self, config: DallePriorConfig):
        super().__init__()
        self.fc1 = DalleLinear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = DalleLinear(config.intermediate_size, config.hidden_size)
        self.fc2.is_residual = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


DallePriorPreTrainedModel._can_record_outputs = {"hidden_states": DallePriorLayer, "attentions": DallePriorAttention}

__all__ = ["DallePriorCausalLMOutput", "DallePriorForCausalLM", "DallePriorModel", "DallePriorPreTrainedModel"]
