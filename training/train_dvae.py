"""Stage 1, the dVAE: the evidence lower bound under the paper's schedules, reconstructions as validation.

The model is `hf_dalle.autoencoder_dalle_dvae`, the bound `hf_dalle.losses`; the loop that drives this lives in
`loop.py`.
"""

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from arguments import DVAEArguments
from diffusers.utils import make_image_grid
from initialize_dvae import initialize_from_data, revive_codes
from loading import image_datasets
from optimizers import exempt_from_decay
from PIL import Image
from settings_file import check_names

from hf_dalle import DalleDVAE, DalleImageProcessor
from hf_dalle.autoencoder_dalle_dvae import DalleDVAEDecoderOutput
from hf_dalle.data import CaptionImageCollator, read_in_order
from hf_dalle.losses import DVAELoss, dvae_loss, pixel_loss
from hf_dalle.metrics import codes_used, perplexity, pixel_bits_per_dim, psnr
from hf_dalle.optimization import cosine_anneal


logger = get_logger(__name__)


class DVAEStage:
    """Model, data, loss and validation of stage 1."""

    def __init__(self, args: DVAEArguments):
        self.args = args
        check_names(args.model, list(inspect.signature(DalleDVAE).parameters), "`model`")
        try:
            self.model = DalleDVAE(**args.model)
        except TypeError as error:
            raise ValueError(f"A value in `model` is of the wrong type: {error}.") from error
        self.image_processor = DalleImageProcessor(size=self.model.config.sample_size)
        self.train_dataset, self.validation_dataset = image_datasets(
            args, self.image_processor, crop_range=(0, 1), caption_column=None
        )
        self.collator = CaptionImageCollator()
        self.code_counts = torch.zeros(self.model.config.vocab_size)
        if args.codebook_revival_share is not None and self.model.config.quantizer != "nearest":
            raise ValueError("`codebook_revival_share` needs `quantizer: nearest`: only there codes have counts.")
        if args.initial_kl_per_token is not None or args.codebook_revival_share is not None:
            self._initialize()
        self.model.to(memory_format=torch.channels_last)  # the quicker layout for convolutions, on CPUs in bf16 too

    def _initialize(self, num_pictures: int = 768):
        pixel_values = self.collator(self.train_dataset.draw_items(num_pictures))["pixel_values"]
        initialize_from_data(self.model, pixel_values, self.args.initial_kl_per_token, self.args.seed)

    def parameter_groups(self) -> list[dict]:
        """The encoder at `encoder_lr_ratio` of the decoder's learning rate."""
        encoder = list(self.model.encoder.parameters())
        groups = [
            {"params": list(self.model.decoder.parameters())},
            {"params": encoder, "lr": self.args.learning_rate * self.args.encoder_lr_ratio},
        ]
        return exempt_from_decay(self.model, groups) if self.args.use_no_decay_groups else groups

    def compute_loss(self, model: torch.nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        args, pixel_values = self.args, batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        self._revive_codes(pixel_values, step)
        temperature = cosine_anneal(step, args.temperature_start, args.temperature_end, args.temperature_anneal_steps)
        beta = cosine_anneal(step, 0.0, args.kl_weight, args.kl_weight_warmup_steps)
        output = model(pixel_values, temperature)
        self.code_counts = self.code_counts.to(output.tokens.device)
        self.code_counts += torch.bincount(output.tokens.flatten(), minlength=len(self.code_counts))
        logs = {"temperature": temperature, "kl_weight": beta}
        if self.model.config.quantizer == "nearest":
            beta, logs = 0.0, {"commitment_loss": output.commitment_loss}  # its KL is a constant
        parts = self._elbo(pixel_values, output, output.logits, beta)
        if self._has_pixel_loss:
            error = pixel_loss(pixel_values, output.sample, args.pixel_l1_weight, args.pixel_l2_weight)
            loss = error + beta * parts.kl / pixel_values[0].numel()
            logs["pixel_loss"] = error
        else:
            loss = parts.loss
            logs["nll"] = parts.nll / pixel_values[0].numel()
        if self.model.config.quantizer == "gumbel":
            logs["kl_per_token"] = parts.kl / output.tokens[0].numel()
        return loss + output.commitment_loss, logs

    @property
    def _has_pixel_loss(self) -> bool:
        return self.args.pixel_l1_weight > 0 or self.args.pixel_l2_weight > 0

    def _revive_codes(self, pixel_values: torch.Tensor, step: int) -> None:
        """Every `codebook_revival_steps` updates; not in the last fifth, so that all codes end up trained."""
        args = self.args
        is_due = step > 0 and step % args.codebook_revival_steps == 0 and step < 0.8 * args.max_train_steps
        if args.codebook_revival_share is not None and self.model.training and is_due:
            revive_codes(self.model, pixel_values, args.codebook_revival_share, args.seed + step)

    def _elbo(
        self, pixel_values: torch.Tensor, decoded: DalleDVAEDecoderOutput, logits: torch.Tensor, beta: float
    ) -> DVAELoss:
        config = self.model.config
        return dvae_loss(
            pixel_values,
            decoded.mu,
            decoded.log_b,
            logits,
            beta,
            config.logit_laplace_eps,
            config.quantizer,
            self.args.min_log_b,
        )

    def validate(self, model: DalleDVAE) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """
        PSNR, likelihood (nats of mapped pixels, and bits a dimension of pixels in 0 ... 255: see
        [`~hf_dalle.metrics.pixel_bits_per_dim`]) and codebook use of the unrelaxed model, with `train_perplexity`
        since the last time.
        """
        values = {"train_perplexity": perplexity(self.code_counts)}
        self._watch_codebook(values["train_perplexity"])
        self.code_counts.zero_()
        if self.validation_dataset is None:
            return values, {}
        num_shown = self.args.num_validation_images
        decibels, nll, counts, shown = [], 0.0, torch.zeros_like(self.code_counts), []
        sizes = {"batch_size": self.args.eval_batch_size, "max_samples": self.args.max_validation_samples}
        for batch in read_in_order(self.validation_dataset, collator=self.collator, **sizes):
            pixels = batch["pixel_values"].to(model.device)
            encoded = model.encode(pixels)
            decoded = model.decode(encoded.tokens)
            decibels += psnr(pixels, decoded.sample).tolist()
            parts = self._elbo(pixels, decoded, encoded.logits, beta=0.0)
            nll += parts.nll.item() / pixels[0].numel() * len(pixels)
            counts += torch.bincount(encoded.tokens.flatten(), minlength=len(counts))
            shown += list(zip(pixels, decoded.sample, strict=True))[: num_shown - len(shown)]
        values |= {
            "validation_psnr": math.fsum(decibels) / len(decibels),
            "validation_perplexity": perplexity(counts),
            "validation_codes_used": codes_used(counts),
        }
        if not self._has_pixel_loss:  # with it nothing trains the likelihood's scale
            values["validation_nll"] = nll = nll / len(decibels)  # a channel
            values["validation_pixel_bits_per_dim"] = pixel_bits_per_dim(nll, 1, model.config.logit_laplace_eps)
        return values, {"reconstructions": self._grid(shown)}

    def _watch_codebook(self, used: float):
        vocab_size = self.model.config.vocab_size
        if not 0 < used < vocab_size / 10:
            return
        changes = "set `codebook_revival_share` (0.07, say), lower `learning_rate`"
        if self.model.config.quantizer == "gumbel":
            changes = (
                "lower `kl_weight` or lengthen `kl_weight_warmup_steps`, anneal the temperature more slowly"
                " (`temperature_anneal_steps`), start from the data (`initial_kl_per_token`)"
            )
        logger.warning(
            f"The codebook's perplexity is {used:.0f} of {vocab_size} codes. If it stays under a tenth, {changes}, or"
            " make `vocab_size` smaller."
        )

    def _grid(self, shown: list[tuple[torch.Tensor, torch.Tensor]]) -> Image.Image:
        """Originals above, reconstructions below."""
        rows = [torch.stack(row) for row in zip(*shown, strict=True)]
        pictures = [picture for row in rows for picture in self.image_processor.postprocess(row, output_type="pil")]
        return make_image_grid(pictures, rows=2, cols=len(shown))

    def state_dict(self) -> dict:
        """This process's counts since the last validation, for its checkpoint."""
        return {"code_counts": self.code_counts}

    def load_state_dict(self, state: dict) -> None:
        self.code_counts = state["code_counts"].clone()

    def add_state_dict(self, state: dict) -> None:
        """Adds that of a process which is there no more."""
        self.code_counts = self.code_counts + state["code_counts"]

    def save(self, model: DalleDVAE, folder: Path) -> None:
        """Writes a folder for [`DalleDVAE.from_pretrained`], with its image processor."""
        save_dvae(model, folder, self.args.weights_dtype)
        self.image_processor.save_pretrained(folder)


def save_dvae(model: DalleDVAE, folder: Path, dtype: str) -> None:
    """Saves the weights in `dtype`, which diffusers loads as float32, and leaves the model as it is."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    # torch's own method: that of diffusers warns of modules to keep in float32, though there are none
    torch.nn.Module.to(model, getattr(torch, dtype)).save_pretrained(folder)
    torch.nn.Module.to(model, torch.float32).load_state_dict(weights)
