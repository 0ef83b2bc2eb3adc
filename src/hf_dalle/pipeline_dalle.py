"""`DALLEPipeline`: from captions to pictures in numbered steps, wiring tokenizer, prior, dVAE and reranker.

How tokens are drawn lives in `sampling.py`, how many pictures at once and what a callback sees in `drawing.py`; what
makes `DiffusionPipeline.from_pretrained` know this class lives in `hub.py`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # from `diffusers` type checkers get a dummy
from diffusers.utils import BaseOutput, logging
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from .autoencoder_dalle_discrete_vae import DalleDiscreteVAE
from .autoencoder_dalle_dvae import DalleDVAE
from .autoencoder_dalle_vqgan import DalleVQGAN
from .candidates import Chunk, check_max_batch_size, explain_out_of_memory
from .drawing import DalleDrawingMixin
from .image_processing_dalle import DalleImageProcessor
from .lora_dalle import DalleLoraLoaderMixin
from .modeling_dalle_prior import DallePriorForCausalLM
from .modeling_family_prior import DalleFamilyPriorForCausalLM
from .publishing import DallePublishingMixin, check_folder
from .reranking import BestImages, score_images
from .sampling import resolve_settings, spawn_generators
from .tokenization_dalle import encode_captions


logger = logging.get_logger(__name__)


@dataclass
class DALLEPipelineOutput(BaseOutput):
    """
    Output of [`DALLEPipeline`], B prompts times n pictures, a prompt's pictures side by side.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            Pictures as `output_type` says, or image tokens B * n x grid x grid.
        scores (`torch.Tensor`, *optional*):
            B * n, the reranker's; each prompt's pictures come best first, those that the safety checker flags last.
        nsfw_content_detected (`list[bool]`, *optional*): B * n, the safety checker's.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    scores: torch.Tensor | None = None
    nsfw_content_detected: list[bool] | None = None


