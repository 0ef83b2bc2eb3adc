"""transformers' `generate()` on the prior: captions in, the whole stream with its image tokens out; and `compile()`.

What generation asks of the model (`join_stream`, the forward pass) lives in `modeling_dalle_prior.py`; our own loop,
with `torch.Generator`s, lives in `sampling.py`.
"""

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import GenerationMode
from transformers.utils import logging

from .cache_dalle import DalleCache
from .decode_attention import DecodeWindow


logger = logging.get_logger(__name__)


def run_layer(layer: nn.Module, hidden_states: torch.Tensor, window: DecodeWindow) -> torch.Tensor:
    """A layer on one image state after others."""
    return layer(hidden_states, attention_mask=window)


class CompiledLayer:
    """[`run_layer`], compiled when it is first called; plain from where that fails, with one warning."""

    def __init__(self, **options):
        self.options, self._run, self.is_static = options, None, True

    def __getstate__(self):
        return {**self.__dict__, "_run": None, "is_static": True}  # what is compiled is not copied or saved

    def __call__(self, layer: nn.Module, hidden_states: torch.Tensor, window: DecodeWindow) -> torch.Tensor:
        if self._run is None:
            self._run = torch.compile(run_layer, **self.options)
        if self._run is not run_layer:
            try:
                return self._run(layer, hidden_states, window)
            except torch.OutOfMemoryError:
                raise  # no fault of the compiler's
            except Exception as error:  # of a compiler, of any kind; what is wrong with the call comes again below
                logger.warning(f"Compiling failed, drawing goes on without: {type(error).__name__}: {error}")
                self._run, self.is_static = run_layer, False
        return run_layer(layer, hidden_states, window)


class DallePriorGenerationMixin(GenerationMixin):
    """Joins what `generate()` is given into streams, and refuses what would draw wrong images without an error."""

    def compile(self, **options):
        """
        Compiles what drawing and `generate` do for each image token, a layer at a time, on first use; training and the
        reading of captions stay as they are. Where it fails, there is one warning, and drawing goes on without.

        Args:
            options: as for `torch.compile`.
        """
        self.model.run_layer = CompiledLayer(**options)

    def new_cache(self) -> DalleCache:
        """An empty cache for drawing."""
        return DalleCache(self.config)

    def generate(self, inputs: torch.LongTensor | None = None, generation_config=None, **kwargs):
        """
        Draws image tokens with transformers' loop; `sampling.draw_image_tokens` has generators and seeds.

        Args:
            inputs or input_ids (`torch.LongTensor`):
                B x text_length, plain output of the tokenizer; or what [`~DallePriorForCausalLM.join_stream`] gives.
            attention_mask (`torch.Tensor`, *optional*): of the same shape, 0 at pads.
            negative_prompt_ids, negative_prompt_attention_mask (`torch.LongTensor`, *optional*):
                B x text_length, plain output of the tokenizer: what guidance leads away from, by default no caption.
            generation_config, kwargs: as for [`~transformers.GenerationMixin.generate`].

        Returns:
            As there; the ids are B x (text_length + 1 + image tokens) of the joint vocabulary, pads replaced. An image
            token is its id minus `config.image_token_offset`; by default they fill the grid exactly.

        Raises:
            `ValueError`: as [`~DallePriorForCausalLM.join_stream`], where the image would outgrow its grid, or for
                guidance of beams.
        """
        config, input_ids = self.config, kwargs.pop("input_ids", inputs)
        if input_ids is None or input_ids.ndim != 2:
            raise ValueError("`generate` needs `input_ids`, B x text_length: what the tokenizer gives for captions.")
        text_ids, start, image_ids = input_ids.tensor_split([config.text_length, config.text_length + 1], dim=1)
        if (start != config.image_start_token_id).any():
            raise ValueError(f"After the text comes start-of-image, {config.image_start_token_id}: use `join_stream`.")
        mask = kwargs.pop("attention_mask", None)
        mask = mask if mask is None else mask[:, : config.text_length]
        # The pads are replaced before the loop, so that no step and no kind of cache needs the mask.
        stream = self.join_stream(text_ids, mask, image_ids - config.image_token_offset)
        return super().generate(stream["input_ids"], generation_config, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args) -> None:
        """A [`DalleCache`] by default; guessing several tokens ahead goes back, which takes a cache of all states."""
        is_free = model_kwargs.get("past_key_values") is None and generation_config.cache_implementation is None
        goes_back = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        if is_free and generation_config.use_cache is not False and not goes_back:
            model_kwargs["past_key_values"] = self.new_cache()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args)

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        *args,
        encoder_input_ids: torch.LongTensor | None = None,
        negative_prompt_ids: torch.LongTensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> LogitsProcessorList:
        """Joins the stream that guidance leads away from; transformers' own default for it is the last id alone."""
        if generation_config.guidance_scale not in (None, 1):
            if generation_config.num_beams > 1:
                scale = generation_config.guidance_scale
                raise ValueError(f"Beams cannot be guided: set guidance_scale=1.0 (it is {scale}), or num_beams=1.")
            text_ids, image_ids = encoder_input_ids.tensor_split([self.config.text_length], dim=1)
            if negative_prompt_ids is None:  # no caption: start-of-text and pads
                negative_prompt_ids = torch.full_like(text_ids, self.config.bos_token_id)
                negative_prompt_attention_mask = torch.zeros_like(text_ids)
                negative_prompt_attention_mask[:, 0] = 1
            image_tokens = image_ids[:, 1:] - self.config.image_token_offset
            stream = self.join_stream(negative_prompt_ids, negative_prompt_attention_mask, image_tokens)
            # B -> B * n rows, as transformers has repeated the caption's by now
            negative_prompt_ids = stream["input_ids"].repeat_interleave(generation_config.num_return_sequences, dim=0)
        return super()._get_logits_processor(
            generation_config,
            *args,
            encoder_input_ids=encoder_input_ids,
            negative_prompt_ids=negative_prompt_ids,
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(**kwargs) -> None:
        """No mask: the layers look theirs up by position, for static caches too."""

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: continuous batching builds plain causal masks and would draw wrong images without an error."""
        raise ValueError(
            "Continuous batching (`generate_batch`, cache_implementation='paged') knows no row, column or conv "
            "attention. Use `generate` with a batch of captions."
        )
