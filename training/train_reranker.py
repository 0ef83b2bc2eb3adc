"""Stage `reranker`: a small CLIP from scratch that tells which of many pictures fits a caption (paper, section 2.6).

Symmetric contrast over the pictures of all processes, real ones and the dVAE's reconstructions, since what is ranked
comes out of the dVAE. The model is transformers' `CLIPModel`, or its text side beside a ResNet; the loss is
`hf_dalle.losses`'s, the loop that drives this `loop.py`'s; `add_reranker.py` puts the model into a pipeline.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather
from arguments import RerankerArguments
from augmentation import distort
from diffusers.utils import make_image_grid
from huggingface_hub.errors import StrictDataclassError
from loading import image_datasets, read_column
from optimizers import exempt_from_decay
from PIL import Image
from settings_file import check_names
from tokenizers import processors
from train_prior import load_part
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_dalle import DalleDVAE, DalleImageProcessor, DalleImageTowerConfig
from hf_dalle.data import CaptionImageCollator, load_rows, read_in_order
from hf_dalle.losses import contrastive_loss


END_OF_TEXT = "<|endoftext|>"
MAX_LOGIT_SCALE = math.log(100)  # CLIP's
MEAN = STD = 0.5  # of pixels in [0, 1], as the processor takes them off
MAX_RIVALS = 10_000  # training captions that validation pictures have to tell from their own
NUM_FOUND = 5
Reranker = CLIPModel | VisionTextDualEncoderModel
# by `model_type`, what `vision_config` may name
IMAGE_SIDES = {
    CLIPVisionConfig.model_type: ["model_type", *CLIPVisionConfig.__annotations__],
    DalleImageTowerConfig.model_type: ["model_type", *ResNetConfig.__annotations__, "image_size"],
}


class RerankerStage:
    """Model, data, loss and validation of the reranker."""

    def __init__(self, args: RerankerArguments):
        self.args = args
        self.dvae = None
        if args.dvae is not None:
            self.dvae = load_part("dvae", DalleDVAE, args.dvae).requires_grad_(False).eval()
        tokenizer = load_part("tokenizer", AutoTokenizer, args.tokenizer)
        config = make_config(args.model, tokenizer, self.dvae.config.sample_size if self.dvae is not None else None)
        self.processor = make_processor(tokenizer, config.vision_config.image_size)
        self.model = make_model(config)
        self.image_processor = DalleImageProcessor(size=config.vision_config.image_size)
        columns = {"caption_column": args.caption_column, "caption_word_dropout": args.caption_word_dropout}
        self.train_dataset, self.validation_dataset = image_datasets(
            args, self.image_processor, (3 / 8, 5 / 8), **columns
        )
        self.collator = RerankerCollator(self.processor.tokenizer, self._read_negatives())
        self.rivals = self._read_rivals() if args.validation_split is not None else []

    def _read_negatives(self) -> list | None:
        name = self.args.negatives_column
        return self._read_column(name) if name is not None else None

    def _read_rivals(self) -> list[str]:
        """The first caption of each training row."""
        if self.args.streaming:
            return []
        captions = [texts[:1] if isinstance(texts, list) else [texts] for texts in self._read_column()]
        texts = [text for part in captions for text in part if isinstance(text, str) and text.strip()]
        return list(dict.fromkeys(texts))[:MAX_RIVALS]

    def _read_column(self, name: str | None = None) -> list:
        args, name = self.args, name or self.args.caption_column
        rows = load_rows(args.train_data_dir, args.dataset_name, args.train_split, args.image_column)
        if name not in rows.column_names:
            raise ValueError(f"The training data has no column {name!r}; it has {sorted(rows.column_names)}.")
        return read_column(rows, name)

    def parameter_groups(self) -> list[dict]:
        """All parameters, by default decayed as CLIP's: matrices alone."""
        groups = [{"params": list(self.model.parameters())}]
        return exempt_from_decay(self.model, groups) if self.args.use_no_decay_groups else groups

    # -------------------------------------------------------------------------------------------------------- the loss

    def compute_loss(self, model: torch.nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        pixel_values = self._reconstruct_some(distort(batch["pixel_values"], self.args.distortion))
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = model(pixel_values=(pixel_values - MEAN) / STD, **text)
        scale = self.model.logit_scale.exp()
        features = gather_features(output.image_embeds.float()), gather_features(output.text_embeds.float())
        loss = contrastive_loss(*features, scale, gather(batch["groups"]))
        return loss, {"logit_scale": scale.detach()}

    def _reconstruct_some(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """B x 3 x H x W, of which a share has passed through the dVAE, as all that will be ranked has."""
        is_chosen = torch.rand(len(pixel_values)) < self.args.reconstruction_share
        if self.dvae is None or not is_chosen.any():
            return pixel_values
        pixel_values = pixel_values.clone()
        with torch.autocast(pixel_values.device.type, torch.bfloat16, self.args.mixed_precision == "bf16"):
            pixel_values[is_chosen] = self._reconstruct(pixel_values[is_chosen])
        return pixel_values

    @torch.no_grad()
    def _reconstruct(self, pixel_values: torch.Tensor) -> torch.Tensor:
        dvae = self.dvae.to(pixel_values.device)
        return dvae.decode(dvae.encode(pixel_values).tokens).sample.to(pixel_values.dtype).clamp(0, 1)

    # ------------------------------------------------------------------------------------------------------ validation

    def validate(self, model: Reranker) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """
        Whether validation pictures and captions find each other.

        `validation_recall@k` is the share of pictures whose caption is among the k nearest of all validation captions
        and up to 10,000 training captions (`validation_reconstruction_recall@k` of their reconstructions), and
        `validation_image_recall@k` that of captions whose picture is among the k nearest validation pictures.
        `validation_loss` is the training loss with all validation rows as one batch.
        """
        if self.validation_dataset is None:
            return {}, {}
        sizes = {"batch_size": self.args.eval_batch_size, "max_samples": self.args.max_validation_samples}
        collator = RerankerCollator(self.processor.tokenizer)
        images, reconstructions, texts, groups, shown = [], [], [], [], []
        for batch in read_in_order(self.validation_dataset, collator=collator, **sizes):
            pixels = batch["pixel_values"].to(model.device)
            images.append(encode_images(model, pixels))
            if self.dvae is not None:
                reconstructions.append(encode_images(model, self._reconstruct(pixels)))
            texts.append(encode_texts(model, batch))
            groups.append(batch["groups"])
            shown.append(batch["pixel_values"])
        images, texts, groups = torch.cat(images), torch.cat(texts), torch.cat(groups)
        rivals = [texts, *(encode_texts(model, batch) for batch in self._rival_batches())]
        all_texts, all_groups = torch.cat(rivals), torch.cat([groups, group_values(self.rivals)])
        ranks = {"recall": rank_own(images, all_texts, groups, all_groups)}
        if reconstructions:
            ranks["reconstruction_recall"] = rank_own(torch.cat(reconstructions), all_texts, groups, all_groups)
        ranks["image_recall"] = rank_own(texts, images, groups, groups)
        scale = model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        values = {"validation_loss": contrastive_loss(images, texts, scale.cpu(), groups).item()}
        for name, found in ranks.items():
            values |= {f"validation_{name}@{k}": (found <= k).double().mean().item() for k in (1, NUM_FOUND)}
        return values, {"found": self._show_found(torch.cat(shown), images, texts)}

    def _rival_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        size = 8 * self.args.eval_batch_size
        for first in range(0, len(self.rivals), size):
            yield tokenize(self.processor.tokenizer, self.rivals[first : first + size])

    def _show_found(self, pixels: torch.Tensor, images: torch.Tensor, texts: torch.Tensor) -> Image.Image:
        """A row for each of the first captions: its own picture, then the nearest of all, nearest first."""
        num_rows, num_found = min(self.args.num_validation_images, len(texts)), min(NUM_FOUND, len(images))
        nearest = (texts[:num_rows] @ images.T).topk(num_found, dim=1).indices
        rows = torch.cat([torch.arange(num_rows)[:, None], nearest], dim=1)  # V x (1 + found)
        pictures = self.image_processor.postprocess(pixels[rows.flatten()])
        return make_image_grid(pictures, rows=num_rows, cols=1 + num_found)

    def save(self, model: Reranker, folder: Path) -> None:
        """Writes a folder for `AutoModel` and `AutoProcessor`."""
        dtype = getattr(torch, self.args.weights_dtype)
        weights = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
        }
        # Transformers loads weights as its config's dtype: that stays float32, where the file may hold halves.
        model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------- the parts


def make_config(
    sizes: dict, tokenizer: PreTrainedTokenizerFast, image_size: int | None
) -> CLIPConfig | VisionTextDualEncoderConfig:
    """
    The model's sizes from the YAML; what the tokenizer and the dVAE fix, from them. A `model_type` in `vision_config`
    chooses the image side, by default CLIP's own.

    Raises:
        ValueError: for a name or value that does not fit.
    """
    parts = {name: dict(sizes.get(name, {})) for name in CLIPConfig.sub_configs}
    check_names(sizes, ["projection_dim", "logit_scale_init_value", "attn_implementation", *parts], "`model`")
    kind = parts["vision_config"].get("model_type", CLIPVisionConfig.model_type)
    if kind not in IMAGE_SIDES:
        raise ValueError(f"`model_type` of `vision_config` is {kind!r}; expected one of {', '.join(IMAGE_SIDES)}.")
    names = {"text_config": [*CLIPTextConfig.__annotations__], "vision_config": IMAGE_SIDES[kind]}
    fixed = {
        "text_config": {
            "vocab_size": len(tokenizer) + 1,
            "max_position_embeddings": tokenizer.model_max_length + 1,  # one more than the prior's: the end
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": len(tokenizer),
        },
        "vision_config": {"image_size": image_size} if image_size is not None else {},
    }
    for name, part in parts.items():
        check_names(part, names[name], f"`{name}` of `model`")
        for key, value in fixed[name].items():
            if part.setdefault(key, value) != value:
                raise ValueError(f"`model` asks for {key} {part[key]}, but tokenizer and dVAE give {value}: leave it.")
    try:
        if kind == CLIPVisionConfig.model_type:
            return CLIPConfig(**{**sizes, **parts})
        parts["text_config"]["model_type"] = CLIPTextConfig.model_type
        return VisionTextDualEncoderConfig(**{**sizes, **parts})
    except StrictDataclassError as error:
        raise ValueError(f"A value in `model` does not fit: {error}") from error


def make_model(config: CLIPConfig | VisionTextDualEncoderConfig) -> Reranker:
    """With random weights, whichever of the two the configuration is of."""
    return CLIPModel(config) if isinstance(config, CLIPConfig) else VisionTextDualEncoderModel(config)


def make_processor(tokenizer: PreTrainedTokenizerFast, image_size: int) -> CLIPProcessor:
    """
    The reranker's processor: the prior's tokenizer with an end of text, from where CLIP reads the caption, and
    pictures as [`DalleImageProcessor`] cuts and shrinks them, normalised.
    """
    tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, END_OF_TEXT)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A {END_OF_TEXT}", special_tokens=ends
    )
    tokenizer.model_max_length += 1
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=Image.Resampling.BOX,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return CLIPProcessor(image_processor, tokenizer)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`; a caption that is too long is cut before its end of text."""
    encoded = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def group_values(values: list) -> torch.Tensor:
    """N values to N ids that are equal where they are, the same in every process."""
    digests = [hashlib.blake2b(str(value).encode(), digest_size=8).digest() for value in values]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], dtype=torch.int64)


class RerankerCollator:
    """
    Items of [`~hf_dalle.data.CaptionImageReader`] to a batch: that of [`~hf_dalle.data.CaptionImageCollator`],
    captions with their end, and `groups`, ids of rows that are no negatives of each other.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): the processor's.
        values (`list`, *optional*): a value for each row of the data, equal in a group; by default the caption's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, values: list | None = None):
        self.tokenizer, self.values, self.pictures = tokenizer, values, CaptionImageCollator()

    def __call__(self, items: list[dict]) -> dict:
        captions = [item["caption"] for item in items]
        values = captions if self.values is None else [self.values[item["key"][-1]] for item in items]
        return {**self.pictures(items), **tokenize(self.tokenizer, captions), "groups": group_values(values)}


def gather_features(features: torch.Tensor) -> torch.Tensor:
    """
    The features of all processes, B x D each, to (processes * B) x D. The loss over them is the same on all, and the
    gradient of this process's own is that of the whole: DDP takes the mean over processes, so it counts times them.
    """
    state = PartialState()
    if state.num_processes == 1:
        return features
    parts = list(gather(features.detach()).chunk(state.num_processes))
    parts[state.process_index] = features
    if features.requires_grad:
        features.register_hook(lambda gradient: gradient * state.num_processes)
    return torch.cat(parts)


@torch.no_grad()
def encode_images(model: Reranker, pixel_values: torch.Tensor) -> torch.Tensor:
    """B x 3 x H x W in [0, 1] to features of norm 1, B x D, float32, on the CPU."""
    features = model.get_image_features(pixel_values=(pixel_values - MEAN) / STD).pooler_output
    return F.normalize(features.float(), dim=1).cpu()


@torch.no_grad()
def encode_texts(model: Reranker, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`input_ids` and `attention_mask` to features of norm 1, B x D, float32, on the CPU."""
    text = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return F.normalize(model.get_text_features(**text).pooler_output.float(), dim=1).cpu()


def rank_own(
    queries: torch.Tensor, keys: torch.Tensor, groups: torch.Tensor, key_groups: torch.Tensor, chunk_size: int = 1024
) -> torch.Tensor:
    """
    The rank, from 1, of each query's own key among all, by cosine; keys of the query's group are no rivals.

    Args:
        queries (`torch.Tensor`): B x D; the key of row i is row i of `keys`.
        keys (`torch.Tensor`): at least B x D.
        groups, key_groups (`torch.LongTensor`): of each.
        chunk_size (`int`): queries at a time.
    """
    own, ranks = (queries * keys[: len(queries)]).sum(1), []
    for first in range(0, len(queries), chunk_size):
        rows = slice(first, first + chunk_size)
        is_rival = groups[rows, None] != key_groups
        ranks.append(1 + ((queries[rows] @ keys.T >= own[rows, None]) & is_rival).sum(1))
    return torch.cat(ranks)
