"""Run where the originals are installed: the files of their caption tokenizers, and the ids that they give.

Usage: FOLDER CAPTIONS, as JSON {"captions": [...]}.
"""

import json
import shutil
import sys
from pathlib import Path

import originals_setup  # noqa: F401
import youtokentome
from dalle_pytorch import tokenizer as originals
from rudalle.tokenizer import YTTMTokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer


def make_clip(folder, captions):
    shutil.copy(originals.default_bpe(), folder)
    return [originals.tokenizer.encode(caption) for caption in captions]


def make_json(folder, captions):
    file = folder / "bpe.json"
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    # What --hug does not use.
    cls = [("[CLS]", tokenizer.token_to_id("[CLS]"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=cls)
    tokenizer.save(str(file))
    original = originals.HugTokenizer(file)
    return [original.encode(caption) for caption in captions]


def make_bert(folder, captions):
    file = folder / "vocab.txt"
    characters = sorted({character for caption in captions for character in caption if not character.isspace()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "fox", "##es", "word", *characters]
    pieces += [f"##{character}" for character in characters[: len(characters) * 3 // 4]]
    file.write_text("".join(f"{piece}\n" for piece in dict.fromkeys(pieces)), encoding="utf-8")
    original = originals.ChineseTokenizer.__new__(originals.ChineseTokenizer)
    # Its constructor downloads bert-base-chinese, a cased one.
    original.tokenizer = BertTokenizer.from_pretrained(str(folder), do_lower_case=False)
    return [original.encode(caption).long().tolist() for caption in captions]


def make_youtokentome(folder, captions):
    file, corpus = folder / "bpe.model", folder / "captions"
    corpus.write_text("\n".join(captions * 3), encoding="utf-8")
    youtokentome.BPE.train(data=str(corpus), model=str(file), vocab_size=400, coverage=0.97, n_threads=1)
    corpus.unlink()
    return [ids.tolist() for ids in originals.YttmTokenizer(file).encode(captions)]


def make_rudalle(folder, captions):
    make_youtokentome(folder, captions)
    original = YTTMTokenizerWrapper(youtokentome.BPE(model=str(folder / "bpe.model")))
    # What its pipelines.generate_images does to a caption, at the length of the published priors.
    return [original.encode_text(caption.lower().strip(), 128).tolist() for caption in captions]


def main(folder, captions):
    makers = {"clip": make_clip, "json": make_json, "bert": make_bert, "youtokentome": make_youtokentome}
    makers["rudalle"] = make_rudalle
    for name, make in makers.items():
        (folder / name).mkdir()
        ids = make(folder / name, captions)
        (folder / name / "ids").write_text(json.dumps(ids))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
