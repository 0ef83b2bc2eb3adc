"""Rows of captions with their own pictures, and the pictures that a model has made of them: chosen, paired, drawn.

A drawn picture follows from the model, its settings, the seed and its row, so that any number of processes, and a run
that was killed and goes on, draw the same. What is measured of pictures lives in the modules of the measurements.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loading import read_column
from PIL import Image
from reporting import save_whole

from evaluation.settings import EvaluationArguments
from hf_dalle.data import load_rows, open_picture


ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"
SETTINGS = "settings.json"  # of a drawn folder: what its pictures follow from
FORBIDDEN = set('/\\:*?"<>|\0')  # in an id, which names a file


class Rows:
    """
    The rows of an evaluation: each a caption with a picture of its own from the data, in the data's order.

    Attributes:
        captions, ids, splits (`list[str]`): of each row; an id is unique, and names the files of its pictures.
        references (`list[int]`): rows whose own pictures are all different rows of the data: where a picture has
            several captions, its first. What is said of "the real pictures" is said of these.
        fingerprint (`str`): of ids, captions and encoded pictures.
    """

    def __init__(self, sources: dict[str, Any], places: Sequence[tuple[str, int, int]], args: EvaluationArguments):
        """`places` are (split, row of the data, which of its captions)."""
        self.sources, self.places, self.image_column = sources, list(places), args.image_column
        self.splits = [split for split, _, _ in self.places]
        self.captions, self.ids = [], []
        names = {split: _read_ids(rows, split, args.id_column) for split, rows in sources.items()}
        captions = {split: read_captions(rows, args.caption_column) for split, rows in sources.items()}
        for split, row, number in self.places:
            self.captions.append(captions[split][row][number])
            self.ids.append(names[split][row] + (f"-{number}" if args.captions == "all" else ""))
        _check_ids(self.ids)
        firsts = {}
        for index, (split, row, _) in enumerate(self.places):
            firsts.setdefault((split, row), index)
        self.references = list(firsts.values())

    def __len__(self) -> int:
        return len(self.places)

    def encoded(self, index: int) -> Any:
        """The row's own picture as the data holds it."""
        split, row, _ = self.places[index]
        return self.sources[split][row][self.image_column]

    def picture(self, index: int) -> Image.Image:
        """The row's own picture, RGB, transparency laid on white; a `ValueError` names the row where it is broken."""
        try:
            return open_picture(self.encoded(index))
        except ValueError as error:
            raise ValueError(f"The picture of row {self.ids[index]} cannot be read: {error}") from error

    def column(self, name: str) -> list:
        """Any column of the data, a value for each row."""
        values = {}
        for split, rows in self.sources.items():
            if name not in rows.column_names:
                raise ValueError(f"Split {split!r} has no column {name!r}; it has {sorted(rows.column_names)}.")
            values[split] = read_column(rows, name)
        return [values[split][row] for split, row, _ in self.places]

    def has_column(self, name: str) -> bool:
        return all(name in rows.column_names for rows in self.sources.values())

    def of_split(self, split: str) -> list[int]:
        """The rows of one split."""
        return [index for index, name in enumerate(self.splits) if name == split]


def choose_rows(args: EvaluationArguments) -> Rows:
    """
    Opens the splits and takes the rows: all, or of each split `num_captions` by a permutation of the seed.

    Raises:
        OSError: if the data cannot be read.
        ValueError: for a missing column, no caption at all, ids that are not unique or name no file.
    """
    sources, places = {}, []
    for split in args.splits:
        rows = load_rows(args.data_dir, args.dataset_name, split, args.image_column)
        for column in filter(None, (args.image_column, args.caption_column, args.id_column)):
            if column not in rows.column_names:
                raise ValueError(f"Split {split!r} has no column {column!r}; it has {sorted(rows.column_names)}.")
        sources[split] = rows
        candidates = _list_candidates(read_captions(rows, args.caption_column), args)
        if not candidates:
            raise ValueError(f"Split {split!r} has no caption in column {args.caption_column!r}.")
        if args.num_captions is not None and args.num_captions < len(candidates):
            order = np.random.default_rng(make_seed(args.seed, "rows", split)).permutation(len(candidates))
            candidates = [candidates[place] for place in sorted(order[: args.num_captions].tolist())]
        places += [(split, row, number) for row, number in candidates]
    return Rows(sources, places, args)


def _list_candidates(captions: list[list[str]], args: EvaluationArguments) -> list[tuple[int, int]]:
    """(row, number of the caption) of what may be measured; rows without a caption are none."""
    if args.captions == "all":  # each text once, with the first picture that has it
        firsts = {}
        for row, texts in enumerate(captions):
            for number, text in enumerate(texts):
                firsts.setdefault(text, (row, number))
        return sorted(firsts.values())
    if args.captions == "first":
        return [(row, 0) for row, texts in enumerate(captions) if texts]
    draws = {
        row: np.random.default_rng(make_seed(args.seed, "caption", row)) for row, texts in enumerate(captions) if texts
    }
    return [(row, int(rng.integers(len(captions[row])))) for row, rng in draws.items()]


