"""Stage 2, the prior: cross-entropy over caption and image tokens of a frozen dVAE, drawn captions as validation.

The model is `hf_dalle.modeling_dalle_prior`; the loop that drives this lives in `loop.py`, the start from a published
checkpoint and LoRA in `finetune_prior.py`. Image tokens come from the dVAE at each step, or from the store that
`precompute_image_tokens.py` wrote.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from arguments import PriorArguments
from diffusers.utils import make_image_grid
from finetune_prior import add_adapter, find_start, load_prior, save_adapter
from huggingface_hub.errors import StrictDataclassError
from loading import image_datasets
from optimizers import exempt_from_decay, split_matrices
from PIL import Image
from precompute_image_tokens import check_store
from settings_file import check_names
from train_dvae import save_dvae
from transformers import AutoTokenizer

from hf_dalle import DalleDVAE, DalleImageProcessor, DALLEPipeline, DallePriorConfig, DallePriorForCausalLM
from hf_dalle.data import CaptionImageCollator, read_in_order
from hf_dalle.losses import dvae_loss
from hf_dalle.metrics import bits_per_dim, codes_used, perplexity, pixel_bits_per_dim, psnr
from hf_dalle.sampling import resolve_settings


logger = get_logger(__name__)


class PriorStage:
    """Model, data, loss and validation of stage 2."""

    def __init__(self, args: PriorArguments):
        self.args = args = find_start(args)
        self.dvae = load_part("dvae", DalleDVAE, args.dvae).requires_grad_(False).eval()
        self.image_processor = DalleImageProcessor(size=self.dvae.config.sample_size)
        self.tokenizer = load_part("tokenizer", AutoTokenizer, args.tokenizer)
        self.model = load_prior(args) if args.init_from else DallePriorForCausalLM(self._make_config())
        self._pipeline(self.model)  # which refuses parts that do not fit
        if args.lora_rank is not None:
            add_adapter(self.model, args)
        self.model.set_attn_implementation(args.attn_implementation)
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        check_names(args.generation, ["guidance_scale", "temperature", "top_k", "top_p"], "`generation`")
        resolve_settings(self.model.generation_config, **args.generation)
        self.model.generation_config.update(**args.generation)
        if args.tokens_column is not None:
            _check_tokens(args)
        choices = {"caption_column": args.caption_column, "tokens_column": args.tokens_column}
        choices |= {"caption_dropout": args.caption_dropout, "caption_word_dropout": args.caption_word_dropout}
        self.train_dataset, self.validation_dataset = image_datasets(
            args, self.image_processor, (3 / 8, 5 / 8), **choices
        )
        text_length = self.model.config.text_length
        self.collator = CaptionImageCollator(self.tokenizer, text_length, bpe_dropout=args.bpe_dropout)
        self.validation_collator = CaptionImageCollator(self.tokenizer, text_length)
        self._dvae_figures = None

    def _make_config(self) -> DallePriorConfig:
        """The model's sizes from the YAML; what the tokenizer and the dVAE fix, from them."""
        fixed = {
            "text_vocab_size": len(self.tokenizer),
            "text_length": self.tokenizer.model_max_length,
            "image_vocab_size": self.dvae.config.vocab_size,
            "image_grid_size": self.dvae.image_grid_size,
            "caption_dropout": self.args.caption_dropout,
        }
        check_names(self.args.model, list(DallePriorConfig.__annotations__), "`model`")
        for name, value in fixed.items():
            if self.args.model.get(name, value) != value:
                raise ValueError(
                    f"`model` asks for {name} {self.args.model[name]}, but the tokenizer, the dVAE and the settings of"
                    f" this run give {value}. Leave it out."
                )
        try:
            return DallePriorConfig(**{**self.args.model, **fixed})
        except StrictDataclassError as error:
            raise ValueError(f"A value in `model` does not fit: {error}") from error

    def parameter_groups(self) -> list[dict]:
        """All parameters, by default decayed alike as in the paper. With LoRA these are the adapters'."""
        groups = split_matrices(self.model, is_muon=self.args.optimizer == "muon")
        return exempt_from_decay(self.model, groups) if self.args.use_no_decay_groups else groups

    def _image_tokens(self, batch: dict) -> torch.Tensor:
        """B x N tokens, stored or encoded now, in full precision."""
        if "image_tokens" in batch:
            tokens, num_tokens = batch["image_tokens"], self.model.config.num_image_tokens
            if tokens.shape[1] != num_tokens:
                raise ValueError(f"The stored pictures have {tokens.shape[1]} tokens, but the dVAE's {num_tokens}.")
            return tokens
        pixel_values = batch["pixel_values"]
        with torch.no_grad():
            return self.dvae.to(pixel_values.device).encode(pixel_values).tokens.flatten(1)

    def _hide_image_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        The stream with start-of-image in the place of some image tokens, of each picture another share: what the
        states before do not tell, the caption has to.
        """
        share = torch.rand(len(input_ids), 1, device=input_ids.device) * self.args.image_token_dropout
        is_hidden = torch.rand(input_ids.shape, device=input_ids.device) < share
        is_hidden[:, : self.model.config.text_length] = False
        return input_ids.masked_fill(is_hidden, self.model.config.image_start_token_id)

    def compute_loss(self, model: torch.nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        stream = self.model.join_stream(batch["input_ids"], batch["attention_mask"], self._image_tokens(batch))
        labels = stream["input_ids"].clone()
        # A dropped caption teaches the image tokens' marginal; that captions are empty it shall not teach.
        labels[:, : self.model.config.text_length].masked_fill_(batch["caption_dropped"][:, None], -100)
        input_ids = stream["input_ids"]
        if model.training and self.args.image_token_dropout:
            input_ids = self._hide_image_tokens(input_ids)
        output = model(input_ids=input_ids, labels=labels)
        losses = {"text_loss": output.text_loss, "caption_loss": output.caption_loss, "image_loss": output.image_loss}
        loss = output.loss
        if model.training and output.text_loss is not None:
            # A mean over the captions kept would weigh each by how many its batch has; as parts of what is kept on
            # average, any split of an update into batches gives the same gradients.
            share = (~batch["caption_dropped"]).float().mean() / (1 - self.args.caption_dropout)
            loss = loss + self.model.config.text_loss_weight * (share - 1) * output.text_loss
        return loss, {name: value for name, value in losses.items() if value is not None}

    def validate(self, model: DallePriorForCausalLM) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """
        The losses on the validation set, bits a dimension and codebook use, and pictures drawn for
        `validation_prompts`.

        The paper's bound on -ln p(x | y) is `E_q[-ln p(x | y, z)] + KL(q(z | x) || p(z | y))`; stage 2 takes for q the
        encoder's likeliest tokens, and then the second term is the prior's `-ln p(z | y)`. Over 3 H W ln 2 that is
        `validation_token_bits_per_dim`. The first term and the dVAE's PSNR are those of [`_measure_dvae`], where there
        are pictures; `validation_bits_per_dim` is the sum.
        """
        values, pictures = {}, {}
        if self.validation_dataset is not None:
            sums, weights, counts = {}, {}, torch.zeros(self.model.config.image_vocab_size)
            for batch in self._validation_batches(model.device):
                batch["image_tokens"] = self._image_tokens(batch)
                loss, logs = self.compute_loss(model, batch, step=0)
                counts += torch.bincount(batch["image_tokens"].flatten().cpu(), minlength=len(counts))
                for name, value in {"loss": loss, **logs}.items():
                    # each picture has as many tokens as the next, but captions differ: start-of-text is no target
                    is_caption = name == "caption_loss"
                    weight = batch["attention_mask"][:, 1:].sum().item() if is_caption else len(batch["input_ids"])
                    sums[name] = sums.get(name, 0.0) + value.item() * weight
                    weights[name] = weights.get(name, 0) + weight
            values = {name: value / weights[name] for name, value in sums.items()}
            values |= {"perplexity": perplexity(counts), "codes_used": codes_used(counts), **self._measure_dvae(model)}
            nats = values["image_loss"] * self.model.config.num_image_tokens
            values["token_bits_per_dim"] = bits_per_dim(nats, 3 * self.dvae.config.sample_size**2)
            if "pixel_bits_per_dim" in values:
                values["bits_per_dim"] = values["token_bits_per_dim"] + values["pixel_bits_per_dim"]
            values = {f"validation_{name}": value for name, value in values.items()}
        if self.args.validation_prompts:
            pictures["samples"] = self._draw(model)
        return values, pictures

    def _validation_batches(self, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        sizes = {"batch_size": self.args.eval_batch_size, "max_samples": self.args.max_validation_samples}
        for batch in read_in_order(self.validation_dataset, collator=self.validation_collator, **sizes):
            yield {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value)}

    def _measure_dvae(self, model: DallePriorForCausalLM) -> dict[str, float]:
        """
        PSNR and -ln p(x | z) of the frozen dVAE on the validation pictures, once a run; nothing of stored tokens. A
        likelihood that needs more bits than the pixels themselves, 8 a dimension, was not trained (`pixel_l1_weight`):
        it is left out.
        """
        if self.args.tokens_column is not None:
            return {}
        if self._dvae_figures is None:
            dvae, config, decibels, nll = self.dvae.to(model.device), self.dvae.config, [], 0.0
            for batch in self._validation_batches(model.device):
                pixels = batch["pixel_values"]
                encoded = dvae.encode(pixels)
                decoded = dvae.decode(encoded.tokens)
                decibels += psnr(pixels, decoded.sample).tolist()
                maps = (decoded.mu, decoded.log_b, encoded.logits)
                nll += dvae_loss(pixels, *maps, 0.0, config.logit_laplace_eps, config.quantizer).nll.item() * len(
                    pixels
                )
            bits = pixel_bits_per_dim(nll / len(decibels), 3 * config.sample_size**2, config.logit_laplace_eps)
            self._dvae_figures = {"dvae_psnr": math.fsum(decibels) / len(decibels)}
            if bits < 8:
                self._dvae_figures["pixel_bits_per_dim"] = bits
        return self._dvae_figures

    def _draw(self, model: DallePriorForCausalLM) -> Image.Image:
        """A row of pictures for each validation caption, from one seed."""
        pipe = self._pipeline(model)
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(
            self.args.validation_prompts,
            num_images_per_prompt=self.args.num_validation_images,
            generator=torch.Generator().manual_seed(self.args.seed),
        ).images
        return make_image_grid(drawn, rows=len(self.args.validation_prompts), cols=self.args.num_validation_images)

    def _pipeline(self, model: DallePriorForCausalLM) -> DALLEPipeline:
        return DALLEPipeline(
            prior=model,
            dvae=self.dvae.to(model.device),
            tokenizer=self.tokenizer,
            image_processor=self.image_processor,
        )

    def save(self, model: DallePriorForCausalLM, folder: Path) -> None:
        """Writes a folder for [`DALLEPipeline.from_pretrained`]; with LoRA one for `load_lora_weights`."""
        if self.args.lora_rank is not None:
            save_adapter(model, folder, self.args.weights_dtype)
            return
        self._pipeline(model.eval()).save_pretrained(folder)
        if self.args.weights_dtype == "float32":
            return
        # Transformers loads weights as its config's dtype: that stays float32, where the file holds halves.
        dtype, halves = getattr(torch, self.args.weights_dtype), {}
        weights = {
            name: halves.setdefault(value.data_ptr(), value.to(dtype))  # tied weights stay one tensor
            for name, value in model.state_dict().items()
        }
        model.save_pretrained(folder / "prior", state_dict=weights)
        save_dvae(self.dvae, folder / "dvae", self.args.weights_dtype)


def _check_tokens(args: PriorArguments) -> None:
    """Refuses stored tokens of another dVAE; those of the Hub have no stamp that could tell."""
    folder = Path(args.train_data_dir or args.dataset_name)
    if args.train_data_dir is not None or folder.is_dir():
        check_store(folder, Path(args.dvae))
    else:
        logger.warning(f"Nothing tells whether the tokens of {args.dataset_name} are of the dVAE {args.dvae}.")


def load_part(name: str, kind: type, folder: str) -> Any:
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise OSError(f"`{name}` is {folder}, which cannot be loaded: {error}") from error
