"""Stage 1, the dVAE: the evidence lower bound under the paper's schedules, reconstructions as validation.

The model is `hf_dalle.autoencoder_dalle_dvae`, the bound `hf_dalle.losses`; the loop that drives this lives in `loop.py`.
"""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from arguments import DVAEArguments, TrainArguments
from diffusers.utils import make_image_grid
from initialize_dvae import initialize_from_data
from PIL import Image
from torch.utils.data import DataLoader

from hf_dalle import DalleDVAE, DalleImageProcessor
from hf_dalle.data import CaptionImageCollator, CaptionImageDataset, RandomCrop, load_rows
from hf_dalle.losses import dvae_loss
from hf_dalle.optimization import cosine_anneal


logger = get_logger(__name__)


def image_datasets(
    args: TrainArguments, image_processor: DalleImageProcessor, crop_range: tuple[float, float], **kwargs
) -> tuple[CaptionImageDataset, CaptionImageDataset | None]:
    """The training and the validation set that `args` name; `kwargs` go to both datasets."""
    size = image_processor.size["height"]
    augmentation = None
    if args.resize_range is not None:
        augmentation = RandomCrop(size, args.resize_range, args.crop_range or crop_range, args.do_random_flip)
    columns = {"image_column": args.image_column, "image_processor": image_processor, "seed": args.seed, **kwargs}
    rows = load_rows(args.train_data_dir, args.dataset_name, args.train_split, args.image_column)
    train = CaptionImageDataset(rows, augmentation=augmentation, **columns)
    if args.validation_split is None:
        return train, None
    rows = load_rows(args.train_data_dir, args.dataset_name, args.validation_split, args.image_column)
    return train, CaptionImageDataset(rows, is_training=False, **columns)


class DVAEStage:
    """Model, data, loss and validation of stage 1."""

    def __init__(self, args: DVAEArguments):
        self.args = args
        self.model = DalleDVAE(**args.model)
        self.image_processor = DalleImageProcessor(size=self.model.config.sample_size)
        self.train_dataset, self.validation_dataset = image_datasets(
            args, self.image_processor, crop_range=(0, 1), caption_column=None
        )
        self.collator = CaptionImageCollator()
        self.code_counts = torch.zeros(self.model.config.vocab_size)
        if args.initial_kl_per_token is not None:
            self._initialize()

    def _initialize(self, num_pictures: int = 768):
        num_pictures = min(num_pictures, len(self.train_dataset))
        order = torch.randperm(len(self.train_dataset), generator=torch.Generator().manual_seed(self.args.seed))
        items = [self.train_dataset[index] for index in order[:num_pictures].tolist()]
        pixel_values = self.collator(items)["pixel_values"]
        initialize_from_data(self.model, pixel_values, self.args.initial_kl_per_token, self.args.seed)

    def parameter_groups(self) -> list[dict]:
        """The encoder at `encoder_lr_ratio` of the decoder's learning rate."""
        encoder = list(self.model.encoder.parameters())
        return [
            {"params": list(self.model.decoder.parameters())},
            {"params": encoder, "lr": self.args.learning_rate * self.args.encoder_lr_ratio},
        ]

    def compute_loss(self, model: torch.nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        args, config = self.args, self.model.config
        temperature = cosine_anneal(step, args.temperature_start, args.temperature_end, args.temperature_anneal_steps)
        beta = cosine_anneal(step, 0.0, args.kl_weight, args.kl_weight_warmup_steps)
        output = model(batch["pixel_values"], temperature)
        parts = dvae_loss(
            batch["pixel_values"],
            output.mu,
            output.log_b,
            output.logits,
            beta,
            config.logit_laplace_eps,
            config.quantizer,
            args.min_log_b,
        )
        self.code_counts += torch.bincount(output.tokens.flatten().cpu(), minlength=config.vocab_size)
        num_channels = batch["pixel_values"][0].numel()
        logs = {
            "nll": parts.nll / num_channels,
            "kl_per_token": parts.kl / output.tokens[0].numel(),
            "commitment_loss": output.commitment_loss,
            "temperature": temperature,
            "kl_weight": beta,
        }
        return parts.loss + output.commitment_loss, logs

    def validate(self, model: DalleDVAE) -> tuple[dict[str, float], dict[str, Image.Image]]:
        values = {"train_perplexity": perplexity(self.code_counts)}
        self._watch_codebook(values["train_perplexity"])
        self.code_counts.zero_()
        if self.validation_dataset is None:
            return values, {}
        loader = DataLoader(self.validation_dataset, self.args.eval_batch_size, collate_fn=self.collator)
        squared_error, nll, counts, shown = [], 0.0, torch.zeros_like(self.code_counts), []
        for batch in loader:
            pixels = batch["pixel_values"].to(model.device)
            encoded = model.encode(pixels)
            decoded = model.decode(encoded.tokens)
            squared_error += (decoded.sample - pixels).square().flatten(1).mean(1).tolist()
            parts = dvae_loss(
                pixels,
                decoded.mu,
                decoded.log_b,
                encoded.logits,
                beta=0.0,
                eps=model.config.logit_laplace_eps,
                min_log_b=self.args.min_log_b,
            )
            nll += parts.nll.item() / pixels[0].numel() * len(pixels)
            counts += torch.bincount(encoded.tokens.flatten().cpu(), minlength=len(counts))
            shown += list(zip(pixels, decoded.sample, strict=True))
        num_pictures = len(squared_error)
        values |= {
            "validation_psnr": sum(-10 * math.log10(max(error, 1e-10)) for error in squared_error) / num_pictures,
            "validation_nll": nll / num_pictures,
            "validation_perplexity": perplexity(counts),
        }
        return values, {"reconstructions": self._grid(shown[: self.args.num_validation_images])}

    def _watch_codebook(self, used: float):
        vocab_size = self.model.config.vocab_size
        if 0 < used < vocab_size / 10:
            logger.warning(
                f"The codebook's perplexity is {used:.0f} of {vocab_size} codes. If it stays under a tenth, lower"
                " `kl_weight` or lengthen `kl_weight_warmup_steps`, anneal the temperature more slowly"
                " (`temperature_anneal_steps`), or make `vocab_size` smaller."
            )

    def _grid(self, shown: list[tuple[torch.Tensor, torch.Tensor]]) -> Image.Image:
        """Originals above, reconstructions below."""
        rows = [torch.stack(row) for row in zip(*shown, strict=True)]
        pictures = [picture for row in rows for picture in self.image_processor.postprocess(row, output_type="pil")]
        return make_image_grid(pictures, rows=2, cols=len(shown))

    def save(self, model: DalleDVAE, folder: Path) -> None:
        save_in_dtype(model, folder, self.args.weights_dtype)
        self.image_processor.save_pretrained(folder)


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of the codes' frequencies: how many of the codes are in use, in effect; 0 without counts."""
    if not counts.sum():
        return 0.0
    return torch.special.entr(counts / counts.sum()).sum().exp().item()


def save_in_dtype(model: torch.nn.Module, folder: Path, dtype: str) -> None:
    """Saves a copy of the weights in `dtype` and leaves the model as it is."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    model.to(torch.float32).load_state_dict(weights)
