"""Encodes every picture of a caption-image set once: `python training/precompute_image_tokens.py --dvae ... `.

Writes one parquet file a split, with all columns but the picture and a column of tokens, a list of views a row: first
the picture as it is, then augmented ones. `train_prior.py` reads it by `tokens_column`. A stamp names the dVAE.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from hf_dalle import DalleDVAE, DalleImageProcessor
from hf_dalle.data import CaptionImageDataset, RandomCrop, load_rows


STAMP = "image_tokens.json"


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    dvae = DalleDVAE.from_pretrained(args.dvae).to(args.device).eval()
    source = (args.train_data_dir, args.dataset_name)
    splits = {split: load_rows(*source, split, args.image_column) for split in args.splits}
    output_dir = Path(args.output_dir)
    open_store(output_dir, {"dvae": fingerprint(Path(args.dvae)), "vocab_size": dvae.config.vocab_size})
    for split, rows in splits.items():
        beside = output_dir / f".{split}.parquet"
        skipped = encode_split(args, dvae, rows, beside)
        beside.rename(output_dir / f"{split}.parquet")
        for row, reason in skipped.items():
            print(f"Skipped row {row} of {split}: {reason}", file=sys.stderr)
        print(f"{split}: {len(rows) - len(skipped)} rows of {args.num_views} views, {len(skipped)} skipped.")
    print(f"Written to {output_dir}.")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dvae", required=True, help="Folder of the trained dVAE.")
    parser.add_argument("--train_data_dir", help="Folder of parquet files or an imagefolder.")
    parser.add_argument("--dataset_name", help="A data set on the Hub, instead of a folder.")
    parser.add_argument("--splits", nargs="+", default=["train"])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--tokens_column", default="image_tokens", help="Name of the column that is added.")
    parser.add_argument(
        "--num_views", type=int, default=1, help="Token grids a picture; those after the first augmented."
    )
    parser.add_argument("--resize_range", type=float, nargs=2, default=[1.0, 9 / 8])
    parser.add_argument("--crop_range", type=float, nargs=2, default=[3 / 8, 5 / 8])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.num_views < 1 or args.batch_size < 1:
        parser.error("--num_views and --batch_size must be at least 1.")
    return args


def encode_split(args: argparse.Namespace, dvae: DalleDVAE, rows: datasets.Dataset, path: Path) -> dict[int, str]:
    """
    Writes a split with tokens in the pictures' place, a batch at a time.

    Returns:
        `dict[int, str]`: the rows that had to be left out, with the reasons.

    Raises:
        ValueError: for a missing column, or if no row can be used.
    """
    size = dvae.config.sample_size
    columns = {"image_column": args.image_column, "caption_column": None, "seed": args.seed}
    plain = CaptionImageDataset(rows, image_processor=DalleImageProcessor(size=size), is_training=False, **columns)
    augmented = CaptionImageDataset(rows, augmentation=RandomCrop(size, args.resize_range, args.crop_range), **columns)
    sources = [plain, *[augmented] * (args.num_views - 1)]
    others = rows.remove_columns([args.image_column])
    tokens_type = datasets.List(datasets.List(datasets.Value("int32")))
    schema = datasets.Features({**others.features, args.tokens_column: tokens_type}).arrow_schema
    others, skipped = others.with_format("arrow"), {}
    with pq.ParquetWriter(path, schema) as writer:
        for first in tqdm(range(0, len(rows), args.batch_size), desc=path.stem, unit="batch"):
            pictures = {}
            for row in range(first, min(first + args.batch_size, len(rows))):
                try:
                    # The epoch is the view, so that each view is cut differently.
                    views = [source.read_row(row, epoch)["pixel_values"] for epoch, source in enumerate(sources)]
                    pictures[row] = torch.stack(views)
                except ValueError as error:
                    skipped[row] = str(error)
            if pictures:
                tokens = encode(dvae, torch.stack(list(pictures.values()))).tolist()
                table = others[list(pictures)].append_column(args.tokens_column, pa.array(tokens))
                writer.write_table(table.cast(schema))
    if len(skipped) == len(rows):
        raise ValueError(f"None of the {len(rows)} rows can be used; the first: {skipped.get(0, 'there is none')}.")
    return skipped


@torch.no_grad()
def encode(dvae: DalleDVAE, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pictures, B x views x 3 x H x W, to tokens, B x views x N."""
    views = [dvae.encode(view.to(dvae.device)).tokens.flatten(1) for view in pixel_values.unbind(1)]
    return torch.stack(views, dim=1)


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
    if (folder / STAMP).is_file():
        if json.loads((folder / STAMP).read_text())["dvae"] != stamp["dvae"]:
            raise ValueError(f"{folder} holds the tokens of another dVAE: delete it, or choose another --output_dir.")
        return
    if any(folder.glob("*.parquet")):
        raise ValueError(f"{folder} holds parquet files that are no store of tokens: choose another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")


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
