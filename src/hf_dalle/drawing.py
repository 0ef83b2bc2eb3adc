"""A call's candidates, chunk after chunk: drawn, shown to the callback while they are unfinished, decoded.

How one chunk's tokens are drawn lives in `sampling.py`, how many pictures fit into memory in `candidates.py`; what
comes before and after is `pipeline_dalle.py`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .candidates import (
    Chunk,
    check_max_batch_size,
    count_decoding_bytes,
    count_drawing_bytes,
    count_fitting,
    explain_out_of_memory,
    split_candidates,
)
from .sampling import draw_image_tokens, drop_kept, kept_bytes


class DalleDrawingMixin:
    """Draws and decodes as many pictures at once as memory holds; for a pipeline with a prior and a dVAE."""

    # what the mixin stands on; the pipeline's other bases have it
    prior: Any
    dvae: Any
    image_processor: Any
    progress_bar: Any
    _execution_device: Any
    _interrupt: bool

    @property
    def num_timesteps(self) -> int:
        """How many steps the current or last call takes: as many as image tokens to draw, for each chunk."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether drawing stops after this token: a callback may set `pipe._interrupt = True`."""
        return self._interrupt

    def decode_tokens(self, tokens: torch.Tensor, max_batch_size: int | None = None) -> torch.Tensor:
        """
        Image tokens to pictures.

        Args:
            tokens (`torch.LongTensor`): B x (grid * grid).
            max_batch_size (`int`, *optional*): how many are decoded at once, if free memory holds them.

        Returns:
            `torch.Tensor`: B x 3 x H x W in [0, 1].
        """
        check_max_batch_size(max_batch_size)
        grids = tokens.unflatten(1, (self.dvae.image_grid_size, -1))
        bytes_each = count_decoding_bytes(self.dvae)
        num_fitting = count_fitting(self.dvae, tokens.device, bytes_each)
        if num_fitting < len(grids):
            drop_kept(self.prior)
            num_fitting = count_fitting(self.dvae, tokens.device, bytes_each)
        batch_size = min(num_fitting if max_batch_size is None else max_batch_size, num_fitting, len(grids))
        with explain_out_of_memory("decoding", batch_size):
            return torch.cat([self.dvae.decode(part).sample for part in grids.split(batch_size)])

    @torch.no_grad()
    def decode_partial(
        self, latents: torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        r"""
        Decodes pictures that are still being drawn. It costs a decoding where a callback asks for it, else nothing:

        ```py
        def show_rows(pipe, step, cell, tensors):
            if (cell + 1) % pipe.dvae.image_grid_size == 0:  # a row is complete
                pipe.decode_partial(tensors["latents"][:1])[0].save("so_far.png")


        pipe("a red fox", callback_on_step_end=show_rows)
        ```

        Args:
            latents (`torch.LongTensor`):
                B x grid x grid, as a callback gets them, or some of its pictures. What is not drawn yet, -1, becomes
                the token of a mean-grey picture (0.5), as in an interrupted drawing.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.

        Returns:
            B pictures, neither checked nor reranked.

        Raises:
            ValueError: for tokens of another shape or range.
        """
        grid_size = self.dvae.image_grid_size
        if latents.ndim != 3 or latents.shape[1:] != (grid_size, grid_size):
            raise ValueError(f"`latents` must be B x {grid_size} x {grid_size} tokens; got {tuple(latents.shape)}.")
        tokens = self._fill_with_grey(latents.flatten(1).to(self._execution_device))
        return self.image_processor.postprocess(self.decode_tokens(tokens), output_type)

    def _split_call(
        self,
        num_prompts: int,
        num_images_per_prompt: int,
        max_batch_size: int | None,
        image_prefix: torch.Tensor | None,
        do_classifier_free_guidance: bool,
    ) -> list[Chunk]:
        """The chunks of a call."""
        if max_batch_size is None:
            num_prefixes, num_given = image_prefix.shape if image_prefix is not None else (num_prompts, 0)
            bytes_each = count_drawing_bytes(
                self.prior.config,
                self.prior.dtype,
                num_streams=2 if do_classifier_free_guidance else 1,
                num_images_per_prompt=num_images_per_prompt,
                num_prefix_tokens=num_given,
                num_images_per_prefix=num_prompts * num_images_per_prompt // num_prefixes,
            )
            device = self._execution_device
            max_batch_size = count_fitting(self.prior, device, bytes_each, kept_bytes(self.prior, device))
        return split_candidates(num_prompts, num_images_per_prompt, max_batch_size)

    def _draw_tokens(
        self,
        chunks: list[Chunk],
        callback: Callable | None,
        callback_tensor_inputs: Sequence[str],
        image_prefix: torch.Tensor | None,
        generators: list[torch.Generator],
        **kwargs,
    ) -> torch.Tensor:
        """Image tokens, (B * n) x N; of an interrupted drawing those missing are a mean-grey patch's."""
        num_images, num_cells = len(generators), self.prior.config.num_image_tokens
        tokens = torch.full((num_images, num_cells), -1, device=self._execution_device)
        if image_prefix is not None:
            num_given = image_prefix.shape[1]
            tokens[:, :num_given] = image_prefix.repeat_interleave(num_images // len(image_prefix), dim=0)
            num_cells -= num_given
        self._num_timesteps, step = len(chunks) * num_cells, 0
        if num_cells == 0:
            return tokens
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for chunk in chunks:
                for cell, drawn in self._draw_chunk(chunk, image_prefix, generators, **kwargs):
                    if callback is not None:
                        tokens[chunk.images] = drawn
                        self._call_back(callback, callback_tensor_inputs, step, cell, tokens, chunk.images)
                        drawn[:, cell] = tokens[chunk.images, cell]
                    progress_bar.update()
                    step += 1
                    if self.interrupt:
                        break
                tokens[chunk.images] = drawn
                if self.interrupt:
                    break
        if len(chunks) > 1:  # what was drawn last has filled the memory, and may be of another size than the next call
            drop_kept(self.prior)
        return self._fill_with_grey(tokens)

    def _draw_chunk(
        self,
        chunk: Chunk,
        image_prefix: torch.Tensor | None,
        generators: list[torch.Generator],
        text_inputs: dict[str, torch.Tensor],
        settings: dict[str, Any],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        if image_prefix is not None:  # one an image, or one a prompt
            image_prefix = image_prefix[chunk.images if len(image_prefix) == len(generators) else chunk.prompts]
        texts = {name: part[chunk.prompts] for name, part in text_inputs.items()}
        try:
            with explain_out_of_memory("drawing", chunk.num_images):
                yield from draw_image_tokens(
                    self.prior,
                    **texts,
                    generators=generators[chunk.images],
                    num_images_per_prompt=chunk.num_images_per_prompt,
                    image_prefix=image_prefix,
                    **settings,
                )
        except torch.OutOfMemoryError:
            drop_kept(self.prior)  # buffers of which some are missing; and a smaller number needs the room
            raise

    def _call_back(
        self, callback: Callable, tensor_inputs: Sequence[str], step: int, cell: int, tokens: torch.Tensor, rows: slice
    ) -> None:
        """Shows all `tokens`, (B * n) x N, to the callback, and puts what it returns into this cell of `rows`."""
        grid = tokens.unflatten(1, (self.dvae.image_grid_size, -1))  # a view
        returned = callback(self, step, cell, {name: grid.clone() for name in tensor_inputs}) or {}
        changed, num_codes = returned.get("latents", grid), self.dvae.config.vocab_size
        is_cell = (torch.arange(tokens.shape[1], device=tokens.device) == cell).view_as(grid[0])
        is_kept = changed.shape == grid.shape and torch.equal(changed[:, ~is_cell], grid[:, ~is_cell])
        chosen = changed[rows][:, is_cell] if is_kept else changed
        if not is_kept or chosen.min() < 0 or chosen.max() >= num_codes:
            raise ValueError(f"A callback may change the tokens of cell {cell} only, to others in [0, {num_codes}).")
        grid[rows] = changed[rows]

    def _fill_with_grey(self, tokens: torch.Tensor) -> torch.Tensor:
        missing = tokens < 0
        return torch.where(missing, self._grey_token(), tokens) if missing.any() else tokens

    def _grey_token(self) -> torch.Tensor:
        size = self.dvae.config.sample_size
        grey = torch.full((1, 3, size, size), 0.5, device=self._execution_device, dtype=self.dvae.dtype)
        return self.dvae.encode(grey).tokens.flatten().mode().values
