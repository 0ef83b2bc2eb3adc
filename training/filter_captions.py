"""The paper's filter of caption-image pairs (section 2.3): `python training/filter_captions.py --data_dir ... `.

Reads parquet shards or tar shards (`img2dataset`'s, WebDataset), a batch at a time, and writes those of the same names
without the rows whose caption is too short, boilerplate (`boilerplate.py` has the list) or not of the wanted language,
or whose picture has sides more than 2 to 1. `report.json` has the counts by reason and a sample of what each dropped.
"""

import argparse
import heapq
import io
import json
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from boilerplate import remove_boilerplate
from PIL import Image
from shards import written_beside
from tqdm.auto import tqdm

from hf_dalle.tar_shards import find_samples, make_row, read_sample


REPORT = "report.json"
NUM_SAMPLES = 20  # of what each rule dropped
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


class Tally:
    """Rows kept and dropped, with samples; those of several shards add up in any order to the same."""

    def __init__(self):
        self.num_kept, self.dropped, self.num_captions_dropped, self.samples = 0, Counter(), 0, {}

    def keep(self, num_captions_dropped: int = 0):
        self.num_kept += 1
        self.num_captions_dropped += num_captions_dropped

    def drop(self, reason: str, caption: str | None):
        self.dropped[reason] += 1
        self._sample(reason, [caption or ""])

    def add(self, other: "Tally"):
        self.num_kept += other.num_kept
        self.num_captions_dropped += other.num_captions_dropped
        self.dropped += other.dropped
        for reason, captions in other.samples.items():
            self._sample(reason, captions)

    def _sample(self, reason: str, captions: list[str]):
        # Those of the least hashes: drawn from all over the data, and the same whatever the shards and their order.
        found = {*self.samples.get(reason, []), *captions}
        self.samples[reason] = heapq.nsmallest(NUM_SAMPLES, found, key=lambda text: (zlib.crc32(text.encode()), text))

    def describe(self) -> dict:
        num_rows = self.num_kept + self.dropped.total()
        dropped = dict(sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])))
        samples = dict(sorted(self.samples.items()))
        counts = {"num_rows": num_rows, "num_kept": self.num_kept, "dropped": dropped}
        return {**counts, "num_other_captions_dropped": self.num_captions_dropped, "samples": samples}


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    load_detector(args.language)  # refused before any work
    shards = find_shards(Path(args.data_dir))
    output_dir = Path(args.output_dir)
    check_output(output_dir, Path(args.data_dir), shards)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / REPORT).unlink(missing_ok=True)  # where it is, the shards are whole and of its settings
    settings = {
        key: value for key, value in vars(args).items() if key not in ("data_dir", "output_dir", "num_workers")
    }
    total, jobs = Tally(), [(args, path, output_dir / path.name) for path in shards]
    if args.num_workers > 1:
        with ProcessPoolExecutor(args.num_workers) as pool:
            results = pool.map(filter_shard, *zip(*jobs, strict=True))
            for tally in tqdm(results, total=len(jobs), unit="shard"):
                total.add(tally)
    else:
        for job in tqdm(jobs, unit="shard"):
            total.add(filter_shard(*job))
    report = {**total.describe(), "settings": settings}
    if not report["num_kept"]:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in report["dropped"].items())
        raise ValueError(f"No row is left ({reasons}). Is --caption_column {args.caption_column} right?")
    with written_beside(output_dir / REPORT) as beside:
        beside.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{report['num_kept']:,} of {report['num_rows']:,} rows kept.")
    for reason, count in report["dropped"].items():
        print(f"{count:>12,} dropped: {reason}, e.g. {report['samples'][reason][0][:60]!r}")
    print(f"Written to {output_dir}.")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="Folder of .parquet or .tar shards.")
    parser.add_argument("--output_dir", required=True, help="Another folder, for the shards that are left.")
    parser.add_argument(
        "--caption_column", default="caption", help="Of strings or lists of strings; of tars 'txt' too."
    )
    parser.add_argument("--image_column", default="image", help="Of parquet files; 'none' looks at captions alone.")
    parser.add_argument("--min_words", type=int, default=3, help="Of a caption, and of what boilerplate leaves of it.")
    parser.add_argument("--language", help="Two letters, e.g. en; needs lingua-language-detector. None: any language.")
    parser.add_argument(
        "--min_language_ratio",
        type=float,
        default=0.5,
        help="Probability of --language over that of the likeliest, as a short caption is seldom sure; 1: it wins.",
    )
    parser.add_argument("--max_aspect_ratio", type=float, default=2.0, help="Of the longer side to the shorter.")
    parser.add_argument("--batch_size", type=int, default=256, help="Rows of a parquet file in memory at once.")
    parser.add_argument("--num_workers", type=int, default=1, help="Processes, each with a shard at a time.")
    args = parser.parse_args(argv)
    args.image_column = None if args.image_column == "none" else args.image_column
    if min(args.min_words, args.batch_size, args.num_workers, args.max_aspect_ratio) < 1:
        parser.error("--min_words, --batch_size, --num_workers and --max_aspect_ratio must be at least 1.")
    return args


def find_shards(folder: Path) -> list[Path]:
    """The parquet files of a folder, or its tar files: beside those `img2dataset` puts parquet files of metadata."""
    # pathlib's stars stand for hidden files too, which are unfinished ones
    shards = sorted(folder.glob("[!.]*.tar")) or sorted(folder.glob("[!.]*.parquet"))
    if not shards:
        raise OSError(f"There are neither .tar nor .parquet files in {folder}.")
    return shards


