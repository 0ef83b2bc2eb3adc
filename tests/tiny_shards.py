"""What the tests of tar shards share: shards on disk as WebDataset and img2dataset write them."""

import io
import json
import tarfile
from pathlib import Path

from tiny_data import encode_picture, list_rows


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """Samples are a key and the content of each ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def make_samples(first: int = 0, last: int = 20) -> list[tuple[str, dict[str, bytes]]]:
    """Some of the 20 rows of `tiny_training`, as img2dataset would store them."""
    samples = []
    for index, row in enumerate(list_rows()[first:last], first):
        width, height = row["image"].size
        about = {"caption": row["captions"][0], "key": f"{index:09d}", "status": "success", "width": width}
        files = {"jpg": encode_picture(row["image"], "JPEG"), "json": json.dumps({**about, "height": height}).encode()}
        samples.append((f"{index:09d}", {**files, "txt": row["captions"][0].encode()}))
    return samples


def write_shards(folder: Path, sizes: tuple[int, ...], name: str = "{:05d}.tar") -> list[Path]:
    """Shards of so many rows, one after another."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [
        write_tar(folder / name.format(index), make_samples(end - size, end))
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
