"""`DalleProcessor`: the caption tokenizer and the image processor in one, as `AutoProcessor` users expect it.

What each of them does lives in `tokenization_dalle.py` and `image_processing_dalle.py`.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.utils import cached_file

from .image_processing_dalle import DalleImageProcessor
from .tokenization_dalle import check_captions, encode_captions


class DalleProcessor(ProcessorMixin):
    r"""
    Prepares captions for the prior and pictures for the dVAE.

    `decode` and `batch_decode` are the tokenizer's. [`~DalleProcessor.save_pretrained`] writes one folder for both;
    [`~DalleProcessor.from_pretrained`] reads such a folder, or that of a [`DALLEPipeline`], where the two have
    subfolders.

    Args:
        image_processor ([`DalleImageProcessor`]): of the pictures.
        tokenizer (`PreTrainedTokenizerFast`): of the captions, from [`train_tokenizer`].
    """

    def __init__(self, image_processor: DalleImageProcessor, tokenizer: PreTrainedTokenizerFast):
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        return_tensors: str = "pt",
        **text_kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images (`ImageInput`, *optional*): one or B pictures, as [`DalleImageProcessor`] takes them.
            text (`str` or `list[str]`, *optional*): one or B captions.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"` or `"np"`.
            text_kwargs:
                Of the tokenizer. Without any, captions are padded to the prior's text positions T, and one that is
                cut is quoted in a warning; other lengths do not fit the prior.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` (0 at pads), B x T, where there is text; `pixel_values`,
            float32 in [0, 1], B x 3 x size x size, where there are pictures.

        Raises:
            ValueError: if there is neither text nor a picture, or one that cannot be read.
        """
        if images is None and text is None:
            raise ValueError("A `DalleProcessor` needs `text`, `images` or both; got neither.")
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"`return_tensors` is {return_tensors!r}; tensors come as 'pt' or 'np'.")
        features = {}
        if text is not None and not text_kwargs:
            features.update(encode_captions(self.tokenizer, text, self.tokenizer.model_max_length))
        elif text is not None:
            captions = list(check_captions([text] if isinstance(text, str) else text))
            text_kwargs = {"padding": "max_length", "truncation": True, **text_kwargs}
            features.update(self.tokenizer(captions, return_tensors="pt", **text_kwargs))
        if images is not None:
            features.update(self.image_processor(images, return_tensors="pt"))
        if return_tensors == "np":
            features = {name: tensor.numpy() for name, tensor in features.items()}
        return BatchFeature(features)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str = "", **kwargs
    ) -> "DalleProcessor":
        """
        As [`ProcessorMixin.from_pretrained`], from a processor's folder or repository, or from a pipeline's.

        Raises:
            OSError: if a file is missing.
        """
        silent = ("missing_entries", "gated_repo", "connection_errors")
        places = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")
        index = cached_file(
            pretrained_model_name_or_path,
            "model_index.json",
            subfolder=subfolder,
            **{name: kwargs[name] for name in places if name in kwargs},
            **{f"_raise_exceptions_for_{name}": False for name in silent},
        )
        if index is None:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folders = {name: f"{subfolder}/{name}".lstrip("/") for name in ("image_processor", "tokenizer")}
        return cls(
            DalleImageProcessor.from_pretrained(
                pretrained_model_name_or_path, subfolder=folders["image_processor"], **kwargs
            ),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=folders["tokenizer"], **kwargs),
        )