def read_captions(rows: Any, column: str) -> list[list[str]]:
    """Of each row its captions, stripped, without empty ones and repetitions."""
    captions = []
    for texts in read_column(rows, column):
        texts = texts if isinstance(texts, list) else [texts]
        kept = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
        captions.append(list(dict.fromkeys(kept)))
    return captions


def _read_ids(rows: Any, split: str, column: str | None) -> list[str]:
    if column is not None:
        return [str(value) for value in read_column(rows, column)]
    return [f"{split}-{row:06d}" for row in range(len(rows))]


def _check_ids(ids: list[str]) -> None:
    bad = [name for name in ids if not name.strip(" .") or FORBIDDEN & set(name) or name.startswith(".")]
    if bad:
        raise ValueError(f"{len(bad)} ids name no file, as {bad[0]!r}: letters, digits, - and _ are right.")
    folded = [name.casefold() for name in ids]
    if len(set(folded)) < len(folded):
        seen = set()
        twice = next(name for name in ids if name.casefold() in seen or seen.add(name.casefold()))
        raise ValueError(f"Ids of rows must be different, also but for case; {twice!r} comes twice.")


def fingerprint_rows(rows: Rows, progress: Callable[..., Iterable] | None = None) -> str:
    """A digest of ids, captions and encoded pictures; reads each picture once, under an `Evaluation.progress`."""
    digest = hashlib.sha256(json.dumps([rows.ids, rows.captions, rows.references]).encode())
    indices = rows.references
    for index in progress(indices, "real pictures: fingerprint", unit="picture") if progress else indices:
        digest.update(digest_encoded(rows.encoded(index)))
    return digest.hexdigest()


def digest_encoded(image: Any) -> bytes:
    """Of a picture's file, as the data holds it: bytes, or a dict of bytes or path; of none where there is none."""
    if isinstance(image, dict):
        image = image.get("bytes") or (image.get("path") and Path(image["path"]).read_bytes())
    return hashlib.sha256(image or b"").digest()


def make_seed(*parts: int | str) -> int:
    """63 bits that follow from the parts; different parts give different bits."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*parts: int | str) -> torch.Generator:
    """A generator of its own for (seed, id, ...): what it draws hangs on nothing else."""
    return torch.Generator().manual_seed(make_seed(*parts))


# ------------------------------------------------------------------------------------------------------------ stores


class PictureStore:
    """
    A folder of pictures, each with an id and, where known, a caption.

    Attributes:
        folder (`Path`), ids (`list[str]`), captions (`list[str | None]`), paths (`list[Path]`): in rows' order.
    """

    def __init__(self, folder: Path, ids: list[str], captions: list[str | None], paths: list[Path]):
        self.folder, self.ids, self.captions, self.paths = folder, ids, captions, paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        """A picture, RGB, transparency laid on white; a `ValueError` names the file where it is broken."""
        try:
            return open_picture(self.paths[index].read_bytes())
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.paths[index]} cannot be read: {error}") from error

    def missing(self) -> list[int]:
        """Rows whose picture is not there (yet)."""
        return [index for index, path in enumerate(self.paths) if not path.is_file()]

    @classmethod
    def open(cls, folder: str | Path) -> "PictureStore":
        """
        A folder as it is, without rows: `metadata.jsonl` (`file_name`, and `id`, `caption`), or all its pictures.

        Raises:
            OSError: if there is no such folder, or no picture in it.
        """
        folder = Path(folder)
        entries = _list_entries(folder)
        return cls(
            folder,
            [entry.get("id") or Path(entry["file_name"]).stem for entry in entries],
            [entry.get("caption") for entry in entries],
            [folder / entry["file_name"] for entry in entries],
        )


def _list_entries(folder: Path) -> list[dict]:
    """What a folder of pictures holds, in the order of its metadata, else by name."""
    if not folder.is_dir():
        raise OSError(f"{folder} is not a folder: name one of pictures.")
    if (folder / METADATA).is_file():
        lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
        try:
            entries = [json.loads(line) for line in lines if line.strip()]
            entries = [{**entry, "file_name": str(entry["file_name"])} for entry in entries]
        except (ValueError, TypeError, KeyError) as error:
            raise OSError(f"{folder / METADATA} is no file of JSON lines with `file_name`: {error!r}.") from error
        outside = [entry["file_name"] for entry in entries if not is_inside(folder, entry["file_name"])]
        if outside:
            raise OSError(f"{folder / METADATA} names {outside[0]!r}, which is outside of its folder.")
        entries = [{**entry, **({"id": str(entry["id"])} if "id" in entry else {})} for entry in entries]
    else:
        names = sorted(
            path.name for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.name[0] != "."
        )
        entries = [{"file_name": name} for name in names]
    if not entries:
        raise OSError(f"{folder} holds no picture ({', '.join(ENDINGS)}).")
    return entries


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file's name leads to nowhere else."""
    return (folder / name).resolve().is_relative_to(folder.resolve())


