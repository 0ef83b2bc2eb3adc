"""The caption tokenizer: a lower-cased byte-level BPE that is a plain fast tokenizer, so `AutoTokenizer` loads it.

Here it is trained, given captions, and given BPE dropout from seeds for a training run. Captions are read from files
by `training/train_tokenizer.py`; what becomes of the padding (an id of its own a position) is the prior's.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import chain, groupby, repeat
from operator import itemgetter

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import logging


logger = logging.get_logger(__name__)

START_OF_TEXT = "<|startoftext|>"  # id 0
PAD = "<|pad|>"  # id 1: the prior never sees it, since its attention mask is 0

MAX_PLANNED_WORDS = 1 << 16  # of which BPE dropout remembers how they are merged

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
    tokenizer.train_from_iterator(check_captions(captions), trainer)
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
    tokenizer: PreTrainedTokenizerFast,
    captions: str | Iterable[str],
    text_length: int,
    bpe_dropout: "BpeDropout | None" = None,
    seeds: Sequence[int | Sequence[int]] | None = None,
) -> BatchEncoding:
    """
    Turns captions into the ids that the prior reads, and warns (once a caption) where a caption is cut.

    Without BPE dropout the ids are those of `tokenizer(captions, padding="max_length", truncation=True,
    max_length=text_length)`.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): From [`train_tokenizer`].
        captions (`str` or `Iterable[str]`): One caption or a batch of B.
        text_length (`int`): T, the prior's text positions, at least 2.
        bpe_dropout ([`BpeDropout`], *optional*): Made for this tokenizer; in training only.
        seeds (`Sequence`, *optional*): With `bpe_dropout`, one for each caption, as for [`BpeDropout`].

    Returns:
        `BatchEncoding`: `input_ids` and `attention_mask` (0 at pads), both `torch.long` of shape `(B, T)`.

    Raises:
        `ValueError`: If a caption is not valid text, there is none, or `text_length` is too small.
    """
    _check_text_length(text_length)
    captions = list(check_captions([captions] if isinstance(captions, str) else captions))
    encoded = tokenizer(captions, return_offsets_mapping=True, verbose=False)
    input_ids = torch.full((len(captions), text_length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (caption, ids) in enumerate(zip(captions, encoded["input_ids"], strict=True)):
        first_lost = text_length
        if bpe_dropout is not None:
            plain_ids, ids = ids, bpe_dropout(ids, encoded.word_ids(row), seeds[row])
            first_lost = bpe_dropout.find_token(plain_ids, ids[:text_length])
        if len(ids) > text_length:
            _warn_cut(caption, encoded["offset_mapping"][row][first_lost][0], len(ids), text_length)
        num_kept = min(len(ids), text_length)
        input_ids[row, :num_kept] = torch.tensor(ids[:num_kept])
        attention_mask[row, :num_kept] = 1
    return BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask})


class BpeDropout:
    """
    BPE dropout ([Provilkov et al., 2020](https://arxiv.org/abs/1910.13267); section 2.2 of the paper: 0.1, in training
    only): each merge is skipped with probability `p`, so that a word is cut in another way each time.

    It is that of the tokenizers library (`model.dropout`), whose draws come from a generator of its own that cannot be
    seeded. Here they depend on a seed a caption, so that a resumed run reads what it would have read. Words in which
    no merge is skipped keep the ids that the tokenizer gave; the others are merged here.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): A BPE tokenizer, which stays as it is.
        p (`float`): In [0, 1]; 1 leaves single bytes.

    Raises:
        `ValueError`: If `p` is outside [0, 1], or the tokenizer is no BPE or one of a kind that is not known here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, p: float):
        if not 0 <= p <= 1:
            raise ValueError(f"BPE dropout is a probability in [0, 1], not {p}.")
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        if model["type"] != "BPE":
            raise ValueError(f"BPE dropout is for BPE tokenizers, not for {model['type']}: set it to 0.")
        self.p, self._ids = p, model["vocab"]
        self._tokens = {id_: token for token, id_ in tokenizer.get_vocab().items()}
        self._suffix, self._unknown_id = model["end_of_word_suffix"] or "", self._ids.get(model["unk_token"])
        if model["continuing_subword_prefix"]:
            raise ValueError("BPE dropout is not for tokenizers that mark how a word goes on: set it to 0.")
        # Two ids next to each other, to the merge's rank and the id that it gives.
        self._merges = {
            (self._ids[left], self._ids[right]): (rank, self._ids[left + right])
            for rank, (left, right) in enumerate(model["merges"])
        }
        self._plans: dict[tuple[int, ...], tuple[list[int], int]] = {}

    def __call__(self, ids: Sequence[int], word_ids: Sequence[int | None], seed: int | Sequence[int]) -> list[int]:
        """
        The ids of a caption with merges skipped.

        Args:
            ids (`Sequence[int]`): Of one caption, without dropout.
            word_ids (`Sequence[int]`): Of each id, which word it is in; `None` for special tokens, which stay.
            seed (`int` or `Sequence[int]`): Of the draws, from 0: for data, what a caption and its epoch go by.

        Raises:
            `ValueError`: If the tokenizer gives other ids than its merges in the order of their ranks.
        """
        words, plans = [], []
        for word_id, group in groupby(zip(word_ids, ids, strict=True), key=itemgetter(0)):
            words.append(tuple(id_ for _, id_ in group))
            plans.append(([], 0) if word_id is None else self._plan(words[-1]))
        rng = np.random.default_rng(seed)
        is_skipped = (rng.random(sum(num_draws for _, num_draws in plans)) < self.p).tolist()
        if not any(is_skipped):
            return list(ids)
        result: list[int] = []
        start = 0
        for word, (symbols, num_draws) in zip(words, plans, strict=True):
            draws, start = is_skipped[start : start + num_draws], start + num_draws
            # A skipped merge is tried again, which may take more draws.
            more = (rng.random() < self.p for _ in repeat(None))
            result += self._merge(symbols, chain(draws, more))[0] if any(draws) else word
        return result

    def find_token(self, plain_ids: Sequence[int], kept_ids: Sequence[int]) -> int:
        """Which of the ids without dropout is the first that `kept_ids`, a beginning with dropout, do not cover."""
        num_left = sum(len(self._tokens[id_]) for id_ in kept_ids)
        for index, id_ in enumerate(plain_ids):
            num_left -= len(self._tokens[id_])
            if num_left < 0:
                return index
        return len(plain_ids)

    def _plan(self, word: tuple[int, ...]) -> tuple[list[int], int]:
        """What a word is merged from, and how many draws it takes if none of them skips a merge."""
        if word not in self._plans:
            symbols, num_draws = [], 0
            if self._unknown_id not in word:
                text = "".join(self._tokens[id_] for id_ in word).removesuffix(self._suffix)
                symbols = [self._ids.get(symbol) for symbol in (*text[:-1], text[-1:] + self._suffix)]
                merged, num_draws = self._merge(symbols, repeat(False))
                if merged != list(word):
                    raise ValueError("BPE dropout is not for a tokenizer that merges in another way: set it to 0.")
            if len(self._plans) >= MAX_PLANNED_WORDS:
                self._plans.clear()
            self._plans[word] = symbols, num_draws
        return self._plans[word]

    def _merge(self, symbols: list[int], is_skipped: Iterator[bool]) -> tuple[list[int], int]:
        """Merges, the lowest rank first, then the leftmost; gives the ids and the number of draws that it took."""
        ids, end, num_draws = list(symbols), len(symbols), 0
        following, previous = list(range(1, end + 1)), list(range(-1, end - 1))
        queue: list[tuple[int, int, int]] = []
        skipped: list[tuple[int, int, int]] = []

        def add(left: int):
            if left >= 0 and following[left] < end and (ids[left], ids[following[left]]) in self._merges:
                rank, merged = self._merges[ids[left], ids[following[left]]]
                heappush(queue, (rank, left, merged))

        for left in range(end):
            add(left)
        while queue:
            merge = heappop(queue)
            num_draws += 1
            if next(is_skipped):
                skipped.append(merge)
                continue
            while skipped:  # each may be done after the next merge that is not skipped
                heappush(queue, skipped.pop())
            _, left, merged = merge
            right = following[left]
            # Of an earlier time, when other symbols stood here.
            if ids[left] is None or right == end or self._merges.get((ids[left], ids[right]), (0, None))[1] != merged:
                continue
            ids[left], ids[right], following[left] = merged, None, following[right]
            if following[left] < end:
                previous[following[left]] = left
            add(previous[left])
            add(left)
        return [id_ for id_ in ids if id_ is not None], num_draws


def check_captions(captions: Iterable[str]) -> Iterator[str]:
    """The captions one by one; `ValueError` for one that is not valid text, and if there is none."""
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
