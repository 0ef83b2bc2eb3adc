"""Pictures of a list of captions and addresses, e.g. Conceptual Captions: `python training/download_images.py ... `.

Writes parquet shards that training, `train_tokenizer.py` and the other scripts here read. A picture that is gone is
counted by reason and named beside its shard. Started again, it goes on after the last finished shard; started by
`torchrun`, each process takes its share. How one picture is fetched, and what it may cost, is `fetching.py`'s.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from fetching import Fetcher, Limits, Unavailable
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


MIN_GONE = 100  # as many, and nothing else, are no accident; the last shard may be shorter
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "url": datasets.Value("string"),
        "width": datasets.Value("int32"),  # both as the picture came
        "height": datasets.Value("int32"),
    }
)
ROW_GROUP = 256
WINDOW = 4  # pictures a thread, at most, that wait for an earlier one to be written


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    offsets, num_rows, digest = find_rows(Path(args.url_list), args.rows_per_shard)
    names = name_shards(args.split, len(offsets))
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    check_division(output_dir, args.split, names)
    settings = ("columns", "image_size", "quality", "rows_per_shard")
    record = {"url_list": digest, **{name: getattr(args, name) for name in settings}}
    shards = [index for index in own_share(len(names)) if not is_finished(output_dir / names[index], record)]
    limits = Limits(
        args.timeout, args.max_seconds, args.max_bytes, args.max_pixels, args.num_retries, args.allow_local_addresses
    )
    fetcher, counts = Fetcher(limits), Counter()
    num_own = sum(min(args.rows_per_shard, num_rows - index * args.rows_per_shard) for index in shards)
    start = time.perf_counter()
    with (
        ThreadPoolExecutor(args.num_threads) as pool,
        tqdm(total=num_own, unit="picture", disable=read_rank()[0] != 0) as bar,
    ):
        for index in shards:
            rows = read_rows(args, offsets[index], index * args.rows_per_shard)
            try:
                fetch_shard(args, fetcher, pool, rows, output_dir / names[index], record, bar, counts)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    rate = counts.total() / max(time.perf_counter() - start, 1e-9)
    print(f"{counts['kept']:,} of {counts.total():,} pictures fetched, {rate:.1f} looked for a second.")
    write_report(output_dir, args.split, names, num_rows)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url_list", required=True, help="A line a picture, caption and address parted by a tab.")
    parser.add_argument("--columns", nargs="+", default=["caption", "url"], help="The list's order, or: url caption.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--split", default="train", help="The shards are {split}-00000-of-00332.parquet and so on.")
    parser.add_argument("--image_size", type=int, default=384, help="Pixels of the smaller side, at most.")
    parser.add_argument("--quality", type=int, default=95, help="Of the JPEG that a picture made smaller becomes.")
    parser.add_argument("--rows_per_shard", type=int, default=10_000)
    parser.add_argument("--num_threads", type=int, default=64, help="Pictures on their way at once.")
    parser.add_argument("--timeout", type=float, default=Limits.timeout, help="Seconds of silence.")
    parser.add_argument("--max_seconds", type=float, default=Limits.max_seconds, help="Of one attempt in all.")
    parser.add_argument("--max_bytes", type=int, default=Limits.max_bytes, help="Of a picture as sent.")
    parser.add_argument("--max_pixels", type=int, default=Limits.max_pixels, help="Of a picture as decoded.")
    parser.add_argument("--num_retries", type=int, default=Limits.num_retries, help="Where a fault may pass.")
    parser.add_argument(
        "--allow_local_addresses",
        action="store_true",
        help="Fetch from this machine and its networks too: for lists that you trust.",
    )
    args = parser.parse_args(argv)
    if min(args.image_size, args.rows_per_shard, args.num_threads) < 1 or args.num_retries < 0:
        parser.error("--image_size, --rows_per_shard and --num_threads must be at least 1, --num_retries at least 0.")
    if sorted(args.columns) != ["caption", "url"] or not 1 <= args.quality <= 100:
        parser.error("--columns takes caption and url, in the list's order; --quality is from 1 to 100.")
    return args


def find_rows(path: Path, rows_per_shard: int) -> tuple[list[int], int, str]:
    """
    Where each shard's rows begin in the list, how many rows there are, and the list's SHA-256.

    Raises:
        OSError: if there is no list.
        ValueError: if it is empty.
    """
    offsets, position, num_rows, digest = [], 0, 0, hashlib.sha256()
    with path.open("rb") as file:
        for line in file:
            if num_rows % rows_per_shard == 0:
                offsets.append(position)
            position, num_rows = position + len(line), num_rows + 1
            digest.update(line)
    if not num_rows:
        raise ValueError(f"{path} is empty; expected lines of a caption and an address, parted by a tab.")
    return offsets, num_rows, digest.hexdigest()


def read_rows(args: argparse.Namespace, offset: int, first: int) -> Iterator[dict]:
    """One shard's rows: `line` (from 1), `caption` and `url`; a line of another form has no `url`."""
    with Path(args.url_list).open("rb") as file:
        file.seek(offset)
        for number, line in enumerate(islice(file, args.rows_per_shard), start=first + 1):
            fields = line.decode("utf-8", errors="replace").rstrip("\r\n").split("\t")
            values = dict(zip(args.columns, fields, strict=True)) if len(fields) == len(args.columns) else {}
            yield {"line": number, "caption": values.get("caption"), "url": values.get("url")}


