"""Encodes every picture of a caption-image set once: `python training/precompute_image_tokens.py --dvae ... `.

Writes one parquet file a split, with all columns but the picture and a column of tokens, a list of views a row: first the
picture as it is, then augmented ones. `train_prior.py` reads it by `tokens_column`. A stamp names the dVAE.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_dalle import DalleDVAE, DalleImageProcessor
from hf_dalle.data import CaptionImageCollator, CaptionImageDataset, RandomCrop, load_rows


STAMP = "image_tokens.json"


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    dvae = DalleDVAE.from_pretrained(args.dvae).to(args.device).eval()
    image_processor = DalleImageProcessor.from_pretrained(args.dvae)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for split in args.splits:
        rows = load_rows(args.train_data_dir, args.dataset_name, split, args.image_column)
        table, skipped = encode_split(args, dvae, image_processor, rows, split)
        beside = output_dir / f".{split}.parquet"
        table.to_parquet(beside)
        beside.rename(output_dir / f"{split}.parquet")
        for reason in skipped:
            print(f"Skipped {reason}", file=sys.stderr)
        print(f"{split}: {len(table)} rows of {args.num_views} views, {len(skipped)} skipped.")
    stamp = {"dvae": fingerprint(Path(args.dvae)), "vocab_size": dvae.config.vocab_size, "num_views": args.num_views}
    (output_dir / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
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
    if args.num_views < 1:
        parser.error("--num_views must be at least 1.")
    return args


@torch.no_grad()
def encode_split(
    args: argparse.Namespace,
    dvae: DalleDVAE,
    image_processor: DalleImageProcessor,
    rows: datasets.Dataset,
    split: str,
) -> tuple[datasets.Dataset, list[str]]:
    """The split with tokens in the pictures' place, and the rows that had to be left out."""
    size = image_processor.size["height"]
    columns = {"image_column": args.image_column, "caption_column": None, "image_processor": image_processor}
    plain = CaptionImageDataset(rows, is_training=False, **columns)
    augmentation = RandomCrop(size, args.resize_range, args.crop_range)
    augmented = CaptionImageDataset(rows, seed=args.seed, augmentation=augmentation, **columns)
    views, reasons = [[] for _ in range(len(rows))], {}
    for view in range(args.num_views):
        source = augmented if view else plain
        # The epoch is the view, so that each view is cut differently.
        keys = [(view, index) for index in range(len(rows))]
        loader = DataLoader(source, args.batch_size, sampler=keys, collate_fn=list)
        for number, items in enumerate(tqdm(loader, desc=f"{split}, view {view + 1} of {args.num_views}")):
            first = number * args.batch_size
            used = [index for index, item in enumerate(items, first) if "skipped" not in item]
            reasons |= {index: item["skipped"] for index, item in enumerate(items, first) if "skipped" in item}
            if used:
                pixel_values = CaptionImageCollator()(items)["pixel_values"].to(dvae.device)
                tokens = dvae.encode(pixel_values).tokens.flatten(1).cpu().numpy()
                for index, grid in zip(used, tokens, strict=True):
                    views[index].append(grid.astype(np.int32))
    table = rows.remove_columns([args.image_column])
    table = table.add_column(args.tokens_column, views, feature=_tokens_feature())
    return table.select([index for index in range(len(rows)) if index not in reasons]), list(reasons.values())


def _tokens_feature() -> datasets.Features:
    return datasets.List(datasets.List(datasets.Value("int32")))


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights of a saved model."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError(f"There are no weights (*.safetensors) in {folder}.")
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


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
