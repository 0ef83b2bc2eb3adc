"""The caption tokenizers of the family's programs as plain fast tokenizers, so that `AutoTokenizer` loads them.

Ids are those of the originals. Which of them a checkpoint was trained with is its family's own file's.
"""

import gzip
import json
import unicodedata
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.implementations import CharBPETokenizer
from transformers import PreTrainedTokenizerFast


CLIP_NUM_MERGES = 49152 - 256 - 2
CLIP_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
MAX_CLIP_BYTES = 2**23  # published, 3.2 MB
WORD_START = "\u2581"  # YouTokenToMe's, a space like any other in captions
# What ftfy takes apart or out, of a caption that it finds no broken encoding in.
LIGATURES = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬅﬆ"
CONTROL_CHARACTERS = r"[\x{0}-\x{8}\x{B}\x{E}-\x{1F}\x{7F}\x{206A}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFC}]"
ENTITIES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'", "&nbsp;": " ", "&amp;": "&"}


def make_fast_tokenizer(
    backend: Tokenizer, text_length: int, pad_token: str, bos_token: str | None = None, is_spelled_out: bool = False
) -> PreTrainedTokenizerFast:
    """
    What a pipeline takes.

    Args:
        backend (`Tokenizer`): captions to ids.
        text_length (`int`): T, the most ids of a caption.
        pad_token, bos_token (`str`): in its vocabulary. What the prior makes of pads is the prior's.
        is_spelled_out (`bool`): whether a special token that a caption spells is text like any other.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad_token,
        bos_token=bos_token,
        padding_side="right",
        model_max_length=text_length,
        split_special_tokens=is_spelled_out,
        clean_up_tokenization_spaces=False,
    )


def lower() -> list[normalizers.Normalizer]:
    """
    Lower case as Python has it: a capital sigma that ends a word becomes another letter than inside, however many
    marks and the like, which have no case, stand between it and the letters.
    """
    cased = r"(?!\p{Case_Ignorable})\p{Cased}"
    final = Regex(rf"{cased}\p{{Case_Ignorable}}*\KΣ(?!\p{{Case_Ignorable}}*{cased})")  # \K: what is before it stays
    return [normalizers.Replace(final, "ς"), normalizers.Lowercase()]


def build(make: Callable[..., Any], *args: Any, source: Path, **kwargs: Any) -> Any:
    """What `make` makes of a file's content; what `tokenizers` raises, a bare `Exception`, becomes a `ValueError`."""
    try:
        return make(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"{source} holds no tokenizer that can be read: {error}.") from error


# ----------------------------------------------------------------------------------------------------------- CLIP's


def read_clip_bpe(path: Path, text_length: int) -> PreTrainedTokenizerFast:
    """
    DALLE-pytorch's default, CLIP's byte-level BPE of 49,408 ids, from bpe_simple_vocab_16e6.txt.

    The original first repairs captions with ftfy. Here are its replacements of single characters (quotes, ligatures,
    widths, controls) and the common HTML entities, not its guesses at texts that were decoded wrongly.

    Args:
        path (`Path`): of the file, or of the same gzipped: a line of header, then a merge a line.
        text_length (`int`): T.

    Raises:
        ValueError: if it is no such file.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(MAX_CLIP_BYTES)
    except (EOFError, zlib.error) as error:
        raise OSError(f"{path} cannot be read: {error}.") from error
    lines = content.decode("utf-8", errors="replace").split("\n")[1 : CLIP_NUM_MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    if len(merges) != CLIP_NUM_MERGES or any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{path} does not hold CLIP's {CLIP_NUM_MERGES} merges, two pieces a line after the first.")
    characters = _byte_characters()
    pieces = [*characters, *(character + "</w>" for character in characters), *map("".join, merges)]
    vocab = {piece: number for number, piece in enumerate([*pieces, *CLIP_SPECIAL_TOKENS])}
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    backend = Tokenizer(build(models.BPE, vocab, merges, source=path, **affixes))
    backend.normalizer = normalizers.Sequence([*_repair_text(), *lower()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("</w>", " "), decoders.ByteLevel(), decoders.Strip(" ", left=0, right=1)]
    )
    # A caption that spells them has their ids.
    backend.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in CLIP_SPECIAL_TOKENS])
    return make_fast_tokenizer(backend, text_length, pad_token=AddedToken(CLIP_SPECIAL_TOKENS[1], normalized=True))


def _byte_characters() -> list[str]:
    """The 256 characters that stand for bytes, printable bytes first, as GPT-2 and CLIP number them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + number) for number in range(256 - len(printable))]
    return [*map(chr, printable), *others]


def _repair_text() -> list[normalizers.Normalizer]:
    replaced: list[tuple[str, str]] = [*ENTITIES.items()] * 2
    for byte in range(0x80, 0xA0):  # control characters that were meant as Windows-1252
        meant = bytes([byte]).decode("windows-1252", errors="ignore")
        replaced += [(chr(byte), meant)] if meant else []
    replaced += [(ligature, _take_apart(ligature)) for ligature in LIGATURES]
    for character in map(chr, [0x3000, *range(0xFF01, 0xFFF0)]):  # half and full widths
        usual = unicodedata.normalize("NFKC", character)
        replaced += [(character, usual)] if usual != character else []
    patterns = [
        (r"[\x{2BC}\x{2018}-\x{201B}]", "'"),
        (r"[\x{201C}-\x{201F}]", '"'),
        (r"\x{1B}\[[0-9;]*[a-zA-Z]", ""),  # a terminal's colours
        (CONTROL_CHARACTERS, ""),
    ]
    return [
        *(normalizers.Replace(old, new) for old, new in replaced),
        *(normalizers.Replace(Regex(pattern), new) for pattern, new in patterns),
        normalizers.NFC(),
    ]