def fetch_shard(args, fetcher, pool, rows, path, record, bar, counts) -> None:
    """
    Writes one shard, its rows in the list's order, and what is gone beside it.

    Raises:
        OSError: if no picture of it can be had, which is no accident.
    """
    gone, group, schema = [], [], add_record(FEATURES.arrow_schema, record)
    num_kept = 0

    def fetch(row: dict) -> tuple[dict, dict | str]:
        try:
            if not row["url"] or not (row["caption"] or "").strip():
                raise Unavailable("broken line")
            encoded, width, height = fetcher.shrink(fetcher.fetch(row["url"]), args.image_size, args.quality)
        except Unavailable as error:
            return row, error.reason
        except Exception as error:  # one address in millions must not end the run; its kind is counted
            return row, f"failed ({type(error).__name__})"
        image = {"bytes": encoded, "path": None}
        return row, {"image": image, "caption": row["caption"], "url": row["url"], "width": width, "height": height}

    with written_beside(path) as beside, pq.ParquetWriter(beside, schema) as writer:
        for row, result in in_order(pool, fetch, rows, WINDOW * args.num_threads):
            if isinstance(result, str):
                gone.append({"line": row["line"], "url": row["url"], "reason": result})
                counts[result] += 1
            else:
                group.append(result)
                num_kept += 1
                counts["kept"] += 1
            if len(group) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
            bar.update()
            bar.set_postfix(kept=counts["kept"], refresh=False)
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))
        if not num_kept and (len(gone) >= MIN_GONE or path.name == name_shards(args.split, 1)[0]):
            raise OSError(
                f"None of the {len(gone)} pictures of {path.name} can be had ({_list_counts(gone)}). Is this machine"
                " online? The same command goes on from here."
            )
        write_skipped(path, gone)


def _list_counts(gone: list[dict]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in Counter(row["reason"] for row in gone).most_common())


def write_report(output_dir: Path, split: str, names: list[str], num_rows: int) -> None:
    """Adds up the finished shards, whoever made them: what was kept, what is gone and why, what is still to do."""
    kept, gone, num_unfinished = sum_up(output_dir, names)
    report = {"num_rows": num_rows, "num_kept": kept, "gone": dict(gone.most_common())}
    report["num_unfinished_shards"] = num_unfinished
    process = read_rank()[0]
    beside = output_dir / f".{split}.report.{process}.json"
    beside.write_text(json.dumps(report, indent=2) + "\n")
    beside.replace(output_dir / f"{split}.report.json")
    print(f"{split}: {kept:,} of {num_rows:,} pictures in {len(names) - num_unfinished} of {len(names)} shards.")
    for reason, count in gone.most_common():
        print(f"{count:>12,} gone: {reason}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"download_images.py: {error}")
