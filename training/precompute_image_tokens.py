"""Encodes every picture of a caption-image set once: `python training/precompute_image_tokens.py --dvae ... `.

Writes parquet shards with the captions and a column of tokens, a list of views a row: first the picture as it is, then
augmented ones. `train_prior.py` reads it by `tokens_column`. A stamp names the dVAE. Started again, it goes on after
the last finished shard; started by `torchrun` or `accelerate launch`, each process takes its share of the shards.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from shards import (
    add_record,
    check_division,
    in_order,
    is_finished,
    name_shards,
    own_share,
    read_rank,
    sum_up,
    write_skipped,
    written_beside,
)
from tqdm.auto import tqdm

from hf_dalle import DalleDVAE, DalleImageProcessor
from hf_dalle.data import CaptionImageReader, RandomCrop, catch_error, load_rows


STAMP = "image_tokens.json"
NUM_NAMED = 10  # skipped rows that are printed; all are in a file


class NumberedRows:
    """Rows by number, cut into shards of `rows_per_shard`: a `datasets.Dataset`, all columns kept, or `TarRows`."""

    def __init__(self, args: argparse.Namespace, rows):
        self.rows, self.num_shards = rows, max(1, -(-len(rows) // args.rows_per_shard))
        self.size = max(1, -(-len(rows) // self.num_shards))  # evenly: no last shard of a few rows, all of them broken
        self.about = {"num_rows": len(rows), "rows_per_shard": self.size}
        self.others = None
        if isinstance(rows, datasets.Dataset):
            self.others = rows.remove_columns([args.image_column])
            self.rows = rows.select_columns([args.image_column])
            self.features = self.others.features
            self.others = self.others.with_format("arrow")
        else:
            self.captions = _check_captions(args, rows.column_names)
            self.features = {column: datasets.Value("string") for column in self.captions}

    def count(self, shard: int) -> int:
        return min(self.size, len(self.rows) - shard * self.size)

    def read(self, shard: int) -> Iterator[tuple]:
        """Name, place and content of each row, or in its content's place the `ValueError` that came of it."""
        for index in range(shard * self.size, shard * self.size + self.count(shard)):
            name = index if self.others is not None else self.rows.name_row(index)
            yield name, (index,), catch_error(self.rows.__getitem__, index)

    def take(self, places: list[tuple], rows: list[dict]) -> pa.Table:
        """The columns beside the picture."""
        if self.others is not None:
            return self.others[[index for (index,) in places]]
        return _make_table(rows, self.features)


