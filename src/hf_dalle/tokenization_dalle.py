"""
The caption tokenizer: a lower-cased byte-level BPE that is a plain fast tokenizer, so `AutoTokenizer` loads it.

Here it is trained, given captions, and given BPE dropout for a training run. Captions are read from files by
`training/train_tokenizer.py`; what becomes of the padding (an id of its own a position) is the prior's.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import logging


logger = logging.get_logger(__name__)

START_OF_TEXT = "<|startoftext|>"  # id 0
PAD = "<|pad|>"  # id 1: the prior never sees it, since its attention mask is 0

_captions_warned: set[tuple[str, int]] = set()


def train_tokenizer(captions: Iterable[str], vocab_size: int, text_length: int) -> PreTrainedTokenizerFast:
    """
    Trains a tokenizer on captions (section 2.2 of the paper: lower-cased, BPE, 16,384 entries, at most 256 tokens).

    The 256 bytes are always in the vocabulary, so that any text has ids and `decode` gives it back lower-cased, in NFC
    and without outer white space. The same captions in any order give the same tokenizer.

    Args:
        captions (`Iterable[str]`): The captions to learn from; read once.
        vocab_size (`int`):
            The most entries that the vocabulary may have, at least 258 (two special tokens and the bytes). It stays
            smaller where the captions have no more pairs that occur twice.
        text_length (`int`): The most tokens that a caption may have, start-of-text included, at least 2.

    Returns:
        `PreTrainedTokenizerFast`: start-of-text (id 0) is its `bos_token` and opens each caption; id 1 pads.

    Raises:
        `ValueError`: If there are no captions, one is not valid text, or a size is too small.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = [START_OF_TEXT, PAD]
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"`vocab_size` is {vocab_size}, but the bytes and special tokens alone need {smallest}.")
    _check_text_length(text_length)

    tokenizer = Tokenizer(models.BPE())
    # Stripped, then one space put in front: a word has the same ids at the start of a caption as inside it.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special_tokens,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_check_captions(captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START_OF_TEXT} $A", special_tokens=[(START_OF_TEXT, tokenizer.token_to_id(START_OF_TEXT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START_OF_TEXT,
        pad_token=PAD,
        padding_side="right",
        model_max_length=text_length,
        split_special_tokens=True,  # a caption that spells a special token is text like any other
        clean_up_tokenization_spaces=False,
    )


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, captions: str | Iterable[str], text_length: int
) -> BatchEncoding:
    """
    Turns captions into the ids that the prior reads, and warns (once a caption) where a caption is cut.

    The ids are those of `tokenizer(captions, padding="max_length", truncation=True, max_length=text_length)`.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): From [`train_tokenizer`].
        captions (`str` or `Iterable[str]`): One caption or a batch of B.
        text_length (`int`): T, the prior's text positions, at least 2.

    Returns:
        `BatchEncoding`: `input_ids` and `attention_mask` (0 at pads), both `torch.long` of shape `(B, T)`.

    Raises:
        `ValueError`: If a caption is not valid text, there is none, or `text_length` is too small.
    """
    _check_text_length(text_length)
    captions = list(_check_captions([captions] if isinstance(captions, str) else captions))
    encoded = tokenizer(captions, return_offsets_mapping=True, verbose=False)
    input_ids = torch.full((len(captions), text_length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (caption, ids) in enumerate(zip(captions, encoded["input_ids"], strict=True)):
        if len(ids) > text_length:
            _warn_cut(caption, encoded["offset_mapping"][row][text_length][0], len(ids), text_length)
        num_kept = min(len(ids), text_length)
        input_ids[row, :num_kept] = torch.tensor(ids[:num_kept])
        attention_mask[row, :num_kept] = 1
    return BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask})


@contextmanager
def bpe_dropout(tokenizer: PreTrainedTokenizerFast, p: float) -> Iterator[None]:
    """
    Inside the `with` block the tokenizer skips each merge with probability `p` (section 2.2: 0.1, in training only).

    A tokenizer saved inside the block is saved without dropout. The Rust library draws from a generator of its own
    that cannot be seeded: each epoch, and each run, cuts the same caption differently.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer to change until the block is left.
        p (`float`): In [0, 1]; 1 leaves single bytes.

    Raises:
        `ValueError`: If `p` is outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"BPE dropout is a probability in [0, 1], not {p}.")
    model = tokenizer.backend_tokenizer.model
    outer_dropout, save_pretrained = model.dropout, tokenizer.save_pretrained
    is_nested = "save_pretrained" in vars(tokenizer)

    def save_without_dropout(*args, **kwargs):
        model.dropout = None
        try:
            return save_pretrained(*args, **kwargs)
        finally:
            model.dropout = p

    tokenizer.save_pretrained = save_without_dropout
    model.dropout = p
    try:
        yield
    finally:
        model.dropout = outer_dropout
        if is_nested:
            tokenizer.save_pretrained = save_pretrained
        else:
            del tokenizer.save_pretrained


def _check_captions(captions: Iterable[str]) -> Iterator[str]:
    if isinstance(captions, str):
        raise ValueError(f"Captions must be a list of strings, not the one string {captions!r}.")
    num_captions = 0
    for num_captions, caption in enumerate(captions, start=1):
        if not isinstance(caption, str):
            kind = type(caption).__name__
            raise ValueError(f"Caption {num_captions} must be a string, but is {caption!r} ({kind}).")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Caption {num_captions} is not valid Unicode text: {caption!r}.") from error
        yield caption
    if num_captions == 0:
        raise ValueError("There are no captions: at least one is needed.")


def _check_text_length(text_length: int) -> None:
    if text_length < 2:
        raise ValueError(f"`text_length` is {text_length}, but start-of-text and one token of caption need 2.")


def _warn_cut(caption: str, start: int, num_tokens: int, text_length: int) -> None:
    # Keyed by caption, not by message: under BPE dropout the same caption is cut at a different place each time.
    if (caption, text_length) not in _captions_warned:
        _captions_warned.add((caption, text_length))
        logger.warning(
            f"A caption of {num_tokens} tokens was cut to {text_length} (with start-of-text), which lost "
            f"{caption[start:]!r} of {caption!r}."
        )
