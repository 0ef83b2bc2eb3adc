"""
Makes the tokenizer of a caption set and says how well its text length fits the captions.

    python training/train_tokenizer.py --train_data data/emoji/train.parquet --vocab_size 2048 --text_length 24 \\
        --output_dir tokenizer

What the tokenizer is lives in `hf_dalle.tokenization_dalle`; here captions are read from files and counted.
"""

import argparse
import csv
import glob
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
from transformers import PreTrainedTokenizerFast

from hf_dalle.tokenization_dalle import train_tokenizer


METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the names that an imagefolder may use


def find_files(train_data: str) -> list[Path]:
    """The caption files of a path, a glob pattern or an imagefolder, sorted."""
    folder = Path(train_data)
    if folder.is_dir():
        files = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
        wanted = f"a file named {', '.join(METADATA_FILES[:-1])} or {METADATA_FILES[-1]}"
    else:
        files = sorted(Path(name) for name in glob.glob(train_data, recursive=True))
        wanted = "a parquet, jsonl, csv or txt file; a folder must be an imagefolder with metadata"
    if not files:
        raise FileNotFoundError(f"No captions at {train_data!r}: expected {wanted}.")
    return files


def read_captions(path: Path, caption_column: str) -> Iterator[str | list[str] | None]:
    """
    What the caption column holds, row by row: `None` or `""` where a row has no caption.

    Args:
        path (`Path`): A .parquet, .jsonl or .csv table, or a .txt file with a caption a line.
        caption_column (`str`): The table's column, of strings or (not in csv) lists of strings.

    Raises:
        `ValueError`: If the file is broken, of another kind, or has no such column.
    """
    if path.suffix == ".parquet":
        table = pyarrow.parquet.ParquetFile(path)
        check_column(caption_column, table.schema_arrow.names)
        for batch in table.iter_batches(columns=[caption_column]):
            yield from batch.column(0).to_pylist()
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, row in enumerate(map(json.loads, lines)):
                if not isinstance(row, dict):
                    raise ValueError(f"line {number + 1} is no JSON object")
                if number == 0:
                    check_column(caption_column, row)
                yield row.get(caption_column)
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines)
            check_column(caption_column, rows.fieldnames or [])
            yield from (row[caption_column] for row in rows)
    elif path.suffix == ".txt":
        with path.open(encoding="utf-8") as lines:
            yield from (line.rstrip("\n") for line in lines)
    else:
        raise ValueError("the name must end in .parquet, .jsonl, .csv or .txt")


def check_column(caption_column: str, columns: Iterable[str]) -> None:
    """Refuses a table without the caption column, and names those that it has."""
    if caption_column not in columns:
        raise ValueError(f"no column {caption_column!r} (--caption_column); there are {', '.join(map(repr, columns))}")


def collect_captions(train_data: str, caption_columns: list[str]) -> tuple[list[str], int]:
    """All captions of `train_data`, and the number of rows skipped since they have none."""
    captions, num_skipped = [], 0
    for path in find_files(train_data):
        try:
            if path.suffix == ".txt" and len(caption_columns) > 1:
                raise ValueError("it has a caption a line, no columns: leave out --caption_column")
            for row in zip(*(read_captions(path, column) for column in caption_columns), strict=True):
                texts = [text for cell in row for text in (cell if isinstance(cell, list) else [cell])]
                found = [text for text in texts if text not in (None, "")]
                captions += found
                num_skipped += not found
        except (ValueError, csv.Error) as error:
            raise ValueError(f"Cannot read captions from {path}: {error}") from error
    return captions, num_skipped


def report(tokenizer: PreTrainedTokenizerFast, captions: list[str], num_skipped: int, vocab_size: int) -> str:
    """What a reader needs to judge `vocab_size` and `text_length` by."""
    text_length = tokenizer.model_max_length
    lengths = np.array([len(ids) for ids in tokenizer(captions, verbose=False)["input_ids"]])
    num_cut = int((lengths > text_length).sum())
    return "\n".join(
        [
            f"captions: {len(captions)}, of which {len(set(captions))} distinct; rows skipped: {num_skipped}",
            f"vocabulary: {len(tokenizer)} of at most {vocab_size}",
            f"tokens a caption, with start-of-text: mean {lengths.mean():.1f}, "
            f"95 % {int(np.ceil(np.percentile(lengths, 95)))}, max {lengths.max()}",
            f"longer than {text_length} tokens and so cut: {num_cut} ({num_cut / len(captions):.1%})",
        ]
    )


def main(args: list[str] | None = None) -> None:
    """Reads the options, trains, saves and reports."""
    parser = argparse.ArgumentParser(description="Train the tokenizer of a caption set.")
    parser.add_argument(
        "--train_data",
        required=True,
        help="parquet, jsonl or csv table, txt file with a caption a line, glob of such files, or an imagefolder",
    )
    parser.add_argument(
        "--caption_column",
        nargs="+",
        default=["captions"],
        help="columns of strings or of lists of strings; several where a tokenizer is to hold several languages",
    )
    parser.add_argument("--vocab_size", type=int, default=16384, help="the most entries; at least 258")
    parser.add_argument("--text_length", type=int, default=256, help="the most tokens a caption; at least 2")
    parser.add_argument("--output_dir", required=True, help="where the tokenizer is saved")
    options = parser.parse_args(args)

    captions, num_skipped = collect_captions(options.train_data, options.caption_column)
    tokenizer = train_tokenizer(captions, options.vocab_size, options.text_length)
    tokenizer.save_pretrained(options.output_dir)
    print(report(tokenizer, captions, num_skipped, options.vocab_size))
    print(f"saved to {options.output_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train_tokenizer.py: {error}")