def _take_apart(ligature: str) -> str:
    return "".join(chr(int(number, 16)) for number in unicodedata.decomposition(ligature).split()[1:])


# ------------------------------------------------------------------------------------- DALLE-pytorch's other choices


def read_json_tokenizer(path: Path, text_length: int) -> PreTrainedTokenizerFast:
    """
    A `tokenizers` file of DALLE-pytorch's `--hug`, whose post-processor it does not use.

    Raises:
        ValueError: if it cuts or pads captions itself.
    """
    backend = build(Tokenizer.from_file, str(path), source=path)
    most = (backend.truncation or {}).get("max_length", text_length)
    if most < text_length or (backend.padding or {}).get("length"):
        raise ValueError(f"{path} cuts or pads captions itself: take `truncation` and `padding` out of it.")
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    special_tokens = [token for token in backend.get_added_tokens_decoder().values() if token.special]
    if special_tokens:
        return make_fast_tokenizer(backend, text_length, pad_token=special_tokens[0])
    # Any will do, since no pad is read; that it is special must not change how captions are cut.
    return make_fast_tokenizer(backend, text_length, pad_token=backend.id_to_token(0), is_spelled_out=True)


def read_bert_vocabulary(path: Path, text_length: int) -> PreTrainedTokenizerFast:
    """DALLE-pytorch's `--chinese`: the WordPiece of bert-base-chinese, cased, from its vocab.txt."""
    vocab = {piece: number for number, piece in enumerate(path.read_text(encoding="utf-8").splitlines())}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    names = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names if name in vocab])
    return make_fast_tokenizer(backend, text_length, pad_token="[PAD]")


# --------------------------------------------------------------------------------------------------- YouTokenToMe's


def read_youtokentome(
    path: Path, text_length: int, do_lower_case: bool = False, do_add_ends: bool = False
) -> PreTrainedTokenizerFast:
    """
    A model file of YouTokenToMe: numbers in text, characters, merges, then the ids of unk, pad, bos and eos.

    Args:
        path (`Path`): of the file.
        text_length (`int`): T.
        do_lower_case (`bool`): captions lower-cased and stripped first, as ruDALL-E does.
        do_add_ends (`bool`): start and end of text around each caption, as ruDALL-E does.

    Raises:
        ValueError: if it is no such file, or spells one piece in two ways, which a fast tokenizer cannot hold.
    """
    pieces, merges, special = _parse_youtokentome(path)
    names = {special["unk"]: "<UNK>", special["pad"]: "<PAD>", special["bos"]: "<BOS>", special["eos"]: "<EOS>"}
    vocab = {piece: number for number, piece in pieces.items()}
    if len(vocab) != len(pieces):
        twice = sorted({piece for number, piece in pieces.items() if vocab[piece] != number})
        raise ValueError(f"{path} spells {len(twice)} pieces in two ways, as {twice[0]!r}: ids would not be equal.")
    vocab.update({name: number for number, name in names.items() if number >= 0})
    backend = Tokenizer(build(models.BPE, vocab, merges, source=path, unk_token="<UNK>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [
            *([*lower(), normalizers.Strip()] if do_lower_case else []),
            normalizers.Replace(Regex(rf"[\t-\r {WORD_START}]+"), " "),
            normalizers.Replace(Regex(r"^ | $"), ""),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=WORD_START, prepend_scheme="always", split=True)
    backend.decoder = decoders.Metaspace(replacement=WORD_START, prepend_scheme="always")
    if do_add_ends:
        ends = [("<BOS>", special["bos"]), ("<EOS>", special["eos"])]
        backend.post_processor = processors.TemplateProcessing(single="<BOS> $A <EOS>", special_tokens=ends)
    bos_token = "<BOS>" if do_add_ends else None
    return make_fast_tokenizer(backend, text_length, "<PAD>", bos_token, is_spelled_out=True)


def _parse_youtokentome(path: Path) -> tuple[dict[int, str], list[tuple[str, str]], dict[str, int]]:
    try:
        numbers = [int(word) for word in path.read_text(encoding="ascii").split()]
        num_characters, num_merges = numbers[:2]
        characters, merges = numbers[2 : 2 + 2 * num_characters], numbers[2 + 2 * num_characters : -4]
        if len(characters) != 2 * num_characters or len(merges) != 3 * num_merges:
            raise ValueError("the counts in the first line do not fit what follows")
        pieces = {number: chr(code) for code, number in _group(characters, 2)}
        pairs = []
        for left, right, made in _group(merges, 3):
            pairs.append((pieces[left], pieces[right]))
            pieces[made] = pieces[left] + pieces[right]
        special = dict(zip(("unk", "pad", "bos", "eos"), numbers[-4:], strict=True))
    except (ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} is no model of YouTokenToMe: {error}.") from error
    return pieces, pairs, special


def _group(numbers: list[int], size: int) -> Iterable[tuple[int, ...]]:
    return zip(*(numbers[start::size] for start in range(size)), strict=True)


# ------------------------------------------------------------------------------------------------------- minDALL-E's


def read_char_bpe(vocab_file: Path, merges_file: Path, text_length: int) -> PreTrainedTokenizerFast:
    """minDALL-E's character-level BPE, lower-cased; its [PAD] is a token like any other to the prior."""
    options = {"unk_token": "[UNK]", "lowercase": True}
    original = build(CharBPETokenizer.from_file, str(vocab_file), str(merges_file), source=vocab_file, **options)
    original.add_special_tokens(["[PAD]"])
    backend = Tokenizer.from_str(original.to_str())
    return make_fast_tokenizer(backend, text_length, pad_token="[PAD]")


def is_json_tokenizer(path: Path) -> bool:
    """Whether a JSON file is a `tokenizers` file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("model"), dict)
