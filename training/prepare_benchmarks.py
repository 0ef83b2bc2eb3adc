"""MS-COCO and CUB as rows that `evaluate.py` reads: `python training/prepare_benchmarks.py coco --images DIR ...`.

From the files as their authors publish them, which a person downloads: parquet with the columns image, captions and
id, the pictures' bytes as they are. Which rows and captions are then measured says the YAML of the evaluation.
"""

import argparse
import json
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from shards import check_division, name_shards, written_beside
from tqdm.auto import tqdm


FEATURES = datasets.Features(
    {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string")), "id": datasets.Value("string")}
)
SHARD_SIZE = 2000  # rows a file: some 300 MB of MS-COCO
GROUP_SIZE = 100  # rows held in memory


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    coco = kinds.add_parser("coco", help="MS-COCO 2014, validation: split `validation`")
    coco.add_argument("--images", type=Path, required=True, help="folder val2014 of val2014.zip")
    coco.add_argument(
        "--annotations", type=Path, required=True, help="captions_val2014.json of annotations_trainval2014.zip"
    )
    coco.add_argument("--output_dir", type=Path, default=Path("data/coco"))
    cub = kinds.add_parser("cub", help="CUB-200-2011 with the captions of Reed et al. (2016): split `test`")
    cub.add_argument("--images", type=Path, required=True, help="folder CUB_200_2011/images")
    cub.add_argument("--captions", type=Path, required=True, help="folder text_c10 of cvpr2016_cub")
    cub.add_argument(
        "--classes", type=Path, help="which are tested, a line each; none: testclasses.txt beside text_c10"
    )
    cub.add_argument("--output_dir", type=Path, default=Path("data/cub"))
    args = parser.parse_args(argv)
    if args.kind == "coco":
        rows, split = list_coco(args.images, args.annotations), "validation"
    else:
        rows, split = list_cub(args.images, args.captions, args.classes), "test"
    write_rows(rows, args.output_dir, split)
    num_captions = sum(len(captions) for _, captions, _ in rows)
    print(f"Written to {args.output_dir}: {len(rows):,} pictures, {num_captions:,} captions.")


def list_coco(images: Path, annotations: Path) -> list[tuple[Path, list[str], str]]:
    """
    Pictures with their captions and ids, by the picture's number, captions by theirs.

    Raises:
        OSError: if a file is missing.
        ValueError: if the annotations are of another form, or a picture has none.
    """
    try:
        read = json.loads(annotations.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in read["images"]}
        captions: dict[int, list[str]] = {number: [] for number in sorted(names)}
        for annotation in sorted(read["annotations"], key=lambda annotation: annotation["id"]):
            captions[annotation["image_id"]].append(annotation["caption"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{annotations} has not the form of captions_val2014.json, `images` of id and file_name and `annotations`"
            f" of id, image_id and caption: {error!r}."
        ) from error
    rows = [(images / names[number], texts, str(number)) for number, texts in captions.items()]
    return check_rows(rows)


def list_cub(images: Path, captions: Path, classes: Path | None) -> list[tuple[Path, list[str], str]]:
    """
    Pictures of the tested classes with their captions, a line each of a file a picture, in the order of their names.

    Raises:
        OSError: if a file or the list of classes is missing.
        ValueError: if a picture has no caption.
    """
    classes = classes or captions.parent / "testclasses.txt"
    if not classes.is_file():
        raise OSError(
            f"There is no {classes}: give --classes, the file of cvpr2016_cub that lists the tested classes."
        )
    rows = []
    for name in sorted(line.strip() for line in classes.read_text(encoding="utf-8").splitlines() if line.strip()):
        texts = sorted((captions / name).glob("*.txt"))
        if not texts:
            raise OSError(f"{captions / name} holds no captions (*.txt), but {classes} lists it.")
        for text in texts:
            lines = [line.strip() for line in text.read_text(encoding="utf-8", errors="replace").splitlines()]
            rows.append((images / name / f"{text.stem}.jpg", [line for line in lines if line], text.stem))
    return check_rows(rows)


def check_rows(rows: list[tuple[Path, list[str], str]]) -> list[tuple[Path, list[str], str]]:
    missing = [path for path, _, _ in rows if not path.is_file()]
    if missing or not rows:
        raise OSError(f"{len(missing)} of {len(rows)} pictures are missing{f', as {missing[0]}' if missing else ''}.")
    silent = [path for path, captions, _ in rows if not captions]
    if silent:
        raise ValueError(f"{len(silent)} of {len(rows)} pictures have no caption, as {silent[0]}.")
    return rows


def write_rows(rows: list[tuple[Path, list[str], str]], folder: Path, split: str) -> None:
    """Writes the split's shards, each whole or not at all; those that are there are written again."""
    folder.mkdir(parents=True, exist_ok=True)
    names = name_shards(split, -(-len(rows) // SHARD_SIZE))
    check_division(folder, split, names)
    for number, name in enumerate(tqdm(names, desc=f"{split}: writing", unit="shard")):
        with written_beside(folder / name) as path, pq.ParquetWriter(path, FEATURES.arrow_schema) as writer:
            last = min(len(rows), (number + 1) * SHARD_SIZE)
            for first in range(number * SHARD_SIZE, last, GROUP_SIZE):
                group = [_read_row(*row) for row in rows[first : min(last, first + GROUP_SIZE)]]
                writer.write_table(pa.Table.from_pylist(group, schema=FEATURES.arrow_schema))


def _read_row(path: Path, captions: list[str], name: str) -> dict:
    return {"image": {"bytes": path.read_bytes(), "path": path.name}, "captions": captions, "id": name}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"prepare_benchmarks.py: {error}")