def check_output(output_dir: Path, data_dir: Path, shards: list[Path]) -> None:
    """Refuses the data's own folder, and one with other shards, which would be taken for filtered ones."""
    if output_dir.resolve() == data_dir.resolve():
        raise ValueError("--output_dir is --data_dir: choose another, or the data would be written over.")
    others = {path.name for kind in ("tar", "parquet") for path in output_dir.glob(f"[!.]*.{kind}")}
    others -= {path.name for path in shards}
    if others:
        raise ValueError(f"{output_dir} holds {min(others)}, which {data_dir} does not: choose another --output_dir.")


def filter_shard(args: argparse.Namespace, path: Path, target: Path) -> Tally:
    """
    Writes what is left of one shard.

    Raises:
        OSError: if the shard is damaged.
        ValueError: if it has no caption column.
    """
    try:
        with written_beside(target) as beside:
            return (filter_tar if path.suffix == ".tar" else filter_parquet)(args, path, beside)
    except (pa.ArrowInvalid, tarfile.TarError) as error:
        raise OSError(f"{path} is damaged: {error}. Make it again, or take it away.") from error


def filter_parquet(args: argparse.Namespace, path: Path, target: Path) -> Tally:
    file, tally = pq.ParquetFile(path), Tally()
    schema = file.schema_arrow
    for column in filter(None, (args.caption_column, args.image_column)):
        if column not in schema.names:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}.")
    with pq.ParquetWriter(target, schema) as writer:
        for batch in file.iter_batches(args.batch_size):
            captions = batch[args.caption_column].to_pylist()
            images = batch[args.image_column].to_pylist() if args.image_column else [None] * len(captions)
            left = [filter_row(args, *row, tally) for row in zip(captions, images, strict=True)]
            index = schema.names.index(args.caption_column)
            column = pa.array(left, schema.field(index).type)
            batch = batch.set_column(index, schema.field(index), column)
            batch = batch.filter(pa.array([caption is not None for caption in left]))
            if len(batch):  # `datasets` cannot read a row group of no rows
                writer.write_batch(batch)
    return tally


def filter_tar(args: argparse.Namespace, path: Path, target: Path) -> Tally:
    tally, columns = Tally(), [args.caption_column, *([args.image_column] if args.image_column else [])]
    with path.open("rb") as file, target.open("wb") as output:
        for key, start, end in find_samples(file):
            if end < 0:
                raise tarfile.ReadError(f"from {key} on")
            try:
                row = make_row(read_sample(file, start, end), columns)
            except ValueError:
                tally.drop("broken sample", key)
                continue
            if filter_row(args, row[args.caption_column], row.get(args.image_column), tally) is not None:
                file.seek(start)
                output.write(file.read(end - start))  # as it was: headers, dates and all
        output.write(bytes(2 * tarfile.BLOCKSIZE))  # the mark of a tar file's end
    return tally


def filter_row(args: argparse.Namespace, captions, image: dict | None, tally: Tally) -> str | list[str] | None:
    """What stays of a row's caption or captions, or `None` where the row goes. A row goes if all its captions do."""
    found = [text for text in (captions if isinstance(captions, list) else [captions]) if text is not None]
    reasons = [find_fault(args, text) for text in found]
    left = [text for text, reason in zip(found, reasons, strict=True) if reason is None]
    fault = None if left else (reasons or ["no caption"])[0]
    if fault is None and args.image_column:
        fault = find_picture_fault(args, image)
    if fault is not None:
        tally.drop(fault, found[0] if found else None)
        return None
    tally.keep(len(found) - len(left))
    return left if isinstance(captions, list) else left[0]


def find_fault(args: argparse.Namespace, caption: str) -> str | None:
    """Why a caption must go."""
    left, phrase = remove_boilerplate(caption)
    if phrase is not None and len(WORD.findall(left)) < args.min_words:
        return f"boilerplate ({phrase})"
    num_words = len(WORD.findall(caption))
    if num_words < args.min_words:
        return "too short" if num_words else "no caption"
    detector = load_detector(args.language)
    if detector is not None and detector(caption) < args.min_language_ratio:
        return f"not {args.language}"
    return None


def find_picture_fault(args: argparse.Namespace, image: dict | None) -> str | None:
    """Why a picture must go, from its header alone."""
    encoded = (image or {}).get("bytes") or (image or {}).get("path")
    if not encoded:
        return "no picture"
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as header:
            short, long = sorted(header.size)
    except Exception:  # broken bytes make Pillow's readers raise almost anything
        return "broken picture"
    return "aspect ratio" if long > args.max_aspect_ratio * short else None


@cache
def load_detector(language: str | None) -> Callable[[str], float] | None:
    """
    A function from a text to how probable it is that it is of `language` (ISO 639-1), over that of the likeliest one.

    Raises:
        OSError: if the detector is not installed.
        ValueError: for a language that it does not know.
    """
    if language is None:
        return None
    try:
        import lingua
    except ImportError as error:
        raise OSError(
            "--language needs a detector: `pip install lingua-language-detector`, or leave it out."
        ) from error
    code = getattr(lingua.IsoCode639_1, language.upper(), None)
    if code is None:
        raise ValueError(f"--language is {language!r}; expected a code of two letters, e.g. en.")
    wanted = lingua.Language.from_iso_code_639_1(code)
    detector = lingua.LanguageDetectorBuilder.from_all_languages().build()

    def compare(text: str) -> float:
        values = {value.language: value.value for value in detector.compute_language_confidence_values(text)}
        return values[wanted] / max(values.values()) if any(values.values()) else 1.0  # a text of no language stays

    return compare


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"filter_captions.py: {error}")
