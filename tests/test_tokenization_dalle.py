"""The caption tokenizer and its BPE dropout."""

import itertools
import json
import math
import pickle
import random
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from train_tokenizer import main
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_dalle import tokenization_dalle
from hf_dalle.tokenization_dalle import PAD, START_OF_TEXT, BpeDropout, encode_captions, train_tokenizer


STYLES = ["a noto", "a twemoji", "an outlined openmoji", "a flat fluent", "a glossy 3d"]
NAMES = ["hedgehog", "red apple", "Grinning Face", "고슴도치", "smiling cat with heart-eyes"]
CAPTIONS = [f"{style} style emoji of {name}" for style in STYLES for name in NAMES]
TEXT_LENGTH = 12

# Any text that can be encoded: no lone surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=400, text_length=TEXT_LENGTH)


@pytest.fixture
def warnings(monkeypatch):
    """The messages that the module warns with."""
    messages = []
    monkeypatch.setattr(tokenization_dalle.logger, "warning", messages.append)
    monkeypatch.setattr(tokenization_dalle, "_captions_warned", set())
    return messages


def serialize(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())


# ---------------------------------------------------------------------------------------------------- vocabulary


def test_special_tokens_and_shape_of_an_encoding(tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.convert_tokens_to_ids([START_OF_TEXT, PAD]) == [0, 1]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer.eos_token is None and tokenizer.unk_token is None
    assert tokenizer.padding_side == "right" and tokenizer.model_max_length == TEXT_LENGTH
    encoding = tokenizer("a hedgehog", padding="max_length")
    assert set(encoding) == {"input_ids", "attention_mask"}
    num_tokens = sum(encoding["attention_mask"])
    assert encoding["input_ids"][0] == 0 and 0 not in encoding["input_ids"][1:]
    assert encoding["input_ids"][num_tokens:] == [1] * (TEXT_LENGTH - num_tokens)
    assert tokenizer("")["input_ids"] == [0]


def test_vocabulary_is_as_large_as_asked_or_as_the_captions_allow():
    assert len(train_tokenizer(CAPTIONS, 258, 8)) == 258
    assert len(train_tokenizer(CAPTIONS, 300, 8)) == 300
    # "ab" gives the merges of " a" or "ab" and then of the word: no more pairs are there to merge.
    assert len(train_tokenizer(["ab", "ab"], 16384, 8)) == 258 + 2
    # A word seen once is no reason for a merge.
    assert len(train_tokenizer(["ab"], 16384, 8)) == 258


def test_frequent_words_become_one_token_wherever_they_stand(tokenizer):
    first, inside = tokenizer("emoji")["input_ids"], tokenizer("emoji of emoji")["input_ids"]
    assert len(first) == 2 and len(inside) == 4
    assert first[1] == inside[1] == inside[3]


def test_case_and_composition_do_not_matter(tokenizer):
    composed, decomposed = "café", unicodedata.normalize("NFD", "CAFÉ")
    assert composed != decomposed.lower()
    assert tokenizer(composed)["input_ids"] == tokenizer(decomposed)["input_ids"]
    assert tokenizer("A Noto STYLE")["input_ids"] == tokenizer("  a noto style\n")["input_ids"]


@settings(max_examples=200, deadline=None)
@given(texts)
def test_any_text_comes_back_lower_cased(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    normalized = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == normalized
    assert max(ids) < len(tokenizer)


def test_ascii_and_korean_come_back_exactly(tokenizer):
    for text in ("a hedgehog, 3d?! (really)", "노토 스타일 고슴도치 이모지", "two  spaces\tand a tab"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_caption_that_spells_a_special_token_is_plain_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for tok in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for caption in (f"a {PAD} b", f"{START_OF_TEXT}a"):
            ids = encode_captions(tok, caption, 64).input_ids[0].tolist()
            assert ids[0] == 0 and 0 not in ids[1:]
            assert ids[ids.index(1) :] == [1] * (64 - ids.index(1))
            assert tok.decode(ids[: ids.index(1)])[len(START_OF_TEXT) :].strip() == caption


# ------------------------------------------------------------------------------------------ saving, determinism


def test_saved_folder_loads_as_the_same_fast_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast and isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.model_max_length == TEXT_LENGTH and loaded.padding_side == "right"
    assert serialize(loaded) == serialize(tokenizer)
    captions = [*CAPTIONS, "", "Éa 🦔 ꙮ"]
    expected = encode_captions(tokenizer, captions, 40)
    for key, value in encode_captions(loaded, captions, 40).items():
        assert torch.equal(value, expected[key])


def test_order_of_the_captions_and_process_do_not_matter(tokenizer, tmp_path):
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    assert serialize(train_tokenizer(iter(shuffled), 400, TEXT_LENGTH)) == serialize(tokenizer)

    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    command = [sys.executable, sys.modules[main.__module__].__file__, "--train_data", str(tmp_path / "captions.txt")]
    command += ["--vocab_size", "400", "--text_length", str(TEXT_LENGTH), "--output_dir", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    assert serialize(AutoTokenizer.from_pretrained(tmp_path / "out")) == serialize(tokenizer)


# ---------------------------------------------------------------------------------------------- encode_captions


def test_encode_captions_equals_a_plain_call(tokenizer, warnings):
    captions = [*CAPTIONS, "", "x" * 50]
    plain = tokenizer(captions, padding="max_length", truncation=True, max_length=7, return_tensors="pt")
    ours = encode_captions(tokenizer, captions, 7)
    assert set(ours) == {"input_ids", "attention_mask"}
    for key, value in ours.items():
        assert value.dtype == torch.long and value.shape == (len(captions), 7)
        assert torch.equal(value, plain[key])


def test_encode_captions_leaves_no_trace_in_the_saved_tokenizer():
    tokenizer = train_tokenizer(CAPTIONS, 400, TEXT_LENGTH)
    before = serialize(tokenizer)
    encode_captions(tokenizer, CAPTIONS, 4)
    assert serialize(tokenizer) == before


def test_one_caption_is_a_batch_of_one(tokenizer):
    one, batch = encode_captions(tokenizer, "a hedgehog", 8), encode_captions(tokenizer, ["a hedgehog"], 8)
    assert torch.equal(one.input_ids, batch.input_ids) and one.input_ids.shape == (1, 8)


def test_truncation_warns_once_a_caption_with_what_was_lost(tokenizer, warnings):
    fits = "emoji of emoji of emoji"  # start-of-text and five words
    long = "Emoji of EMOJI of emoji Of Red APPLE"
    encode_captions(tokenizer, [fits, long, long], 6)
    encode_captions(tokenizer, [long], 6)
    assert len(warnings) == 1
    assert "lost ' Of Red APPLE' of" in warnings[0] and long in warnings[0]
    encode_captions(tokenizer, [long], 5)
    encode_captions(tokenizer, [long + "s"], 6)
    assert len(warnings) == 3
    encode_captions(tokenizer, [fits], 6)
    assert len(warnings) == 3


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(2, 9))
def test_what_is_quoted_as_lost_ends_the_caption_and_covers_all_that_is_cut(tokenizer, text, text_length):
    lost = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization_dalle, "_warn_cut", lambda caption, start, *_: lost.append(caption[start:]))
        ids = encode_captions(tokenizer, text, text_length).input_ids[0]
    assert len(lost) == (len(tokenizer(text)["input_ids"]) > text_length)
    if lost:
        normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
        # A character of which only some bytes were kept counts as lost.
        kept = tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
        assert normalize(text).startswith(kept) and text.endswith(lost[0])
        cut = normalize(normalize(text)[len(kept) :])
        assert normalize(lost[0]).endswith(cut)
        assert len(normalize(lost[0])) <= len(cut) + 1


@pytest.mark.parametrize("captions", [[None], ["a", 3], [b"bytes"], [["nested"]], [], ["\ud800"]])
def test_encode_captions_refuses_what_is_no_text(tokenizer, captions):
    with pytest.raises(ValueError, match="[Cc]aption"):
        encode_captions(tokenizer, captions, 8)


# -------------------------------------------------------------------------------------------------- BPE dropout

HARD = [
    "",
    " ",
    "a",
    "emoji of emoji",
    "Éa 🦔 ꙮ",
    "👩‍👩‍👧‍👦 family",
    "12345 67",
    "don't  stop\t!",
    "고슴도치 이모지",
    "ﬁ İ ß",
    "\x00\u2028",
]


def encode_with_dropout(tokenizer, dropout, caption, seed):
    encoding = tokenizer([caption], verbose=False)
    return dropout(encoding["input_ids"][0], encoding.word_ids(0), seed)


def count_with_library(tokenizer, p, caption, num_samples):
    """How often the tokenizers library cuts a caption into which ids."""
    tokenizer.backend_tokenizer.model.dropout = p
    try:
        return Counter(map(tuple, tokenizer([caption] * num_samples)["input_ids"]))
    finally:
        tokenizer.backend_tokenizer.model.dropout = None


def test_bpe_dropout_of_0_changes_nothing(tokenizer):
    dropout = BpeDropout(tokenizer, 0.0)
    for caption in [*HARD, *CAPTIONS]:
        assert encode_with_dropout(tokenizer, dropout, caption, 0) == tokenizer(caption)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(st.one_of(texts, st.lists(st.sampled_from(CAPTIONS)).map("".join)))
def test_our_merges_are_the_librarys(tokenizer, text):
    dropout, vocab, encoding = BpeDropout(tokenizer, 0.5), tokenizer.get_vocab(), tokenizer([text])
    words = {}
    for word_id, token in zip(encoding.word_ids(0), encoding["input_ids"][0], strict=True):
        words.setdefault(word_id, []).append(token)
    for word in [words[word_id] for word_id in words if word_id is not None]:
        symbols = [vocab[symbol] for symbol in "".join(tokenizer.convert_ids_to_tokens(word))]
        assert dropout._merge(symbols, itertools.repeat(False))[0] == word


@settings(max_examples=100, deadline=None)
@given(texts, st.floats(0, 1), st.integers(0))
def test_any_text_comes_back_from_bpe_dropout(tokenizer, text, p, seed):
    ids = encode_with_dropout(tokenizer, BpeDropout(tokenizer, p), text, seed)
    assert ids[0] == 0 and 0 not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.backend_tokenizer.normalizer.normalize_str(
        text
    )


@pytest.mark.parametrize(("word", "p"), [("openmoji", 0.3), ("hedgehog", 0.1), ("hedgehog hedgehog", 0.5)])
def test_bpe_dropout_has_the_statistics_of_the_library(tokenizer, word, p):
    num_samples, dropout = 3000, BpeDropout(tokenizer, p)
    theirs = count_with_library(tokenizer, p, word, num_samples)
    ours = Counter(tuple(encode_with_dropout(tokenizer, dropout, word, (7, i))) for i in range(num_samples))
    assert len(ours) > 8
    for ids in theirs | ours:  # 6 standard deviations of the difference
        assert abs(theirs[ids] - ours[ids]) < 6 * math.sqrt(theirs[ids] + ours[ids]) + 1


def test_bpe_dropout_share(tokenizer):
    for p, num_tokens in ((1.0, 7), (0.0, 2)):  # start-of-text, and a space and five letters or all merged
        assert len(encode_with_dropout(tokenizer, BpeDropout(tokenizer, p), "emoji", 0)) == num_tokens
    two_letters = train_tokenizer(["q q", "q q"], 259, 8)  # the one merge is space + q
    dropout = BpeDropout(two_letters, 0.1)
    lengths = np.array([len(encode_with_dropout(two_letters, dropout, "q", seed)) for seed in range(2000)])
    # Skipped with probability 0.1: 5 standard deviations are 0.034.
    assert abs((lengths == 3).mean() - 0.1) < 0.034


def test_bpe_dropout_depends_on_the_seed_alone(tokenizer, monkeypatch):
    before = serialize(tokenizer)
    keys = [(0, epoch, row, 1) for epoch in range(2) for row in range(len(CAPTIONS))]
    captions = CAPTIONS * 2
    first = encode_captions(tokenizer, captions, 64, BpeDropout(tokenizer, 0.3), keys).input_ids
    assert not torch.equal(*first.chunk(2))  # another epoch
    # Another process, another batch, what was met before, and what was forgotten: all the same.
    monkeypatch.setattr(tokenization_dalle, "MAX_PLANNED_WORDS", 3)
    dropout = pickle.loads(pickle.dumps(BpeDropout(tokenizer, 0.3)))
    for row in reversed(range(len(captions))):
        ids = encode_captions(tokenizer, captions[row], 64, dropout, keys[row : row + 1]).input_ids
        assert torch.equal(ids[0], first[row])
    assert len(dropout._plans) <= 3
    assert serialize(tokenizer) == before
    plain = encode_captions(tokenizer, captions, 64)
    assert (first != 1).sum() > plain.attention_mask.sum()


@settings(max_examples=100, deadline=None)
@given(texts, st.integers(2, 9), st.integers(0, 99))
def test_what_is_quoted_as_lost_covers_what_bpe_dropout_cuts(tokenizer, text, text_length, seed):
    lost, dropout = [], BpeDropout(tokenizer, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization_dalle, "_warn_cut", lambda caption, start, *_: lost.append(caption[start:]))
        ids = encode_captions(tokenizer, [text], text_length, dropout, [seed]).input_ids[0]
    assert len(lost) == (len(encode_with_dropout(tokenizer, dropout, text, seed)) > text_length)
    if lost:
        normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
        kept = tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
        assert normalize(text).startswith(kept) and text.endswith(lost[0])
        assert normalize(lost[0]).endswith(normalize(normalize(text)[len(kept) :]))


def build_foreign(model, trainer, captions):
    foreign = Tokenizer(model)
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=foreign, unk_token="[UNK]", pad_token="[PAD]")


def test_bpe_dropout_of_tokenizers_with_word_ends_and_unknown_symbols():
    trainer = trainers.BpeTrainer(special_tokens=["[UNK]", "[PAD]"], end_of_word_suffix="</w>", show_progress=False)
    foreign = build_foreign(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"), trainer, CAPTIONS)
    caption = "an openmoji style hedge zzz"
    plain, dropout = foreign(caption)["input_ids"], BpeDropout(foreign, 0.3)
    assert foreign.unk_token_id in plain
    ours = Counter(tuple(encode_with_dropout(foreign, dropout, caption, seed)) for seed in range(2000))
    theirs = count_with_library(foreign, 0.3, caption, 2000)
    assert encode_with_dropout(foreign, BpeDropout(foreign, 0.0), caption, 0) == plain
    lengths = [np.repeat([len(ids) for ids in counts], list(counts.values())) for counts in (ours, theirs)]
    assert lengths[0].std() > 1 and abs(lengths[0].mean() - lengths[1].mean()) < 0.2 * lengths[0].std()
    for ids in ours:
        assert "".join(foreign.convert_ids_to_tokens(ids)) == "".join(foreign.convert_ids_to_tokens(plain))


def test_bpe_dropout_refuses_tokenizers_that_merge_otherwise(tokenizer):
    special = {"special_tokens": ["[UNK]", "[PAD]"], "show_progress": False}
    prefix = {"continuing_subword_prefix": "##"}
    for model, trainer in (
        (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(**special)),
        (models.BPE(unk_token="[UNK]", **prefix), trainers.BpeTrainer(**special, **prefix)),
    ):
        foreign = build_foreign(model, trainer, CAPTIONS)
        with pytest.raises(ValueError, match="BPE dropout is .* set it to 0"):
            BpeDropout(foreign, 0.1)
    other = BpeDropout(train_tokenizer(["hedge hog"] * 9, 300, 8), 0.1)
    with pytest.raises(ValueError, match="merges in another way: set it to 0"):
        other(next(iter(other._merges)), [0, 0], 0)  # two symbols of a word, which its first rule would merge


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_bpe_dropout_refuses_what_is_no_probability(tokenizer, p):
    with pytest.raises(ValueError, match="probability"):
        BpeDropout(tokenizer, p)


# ----------------------------------------------------------------------------------------- bad input to training


@pytest.mark.parametrize("captions", [[], ["a", None], [1], ["\udfff"], "one string"])
def test_training_refuses_bad_captions(captions):
    with pytest.raises(ValueError, match="[Cc]aption"):
        train_tokenizer(captions, 300, 8)


def test_refuses_sizes_that_are_too_small(tokenizer):
    with pytest.raises(ValueError, match="257.*258"):
        train_tokenizer(CAPTIONS, 257, 8)
    with pytest.raises(ValueError, match="text_length"):
        train_tokenizer(CAPTIONS, 300, 1)
    with pytest.raises(ValueError, match="text_length"):
        encode_captions(tokenizer, "a", 1)
