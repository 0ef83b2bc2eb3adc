"""training/train_tokenizer.py: captions of every format, what it reports, what it cannot read."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from train_tokenizer import collect_captions, main
from transformers import AutoTokenizer

from hf_dalle.tokenization_dalle import train_tokenizer


STYLES = ["a noto", "a twemoji", "an outlined openmoji", "a flat fluent", "a glossy 3d"]
NAMES = ["hedgehog", "red apple", "Grinning Face", "고슴도치", "smiling cat with heart-eyes"]
CAPTIONS = [f"{style} style emoji of {name}" for style in STYLES for name in NAMES]
TABLE = [["one, with a tag", "one"], ["two"], [], None, ["", "three\nlines"]]
FLAT = ["one, with a tag", "one", "two", "three\nlines"]


def write_parquet(path, captions, column="captions"):
    # A picture column beside it, as data sets have: it must not be read.
    pictures = [{"bytes": b"no picture", "path": None}] * len(captions)
    pq.write_table(pa.table({"image": pictures, column: captions}), path)


def test_script_reads_every_format_to_the_same_captions(tmp_path):
    write_parquet(tmp_path / "list.parquet", TABLE)
    assert collect_captions(str(tmp_path / "list.parquet"), ["captions"]) == (FLAT, 2)

    write_parquet(tmp_path / "string.parquet", [*FLAT, None], column="text")
    assert collect_captions(str(tmp_path / "string.parquet"), ["text"]) == (FLAT, 1)

    rows = [{"file_name": f"{i}.png", "captions": cell} for i, cell in enumerate(TABLE)]
    rows.append({"file_name": "no_caption.png"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert collect_captions(str(tmp_path), ["captions"]) == (FLAT, 3)

    quoted = "".join(f'{i}.png,"{caption}"\n' for i, caption in enumerate([*FLAT, ""]))
    (tmp_path / "table.csv").write_text("file_name,captions\n" + quoted, encoding="utf-8")
    assert collect_captions(str(tmp_path / "table.csv"), ["captions"]) == (FLAT, 1)

    (tmp_path / "lines.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert collect_captions(str(tmp_path / "lines.txt"), ["captions"]) == (["one", "two"], 1)


def test_script_reads_a_glob_in_sorted_order(tmp_path):
    for name in ("b", "a", "c"):
        write_parquet(tmp_path / f"{name}.parquet", [[name]])
    assert collect_captions(str(tmp_path / "*.parquet"), ["captions"]) == (["a", "b", "c"], 0)


def test_script_saves_and_reports(tmp_path, capsys):
    write_parquet(tmp_path / "train.parquet", [[caption] for caption in CAPTIONS] + [["emoji"] * 3, []])
    output_dir = tmp_path / "tokenizer"
    arguments = ["--vocab_size", "300", "--text_length", "8", "--output_dir", str(output_dir)]
    main(["--train_data", str(tmp_path / "train.parquet"), *arguments])
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    captions = [*CAPTIONS, *["emoji"] * 3]
    saved, expected = (
        json.loads(one.backend_tokenizer.to_str()) for one in (tokenizer, train_tokenizer(captions, 300, 8))
    )
    assert saved == expected
    lengths = [len(tokenizer.tokenize(caption)) + 1 for caption in captions]
    num_cut = sum(length > 8 for length in lengths)
    assert 0 < num_cut < len(captions)
    assert capsys.readouterr().out.splitlines() == [
        "captions: 28, of which 26 distinct; rows skipped: 1",
        "vocabulary: 300 of at most 300",
        f"tokens a caption, with start-of-text: mean {np.mean(lengths):.1f}, 95 % {sorted(lengths)[-2]}, "
        f"max {max(lengths)}",
        f"longer than 8 tokens and so cut: {num_cut} ({num_cut / 28:.1%})",
        f"saved to {output_dir}",
    ]


def test_captions_of_several_columns_are_pooled(tmp_path):
    table = pa.table({"captions": [["a fox", "a red fox"], []], "caption_ko": ["여우", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert collect_captions(str(tmp_path / "a.parquet"), ["captions", "caption_ko"]) == (
        ["a fox", "a red fox", "여우"],
        1,
    )


def test_script_names_what_it_cannot_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", [["x"]], column="text")
    with pytest.raises(ValueError, match="a.parquet.*'captions'.*'image', 'text'"):
        collect_captions(str(tmp_path / "a.parquet"), ["captions"])
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match="broken.parquet"):
        collect_captions(str(tmp_path / "broken.parquet"), ["text"])
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ', encoding="utf-8")
    with pytest.raises(ValueError, match="broken.jsonl"):
        collect_captions(str(tmp_path / "broken.jsonl"), ["text"])
    for line in ("3", "[1]", "null"):
        (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' + line, encoding="utf-8")
        with pytest.raises(ValueError, match="rows.jsonl: line 2 is no JSON object"):
            collect_captions(str(tmp_path / "rows.jsonl"), ["text"])
    (tmp_path / "long.csv").write_text(f"text\n{'a' * 200_000}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="long.csv: field larger than field limit"):
        collect_captions(str(tmp_path / "long.csv"), ["text"])
    (tmp_path / "lines.txt").write_text("one\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lines.txt: it has a caption a line, no columns"):
        collect_captions(str(tmp_path / "lines.txt"), ["text", "text_ko"])
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(ValueError, match="picture.png.*parquet"):
        collect_captions(str(tmp_path / "picture.png"), ["text"])
    for nothing in ("nothing.parquet", "*.nothing", ""):
        with pytest.raises(FileNotFoundError, match="No captions"):
            collect_captions(str(tmp_path / nothing), ["text"])
    (tmp_path / "numbers.jsonl").write_text('{"text": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match="Caption 1 must be a string"):
        main(["--train_data", str(tmp_path / "numbers.jsonl"), "--caption_column", "text", "--output_dir", "unused"])