class StreamedShards:
    """Shards that are read in sequence, each to one of tokens. Only the captions are kept of the other columns."""

    def __init__(self, args: argparse.Namespace, shards):
        captions = _check_captions(args, shards.column_names)
        self.rows = shards.select_columns([args.image_column, *captions])
        self.num_shards = shards.num_shards
        self.about = {"num_source_shards": self.num_shards}
        known = getattr(shards, "features", None) or {}
        self.features = {column: known.get(column, datasets.Value("string")) for column in captions}

    def count(self, shard: int) -> None:
        return None  # nobody knows before it is read

    def read(self, shard: int) -> Iterator[tuple]:
        for index, row in enumerate(self.rows.read(shard)):
            yield self.rows.name_row(shard, index), (shard, index), row

    def take(self, places: list[tuple], rows: list[dict]) -> pa.Table:
        return _make_table(rows, self.features)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    dvae = DalleDVAE.from_pretrained(args.dvae).to(args.device).eval()
    sources = {split: open_source(args, split) for split in args.splits}
    readers = make_readers(args, dvae, next(iter(sources.values())))
    output_dir = Path(args.output_dir)
    stamp = {"dvae": fingerprint(Path(args.dvae)), "vocab_size": dvae.config.vocab_size}
    open_store(output_dir, stamp)
    settings = ("image_column", "tokens_column", "num_views", "resize_range", "crop_range", "seed")
    record = {"dvae": stamp["dvae"], **{name: getattr(args, name) for name in settings}}
    num_encoded, start = 0, time.perf_counter()
    for split, source in sources.items():
        names, own = name_shards(split, source.num_shards), {**record, **source.about}
        check_division(output_dir, split, names)
        with ThreadPoolExecutor(args.num_threads) as pool:
            for shard in own_share(len(names)):
                if not is_finished(output_dir / names[shard], own):
                    path = output_dir / names[shard]
                    num_encoded += encode_shard(args, dvae, readers, source, shard, path, own, pool)
        num_rows, skipped, num_unfinished = sum_up(output_dir, names)
        where = f" in {len(names) - num_unfinished} of {len(names)} shards" if len(names) > 1 else ""
        print(f"{split}: {num_rows} rows of {args.num_views} views, {skipped.total()} skipped{where}.")
    rate = num_encoded / max(time.perf_counter() - start, 1e-9)
    print(f"Written to {output_dir}, {num_encoded} pictures now, {rate:.1f} a second.")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dvae", required=True, help="Folder of the trained dVAE.")
    parser.add_argument("--train_data_dir", help="Folder of parquet or tar shards, or an imagefolder.")
    parser.add_argument("--dataset_name", help="A data set on the Hub, instead of a folder.")
    parser.add_argument("--streaming", action="store_true", help="Read in sequence; a shard of tokens for each read.")
    parser.add_argument("--splits", nargs="+", default=["train"])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--image_column", default="image")
    parser.add_argument(
        "--caption_column",
        nargs="+",
        default=[],
        help="Columns to keep of tar shards and of what is streamed, as text; of other data all are kept.",
    )
    parser.add_argument("--tokens_column", default="image_tokens", help="Name of the column that is added.")
    parser.add_argument(
        "--num_views", type=int, default=1, help="Token grids a picture; those after the first augmented."
    )
    parser.add_argument("--resize_range", type=float, nargs=2, default=[1.0, 9 / 8])
    parser.add_argument("--crop_range", type=float, nargs=2, default=[3 / 8, 5 / 8])
    parser.add_argument("--rows_per_shard", type=int, default=16384, help="As few rows or fewer are one file.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_threads", type=int, default=4, help="That decode and cut pictures, in each process.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=find_device())
    args = parser.parse_args(argv)
    if min(args.num_views, args.batch_size, args.rows_per_shard, args.num_threads) < 1:
        parser.error("--num_views, --batch_size, --rows_per_shard and --num_threads must be at least 1.")
    return args


def find_device() -> str:
    """This process's accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}"


def open_source(args: argparse.Namespace, split: str) -> NumberedRows | StreamedShards:
    """
    One split of the data.

    Raises:
        OSError: if there is nothing to read.
        ValueError: for a missing column.
    """
    rows = load_rows(args.train_data_dir, args.dataset_name, split, args.image_column, args.streaming)
    if args.image_column not in rows.column_names:
        raise ValueError(f"The data has no column {args.image_column!r}; it has {sorted(rows.column_names)}.")
    return (StreamedShards if args.streaming else NumberedRows)(args, rows)


def make_readers(args, dvae: DalleDVAE, source: NumberedRows | StreamedShards) -> list[CaptionImageReader]:
    """One for each view: the first takes the picture as it is, the others cut it."""
    size = dvae.config.sample_size
    columns = {"image_column": args.image_column, "caption_column": None, "seed": args.seed}
    processor, crop = DalleImageProcessor(size=size), RandomCrop(size, args.resize_range, args.crop_range)
    plain = CaptionImageReader(source.rows, image_processor=processor, is_training=False, **columns)
    return [plain, *[CaptionImageReader(source.rows, augmentation=crop, **columns)] * (args.num_views - 1)]


def encode_shard(args, dvae, readers, source, shard, path, record, pool) -> int:
    """
    Writes one shard with tokens in the pictures' place, a batch at a time, and how many rows it has.

    Raises:
        ValueError: if no row can be used.
    """
    tokens_type = datasets.List(datasets.List(datasets.Value("int32")))
    features = datasets.Features({**source.features, args.tokens_column: tokens_type})
    schema, skipped, batch, num_rows = add_record(features.arrow_schema, record), [], [], 0

    def prepare(found: tuple) -> tuple:
        name, place, row = found
        try:
            if isinstance(row, ValueError):
                raise row
            # The epoch is the view, so that each view is cut differently.
            views = [reader.make_item(row, view, *place)["pixel_values"] for view, reader in enumerate(readers)]
        except ValueError as error:
            return name, place, None, str(error)
        return name, place, row, torch.stack(views)

    def write() -> None:
        _, places, rows, pictures = zip(*batch, strict=True)
        tokens = pa.array(encode(dvae, torch.stack(pictures)).tolist())
        table = source.take(places, rows).append_column(args.tokens_column, tokens)
        writer.write_table(table.cast(schema))
        batch.clear()

    bar = tqdm(total=source.count(shard), desc=path.stem, unit="picture", disable=read_rank()[0] != 0)
    with written_beside(path) as beside, bar, pq.ParquetWriter(beside, schema) as writer:
        for prepared in in_order(pool, prepare, source.read(shard), 2 * args.batch_size):
            if prepared[2] is None:
                skipped.append({"row": prepared[0], "reason": prepared[3]})
                if len(skipped) <= NUM_NAMED:
                    print(f"Skipped row {prepared[0]} of {path.stem}: {prepared[3]}", file=sys.stderr)
            else:
                batch.append(prepared)
                num_rows += 1
            if len(batch) == args.batch_size:
                write()
            bar.update()
        if batch:
            write()
        if not num_rows:
            first = skipped[0]["reason"] if skipped else "there is none"
            raise ValueError(f"None of the {len(skipped)} rows can be used; the first: {first} ({path.name}).")
        write_skipped(path, skipped)
    return num_rows


@torch.no_grad()
def encode(dvae: DalleDVAE, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pictures, B x views x 3 x H x W, to tokens, B x views x N."""
    views = [dvae.encode(view.to(dvae.device)).tokens.flatten(1) for view in pixel_values.unbind(1)]
    return torch.stack(views, dim=1)


def _check_captions(args: argparse.Namespace, column_names: list[str]) -> list[str]:
    missing = [column for column in args.caption_column if column not in column_names]
    if missing or not args.caption_column:
        wanted = f"no column {missing[0]!r}" if missing else "more columns than tokens are to keep"
        raise ValueError(f"The data has {wanted}: name captions by --caption_column among {sorted(column_names)}.")
    return args.caption_column


def _make_table(rows: list[dict], features: dict) -> pa.Table:
    """The caption columns; what is no caption of the column's type is none."""
    schema = datasets.Features(features).arrow_schema
    is_text = [pa.types.is_string(schema.field(column).type) for column in features]
    columns = {
        column: [row[column] if isinstance(row[column], str if text else list) else None for row in rows]
        for column, text in zip(features, is_text, strict=True)
    }
    return pa.table(columns, schema=schema)


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights of a saved model."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError(f"There are no weights (*.safetensors) in {folder}.")
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def open_store(folder: Path, stamp: dict) -> None:
    """Makes a store, or opens one of the same dVAE. The stamp comes first: no tokens are ever without one."""
    has_data = any(folder.glob("*.parquet"))  # asked before the stamp, which another process may write meanwhile
    if (folder / STAMP).is_file():
        if json.loads((folder / STAMP).read_text())["dvae"] != stamp["dvae"]:
            raise ValueError(f"{folder} holds the tokens of another dVAE: delete it, or choose another --output_dir.")
        return
    if has_data:
        raise ValueError(f"{folder} holds parquet files that are no store of tokens: choose another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{STAMP}.{read_rank()[0]}"
    beside.write_text(json.dumps(stamp, indent=2) + "\n")
    beside.replace(folder / STAMP)


def check_store(folder: Path, dvae: Path) -> None:
    """Refuses a store of tokens that another dVAE made: its numbers would mean other patches."""
    stamp = folder / STAMP
    if not stamp.is_file():
        raise OSError(f"{folder} has no {STAMP}: make it with precompute_image_tokens.py.")
    if json.loads(stamp.read_text())["dvae"] != fingerprint(dvae):
        raise ValueError(
            f"The tokens in {folder} are of another dVAE than {dvae}. Precompute them again with this one."
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"precompute_image_tokens.py: {error}")