class DALLEPipeline(DalleDrawingMixin, DalleLoraLoaderMixin, DallePublishingMixin, DiffusionPipeline):
    r"""
    Draws pictures from captions, as in "Zero-Shot Text-to-Image Generation" (Ramesh et al., 2021): the prior draws
    image tokens, the dVAE decodes them.

    This model inherits from [`DiffusionPipeline`], which saves, loads and moves it, from [`DallePublishingMixin`],
    which publishes it, from [`DalleLoraLoaderMixin`], which adds LoRA adapters to its prior, and from
    [`DalleDrawingMixin`], which draws in chunks that fit into memory.

    Args:
        prior ([`DallePriorForCausalLM`] or [`DalleFamilyPriorForCausalLM`]):
            The transformer over text and image tokens.
        dvae ([`DalleDVAE`], [`DalleDiscreteVAE`] or [`DalleVQGAN`]):
            Turns image tokens into pictures, and pictures into tokens.
        tokenizer (`PreTrainedTokenizerFast`): of captions.
        image_processor ([`DalleImageProcessor`]): of pictures given and returned.
        reranker (`PreTrainedModel`, *optional*): a CLIP-like model; sorts each prompt's pictures, best first.
        reranker_processor (`ProcessorMixin`, *optional*): the reranker's own processor.
        safety_checker (`Callable`, *optional*):
            Called as `safety_checker(images=...)` with a numpy array B x H x W x 3 in [0, 1]; returns such an array
            and a list of B booleans. `hf_dalle.safety_checker` has one. No checkpoint holds it.

    Raises:
        ValueError: if the parts do not fit each other.
    """

    model_cpu_offload_seq = "prior->dvae->safety_checker->reranker"
    _optional_components = ["reranker", "reranker_processor", "safety_checker"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        prior: DallePriorForCausalLM | DalleFamilyPriorForCausalLM,
        dvae: DalleDVAE | DalleDiscreteVAE | DalleVQGAN,
        tokenizer: PreTrainedTokenizerFast,
        image_processor: DalleImageProcessor,
        reranker: PreTrainedModel | None = None,
        reranker_processor: ProcessorMixin | None = None,
        safety_checker: Callable | None = None,
    ):
        super().__init__()
        _check_fit(prior, dvae, tokenizer, image_processor)
        if (reranker is None) != (reranker_processor is None):
            raise ValueError("`reranker` and `reranker_processor` belong together: give both, or neither.")
        self.register_modules(
            prior=prior,
            dvae=dvae,
            tokenizer=tokenizer,
            image_processor=image_processor,
            reranker=reranker,
            reranker_processor=reranker_processor,
            safety_checker=safety_checker,
        )
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current or last call."""
        return self._guidance_scale

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        image: Image.Image | np.ndarray | torch.Tensor | list | None = None,
        num_prefix_rows: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DALLEPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_batch_size: int | None = None,
        num_candidates: int | None = None,
    ) -> DALLEPipelineOutput | tuple:
        r"""
        Draws `num_images_per_prompt` pictures for each prompt, or `num_candidates`, of which it returns the best.

        Args:
            prompt (`str` or `list[str]`):
                B captions. `""` draws without one, if the prior was trained with caption dropout.
            negative_prompt (`str` or `list[str]`, *optional*):
                What guidance leads away from; by default no caption at all. Unused without guidance.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or list of them, *optional*):
                One picture, or one a prompt, of which the top rows of tokens are kept (paper, section 3.3).
            num_prefix_rows (`int`, *optional*): how many rows, from 1 to the grid's size less 1; needed with `image`.
            num_images_per_prompt (`int`, *optional*, defaults to 1): n, how many pictures of a prompt are returned.
            guidance_scale (`float`, *optional*): 1 is none; above 1 the caption counts for more.
            temperature (`float`, *optional*): above 0; below 1 the likely tokens count for more.
            top_k (`int`, *optional*): draw among the k likeliest tokens; 0 is all of them.
            top_p (`float`, *optional*): in (0, 1]; draw among the likeliest tokens with this probability together.
                These four default to the checkpoint's own, in the prior's `generation_config`.
            generator (`torch.Generator` or list of them, *optional*):
                One for all pictures, one a prompt or one a picture. The same seed gives the same picture in any batch.
            latents (`torch.LongTensor`, *optional*):
                Image tokens to start from, (B * n) x k or (B * n) x rows x grid; a full grid is only decoded.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for the image tokens themselves, neither checked nor reranked.
            return_dict (`bool`, *optional*, defaults to `True`): `False` returns a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each token as `callback(pipe, step, cell, {"latents": tokens})` with a copy of the tokens,
                (B * n) x grid x grid, -1 where nothing was drawn. It may return such a dict with other tokens in this
                cell, which drawing goes on from. [`~DALLEPipeline.decode_partial`] gives the pictures so far. Over
                several chunks `step` counts on, to `pipe.num_timesteps`, while `cell` begins anew; what is returned
                for pictures that this step does not draw has no effect.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): what that dict holds; only `latents` exists.
            max_batch_size (`int`, *optional*):
                How many pictures are drawn at once, by default as many as free memory holds; the others follow in
                chunks. A picture is the same in any. Of n or more, prompts stay whole, and each is read once.
            num_candidates (`int`, *optional*):
                How many pictures of a prompt are drawn, of which the reranker chooses the best n (paper, section 2.6);
                by default n. The same seed draws the same ones as `num_images_per_prompt=num_candidates` does. Then
                B * n above (of `generator`, `latents` and the callback) counts candidates.

        Returns:
            [`DALLEPipelineOutput`], or the tuple `(images, scores, nsfw_content_detected)`.

        Raises:
            ValueError: for an argument of a wrong type or outside its range; nothing has been drawn then.
            torch.OutOfMemoryError: where memory runs out, with the number to lower.
        """
        # 1. Check the inputs; settings that are not given are the checkpoint's
        prompts = [prompt] if isinstance(prompt, str) else prompt
        self.check_inputs(
            prompts,
            negative_prompt,
            num_images_per_prompt,
            output_type,
            callback_on_step_end_tensor_inputs,
            max_batch_size,
            num_candidates,
        )
        num_candidates = num_images_per_prompt if num_candidates is None else num_candidates
        num_images = len(prompts) * num_candidates
        self._check_prefix(image, num_prefix_rows, latents, num_images)
        settings = resolve_settings(self.prior.generation_config, guidance_scale, temperature, top_k, top_p)
        if isinstance(generator, list | tuple) and len(generator) == len(prompts):  # one a prompt
            generator = [source for source in generator for _ in range(num_candidates)]
        generators = spawn_generators(generator, num_images)
        self._guidance_scale, self._interrupt = settings["guidance_scale"], False

        # 2. Encode the prompts
        text_inputs = self.encode_prompt(prompts, negative_prompt, settings["guidance_scale"] > 1)

        # 3. Encode the rows of the picture that are kept
        prefix = latents.flatten(1).to(self._execution_device, torch.int64) if latents is not None else None
        if image is not None:
            prefix = self.encode_image_prefix(image, num_prefix_rows, len(prompts))

        # 4. Draw the image tokens, in chunks where not all pictures fit into memory
        chunks = self._split_call(len(prompts), num_candidates, max_batch_size, prefix, settings["guidance_scale"] > 1)
        tokens = self._draw_tokens(
            chunks,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            image_prefix=prefix,
            generators=generators,
            text_inputs=text_inputs,
            settings=settings,
        )

        scores = has_nsfw_concepts = None
        if output_type == "latent":
            images = tokens.unflatten(1, (self.dvae.image_grid_size, -1))
        else:
            # 5. Decode them, check the pictures, and keep the best, a chunk at a time where there is a reranker
            if self.reranker is None:
                images, has_nsfw_concepts = self._check_safety(self.decode_tokens(tokens, max_batch_size))
            else:
                images, scores, has_nsfw_concepts = self._rerank(
                    prompts, tokens, chunks, num_images_per_prompt, max_batch_size
                )

            # 6. Put the pictures into the form that is asked for
            images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, scores, has_nsfw_concepts
        return DALLEPipelineOutput(images=images, scores=scores, nsfw_content_detected=has_nsfw_concepts)

    def check_inputs(
        self,
        prompts: list[str],
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        max_batch_size: int | None = None,
        num_candidates: int | None = None,
    ) -> None:
        """Raises `ValueError` for what `__call__` cannot draw from."""
        _check_strings("prompt", prompts)
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            _check_strings("negative_prompt", negative_prompt)
            if len(negative_prompt) != len(prompts):
                raise ValueError(f"There are {len(negative_prompt)} negative prompts for {len(prompts)} prompts.")
        if self.prior.config.caption_dropout == 0 and not all(prompt.strip() for prompt in prompts):
            raise ValueError("A prompt is empty, which only a prior trained with caption dropout can draw from.")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` is {num_images_per_prompt!r}; expected a whole number from 1.")
        check_max_batch_size(max_batch_size)
        if num_candidates is not None:
            self._check_candidates(num_candidates, num_images_per_prompt, output_type)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}; expected 'pil', 'np', 'pt' or 'latent'.")
        unknown = sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` holds {unknown}; it may hold {self._callback_tensor_inputs}."
            )

    def _check_candidates(self, num_candidates: int, num_images_per_prompt: int, output_type: str) -> None:
        if not isinstance(num_candidates, int) or num_candidates < num_images_per_prompt:
            raise ValueError(
                f"`num_candidates` is {num_candidates!r}; expected a whole number from {num_images_per_prompt},"
                " which is `num_images_per_prompt`: those are chosen among the candidates."
            )
        if self.reranker is None:
            raise ValueError(
                "`num_candidates` needs a reranker to choose by, which this pipeline has not: load it with `reranker`"
                " and `reranker_processor` (any CLIP-like model), or draw with `num_images_per_prompt` alone."
            )
        if output_type == "latent":
            raise ValueError(
                "`num_candidates` ranks pictures, but `output_type='latent'` returns tokens before there are any: ask"
                " for 'pil', 'np' or 'pt'."
            )

    def _check_prefix(self, image: Any, num_prefix_rows: int | None, latents: Any, num_images: int) -> None:
        grid_size, num_codes = self.dvae.image_grid_size, self.dvae.config.vocab_size
        if image is not None and latents is not None:
            raise ValueError("Both `image` and `latents` are given; a picture can start from one of them.")
        if (image is None) != (num_prefix_rows is None):
            raise ValueError("`image` and `num_prefix_rows` belong together: a picture, and how many rows of it stay.")
        if num_prefix_rows is not None and not (isinstance(num_prefix_rows, int) and 0 < num_prefix_rows < grid_size):
            raise ValueError(
                f"`num_prefix_rows` is {num_prefix_rows!r}; a picture has {grid_size} rows of tokens, of which 1 to"
                f" {grid_size - 1} can be kept."
            )
        if latents is None:
            return
        shape: Any = getattr(latents, "shape", ())
        dtype = getattr(latents, "dtype", type(latents))
        is_flat, is_grid = len(shape) == 2, len(shape) == 3 and shape[2] == grid_size
        if dtype not in (torch.int64, torch.int32) or not (is_flat or is_grid) or shape[0] != num_images:
            raise ValueError(
                f"`latents` are image tokens, integers of shape {num_images} x k or {num_images} x rows x {grid_size};"
                f" got {tuple(shape)} of {dtype}."
            )
        if not 0 < latents[0].numel() <= grid_size**2 or latents.min() < 0 or latents.max() >= num_codes:
            raise ValueError(f"`latents` hold 1 to {grid_size**2} tokens a picture, each in [0, {num_codes}).")

    def encode_prompt(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = False,
    ) -> dict[str, torch.Tensor]:
        """
        Turns captions into ids; what is too long for the prior is cut with a warning that quotes it.

        Args:
            prompt (`str` or `list[str]`): B captions.
            negative_prompt (`str` or `list[str]`, *optional*): one for all, or B; by default none at all.
            do_classifier_free_guidance (`bool`): whether the negative prompts are needed.

        Returns:
            `dict`: `text_ids` and `attention_mask`, and with guidance the same with `negative_` in front; each B x T.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        captions: dict[str, Any] = {"": prompts}
        if do_classifier_free_guidance:
            negative_prompt = negative_prompt or ""
            is_one = isinstance(negative_prompt, str)
            captions["negative_"] = [negative_prompt] * len(prompts) if is_one else negative_prompt
            if self.prior.config.caption_dropout == 0:
                logger.warning(
                    "Guidance is on (`guidance_scale` above 1), but this prior was trained without caption dropout: it"
                    " never saw a picture without its caption, and guidance may make its pictures worse."
                )
        elif negative_prompt is not None:
            logger.warning("`negative_prompt` has no effect: there is no guidance at a `guidance_scale` of 1.")
        text_inputs = {}
        for prefix, batch in captions.items():
            encoded = encode_captions(self.tokenizer, batch, self.prior.config.text_length).to(self._execution_device)
            text_inputs[f"{prefix}text_ids"] = encoded["input_ids"]
            text_inputs[f"{prefix}attention_mask"] = encoded["attention_mask"]
        return text_inputs

    def encode_image_prefix(self, image: Any, num_prefix_rows: int, num_prompts: int) -> torch.Tensor:
        """
        Encodes pictures and keeps their top rows of tokens (paper, section 3.3).

        Args:
            image: one picture, or one a prompt, as [`DalleImageProcessor`] takes them.
            num_prefix_rows (`int`): rows of tokens to keep.
            num_prompts (`int`): B.

        Returns:
            `torch.LongTensor`: B x (rows * grid).
        """
        pixel_values = self.image_processor.preprocess(image).pixel_values
        if len(pixel_values) not in (1, num_prompts):
            raise ValueError(f"There are {len(pixel_values)} pictures for {num_prompts} prompts: give 1 or as many.")
        tokens = self.dvae.encode(pixel_values.to(self._execution_device, self.dvae.dtype)).tokens
        return tokens[:, :num_prefix_rows].flatten(1).expand(num_prompts, -1)

    def _check_safety(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        if self.safety_checker is None:
            return images, None
        checked, has_nsfw_concepts = self.safety_checker(images=self.image_processor.postprocess(images, "np"))
        return torch.as_tensor(checked).movedim(-1, 1), list(has_nsfw_concepts)

    def _rerank(
        self,
        prompts: list[str],
        tokens: torch.Tensor,
        chunks: list[Chunk],
        num_images_per_prompt: int,
        max_batch_size: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool] | None]:
        """
        Decodes, checks and scores tokens, (B * m) x N, a chunk at a time; only each prompt's best n pictures stay. The
        images, (B * n) x 3 x H x W, and what is known of them, best first.
        """
        best, batch_size = [BestImages(num_images_per_prompt) for _ in prompts], chunks[0].num_images
        for chunk in chunks:
            images, flags = self._check_safety(self.decode_tokens(tokens[chunk.images], max_batch_size))
            is_flagged = torch.tensor(flags or [False] * len(images))
            pictures, num_each = self.image_processor.postprocess(images, "pil"), chunk.num_images_per_prompt
            for first, index in enumerate(range(chunk.prompts.start, chunk.prompts.stop)):
                rows = slice(first * num_each, (first + 1) * num_each)
                with explain_out_of_memory("reranking", batch_size):
                    scores = score_images(self.reranker, self.reranker_processor, prompts[index], pictures[rows])
                best[index].add(images[rows], scores, is_flagged[rows])
        images, scores = torch.cat([part.images for part in best]), torch.cat([part.scores for part in best])
        flags = [flag for part in best for flag in part.is_flagged.tolist()]
        return images, scores, flags if self.safety_checker is not None else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "DALLEPipeline":
        """
        As [`DiffusionPipeline.from_pretrained`], from a folder or a repository of the Hub.

        Raises:
            OSError: if a file is missing or damaged, which is named.
            ValueError: if the parts do not fit each other.
        """
        if Path(pretrained_model_name_or_path).is_dir():
            check_folder(Path(pretrained_model_name_or_path), given=kwargs.keys())
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def to_json_string(self) -> str:
        """The content of model_index.json, without the place that this pipeline was loaded from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _check_strings(name: str, values: Any) -> None:
    if not isinstance(values, list | tuple) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"`{name}` must be a string or a list of strings, at least one; got {values!r}.")


def _check_fit(prior, dvae, tokenizer, image_processor) -> None:
    if any(part is None for part in (prior, dvae, tokenizer, image_processor)):
        raise ValueError("A `DALLEPipeline` needs all of `prior`, `dvae`, `tokenizer` and `image_processor`.")
    config, num_ids, size = prior.config, len(tokenizer), image_processor.size.height
    pairs = [
        ("dvae.config.vocab_size", dvae.config.vocab_size, "prior.config.image_vocab_size", config.image_vocab_size),
        ("dvae.image_grid_size", dvae.image_grid_size, "prior.config.image_grid_size", config.image_grid_size),
        ("tokenizer.model_max_length", tokenizer.model_max_length, "prior.config.text_length", config.text_length),
        ("tokenizer.bos_token_id", tokenizer.bos_token_id, "prior.config.bos_token_id", config.bos_token_id),
        ("image_processor.size", size, "dvae.config.sample_size", dvae.config.sample_size),
        ("len(tokenizer)", num_ids, "prior.config.text_vocab_size", min(num_ids, config.text_vocab_size)),
    ]
    for name, number, other_name, other_number in pairs:
        if number != other_number:
            raise ValueError(f"The parts do not fit: `{name}` is {number}, but `{other_name}` is {other_number}.")