def pair_folder(folder: Path, rows: Rows) -> tuple[PictureStore, list[str]]:
    """
    Somebody's pictures, paired with the rows: by `id` in metadata.jsonl or the file's stem, else by equal captions.

    Returns:
        `tuple`: the store, in the rows' order, and what may mislead: pictures that belong to no row or, as the
        folder's own metadata says, to another caption.

    Raises:
        OSError: if there is nothing to read.
        ValueError: if a row has no picture, or more than one.
    """
    entries = _list_entries(folder)
    by_caption = all("id" not in entry for entry in entries) and all("caption" in entry for entry in entries)
    found: dict[str, list[str]] = {}
    for entry in entries:
        key = str(entry["caption"]).strip() if by_caption else entry.get("id") or Path(entry["file_name"]).stem
        found.setdefault(key, []).append(entry["file_name"])
    keys = rows.captions if by_caption else rows.ids
    word = "caption" if by_caption else "id"
    wanted = Counter(keys)
    twice = [key for key in wanted if len(found.get(key, ())) > wanted[key]]
    if twice:
        raise ValueError(
            f"{folder} has {len(found[twice[0]])} pictures for the {word} {twice[0]!r}, which {wanted[twice[0]]} of"
            " the rows have: expected one a row."
        )
    names, missing = [], []
    for index, key in enumerate(keys):
        if found.get(key):
            names.append(found[key].pop(0))
        else:
            missing.append(index)
    if missing:
        first = missing[0]
        raise ValueError(
            f"{folder} has no picture for {len(missing)} of {len(rows)} rows, as {rows.ids[first]}"
            f" ({rows.captions[first]!r}). Pictures are paired with rows by the file's name without its ending, or by"
            f" {METADATA}, lines of `file_name` and `id` or `caption`. Figures of other captions than those of the"
            " models beside it would mislead."
        )
    given = {entry["file_name"]: str(entry.get("caption", "")).strip() for entry in entries}
    num_surplus = len(entries) - len(names)
    num_others = sum(given[name] not in ("", caption) for name, caption in zip(names, rows.captions, strict=True))
    notes = [f"{num_surplus} pictures of its folder belong to no row and are left out."] if num_surplus else []
    if num_others:
        notes.append(f"{num_others} pictures were made from another caption than the row's, as {METADATA} says.")
    return PictureStore(folder, rows.ids, list(rows.captions), [folder / name for name in names]), notes


# ----------------------------------------------------------------------------------------------------------- drawing


def open_drawn(folder: Path, rows: Rows, settings: dict) -> PictureStore:
    """
    The folder that a pipeline's pictures of the rows go to, or have gone to; makes it, with its metadata.

    Raises:
        ValueError: if the pictures there were drawn with other settings.
    """
    path, names = folder / SETTINGS, [f"{name}.png" for name in rows.ids]
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed:
            name = sorted(changed)[0]
            raise ValueError(
                f"{folder} holds pictures of another run: `{name}` was {before.get(name)!r}, now it is"
                f" {settings.get(name)!r}. Choose another `output_dir`, or delete that folder."
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"file_name": name, "id": own, "caption": caption}, ensure_ascii=False)
            for name, own, caption in zip(names, rows.ids, rows.captions, strict=True)
        ]
        write_whole(folder / METADATA, "".join(f"{line}\n" for line in lines))
        write_whole(path, json.dumps(settings, indent=1, sort_keys=True) + "\n")
    return PictureStore(folder, rows.ids, list(rows.captions), [folder / name for name in names])


def write_whole(path: Path, text: str) -> None:
    """Writes beside and then renames: a file under its name is whole."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def list_batches(store: PictureStore, batch_size: int) -> list[list[int]]:
    """Rows to draw together where one of them is missing. Which they are hangs on the rows alone: batches may differ
    in a picture's last digits, so a batch that was cut is drawn as a whole again."""
    missing = set(store.missing())
    batches = [list(range(first, min(first + batch_size, len(store)))) for first in range(0, len(store), batch_size)]
    return [batch for batch in batches if missing & {*batch}]


def draw_pictures(
    pipe: Any, captions: Sequence[str], generators: list[torch.Generator], generation: dict
) -> list[Image.Image]:
    """
    One picture a caption by any text-to-image pipeline of diffusers, with a generator each.

    Raises:
        ValueError: if the pipeline gives something else.
    """
    output = pipe(prompt=list(captions), generator=generators, output_type="pil", **generation)
    images = getattr(output, "images", None)
    if images is None or len(images) != len(captions) or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"{type(pipe).__name__} gave {type(images).__name__}; expected {len(captions)} PIL pictures.")
    return images


def draw_batches(
    store: PictureStore, batches: Iterable[list[int]], load: Callable[[], Any], generation: dict, seed: int
) -> None:
    """Draws and writes batches, each picture whole or not at all; `load` gives the pipeline where there are any."""
    for batch in batches:
        generators = [make_generator(seed, store.ids[index]) for index in batch]
        images = draw_pictures(load(), [store.captions[index] for index in batch], generators, generation)
        for index, image in zip(batch, images, strict=True):
            save_whole(store.paths[index], image)
