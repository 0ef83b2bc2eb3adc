"""People's votes: `vote.py serve` opens a page on two models' pictures, `vote.py count VOTES` makes table and chart.

Which pictures are shown is put together here. The page, the ballots, the file of votes and the counting live in
`evaluation/`: `vote_page.py`, `ballots.py`, `votes.py`, `vote_counts.py`.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evaluation.ballots import Ballots, load_key
from evaluation.pictures import PictureStore, choose_rows, make_seed, pair_folder, write_whole
from evaluation.settings import EvaluationArguments
from evaluation.vote_counts import count_votes, describe, draw_chart
from evaluation.votes import Study, VoteFile, read_votes
from PIL import Image
from settings_file import parse_settings


logger = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  vote.py serve training/configs/eval_coco.yaml --models ours DF-GAN --votes runs/votes/coco.jsonl --num_captions 1000
  vote.py serve runs/eval-coco/pictures/ours /data/DF-GAN --votes runs/votes/coco.jsonl
  vote.py count runs/votes/coco.jsonl

The server listens on this machine alone. For a page that is open to others, name --host and put a web server with TLS
before it. FILE.key, beside the votes, is the server's secret: without it, voters are not known again."""


@dataclass
class Captions:
    """Rows as far as pairing needs them."""

    ids: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.ids)


class PicturePairs:
    """
    Two models' pictures of the same rows.

    Args:
        names (`Sequence[str]`): of the two models.
        folders (`Sequence[Path]`): with their pictures, paired with the rows as `evaluate.py` pairs them.
        rows: with `ids` and `captions`.
        num_captions (`int`, *optional*): take so many, by a permutation of `seed`; none: all.
        seed (`int`, *optional*, defaults to 0): see `num_captions`.

    Raises:
        OSError: if a folder or a picture is not there.
        ValueError: if a row has no picture, a picture is broken, or both models' are the same files.
    """

    def __init__(
        self, names: Sequence[str], folders: Sequence[Path], rows, num_captions: int | None = None, seed: int = 0
    ):
        self.ids, self.captions = rows.ids, rows.captions
        self.stores = {}
        for name, folder in zip(names, folders, strict=True):
            self.stores[name], notes = pair_folder(Path(folder), rows)
            for note in notes:
                logger.warning("%s: %s", name, note)
        chosen = range(len(self.ids))
        if num_captions is not None and num_captions < len(self.ids):
            order = np.random.default_rng(make_seed(seed, "votes")).permutation(len(self.ids))
            chosen = sorted(order[:num_captions].tolist())
        self.index_of = {self.ids[index]: index for index in chosen}
        digests = [self._inspect(store) for store in self.stores.values()]
        if len(set(digests)) < len(digests):
            raise ValueError(f"{' and '.join(names)} are the same pictures: {', '.join(map(str, folders))}.")
        self.fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()

    def read(self, row: str, name: str) -> Image.Image:
        """A model's picture of a row."""
        return self.stores[name].read(self.index_of[row])

    def make_study(self, name: str, num_voters: int) -> Study:
        """What people vote on."""
        captions = {row: self.captions[index] for row, index in self.index_of.items()}
        return Study(name, tuple(self.stores), captions, num_voters, self.fingerprint)

    def _inspect(self, store: PictureStore) -> str:
        """Reads each picture once; gives a digest of all."""
        digest, sizes = hashlib.sha256(), set()
        for index in self.index_of.values():
            if not store.paths[index].is_file():
                raise OSError(f"{store.paths[index]} is not there: let evaluate.py draw all pictures first.")
            sizes.add(store.read(index).size)
            digest.update(hashlib.sha256(store.paths[index].read_bytes()).digest())
        if len(sizes) > 1:
            logger.warning("%s has pictures of %d sizes; each pair is shown at one.", store.folder, len(sizes))
        return digest.hexdigest()


def open_pairs(args: argparse.Namespace) -> PicturePairs:
    """
    What `serve` was asked to show: two models of an evaluation's YAML file, or two folders.

    Raises:
        OSError, ValueError: if that is not there, or does not pair.
    """
    if len(args.source) == 1:
        settings = parse_settings(args.source, EvaluationArguments, "vote.py serve")
        models = {model.name: model for model in settings.list_models()}
        names = args.models or list(models)
        if len(names) != 2 or len({*names} & {*models}) != 2:
            raise ValueError(f"Name two models of {args.source[0]}: --models A B; it has {', '.join(models)}.")
        drawn = Path(settings.output_dir) / "pictures"
        folders = [Path(models[name].images) if models[name].images else drawn / name for name in names]
        rows = choose_rows(settings)
    elif len(args.source) == 2:
        folders = [Path(folder) for folder in args.source]
        names = args.models or [folder.resolve().name for folder in folders]
        rows = read_captions(Path(args.captions)) if args.captions else find_captions(folders)
    else:
        raise ValueError(f"Name one YAML file of an evaluation, or two folders of pictures; got {len(args.source)}.")
    if len(names) != 2 or len(set(names)) != 2:
        raise ValueError(f"The two models need different names, --models A B; got {', '.join(names)}.")
    return PicturePairs(names, folders, rows, args.num_captions, args.seed)


def find_captions(folders: Sequence[Path]) -> Captions:
    """The ids and captions of the first folder that has them."""
    for folder in folders:
        store = PictureStore.open(folder)
        if all(isinstance(caption, str) for caption in store.captions):
            return Captions(store.ids, store.captions)
    raise ValueError(
        "Neither folder has a metadata.jsonl with `file_name` and `caption`: name a file of captions, --captions FILE,"
        ' JSON lines of `{"id": ..., "caption": ...}`.'
    )


def read_captions(path: Path) -> Captions:
    """JSON lines of `id` and `caption`."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        captions = {str(line["id"]): str(line["caption"]) for line in lines}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no file of JSON lines with `id` and `caption`: {error!r}.") from error
    if len(captions) < len(lines):
        raise ValueError(f"{path} has {len(lines)} lines, but {len(captions)} different ids.")
    return Captions(list(captions), list(captions.values()))


def serve(args: argparse.Namespace) -> None:
    """Opens the page, until it is interrupted."""
    if not importlib.util.find_spec("gradio"):
        raise OSError('The page needs gradio: pip install -e ".[demo]".')
    from evaluation.vote_page import make_app, run_server

    pairs = open_pairs(args)
    path = Path(args.votes)
    study = pairs.make_study(args.name or path.stem, args.num_voters)
    file = VoteFile(path, study)
    ballots = Ballots(study, file, load_key(path.with_name(f"{path.name}.key")), args.max_votes)
    print(
        f"{' against '.join(study.models)}: {len(study.captions)} captions, {args.num_voters} voters each;"
        f" {file.num_votes.total()} votes are in {path}.",
        flush=True,
    )
    run_server(make_app(ballots, pairs.read, args.max_per_minute), args.host, args.port)


def count(args: argparse.Namespace) -> None:
    """Writes votes.json, votes.md and votes.png; prints the table."""
    study, votes, num_cut = read_votes(args.votes)
    figures = {**count_votes(study, votes, args.exclude), "num_cut": num_cut}
    folder = Path(args.output_dir or Path(args.votes).parent)
    folder.mkdir(parents=True, exist_ok=True)
    draw_chart(figures).savefig(folder / "votes.png", dpi=110)
    write_whole(folder / "votes.md", describe(figures))
    write_whole(folder / "votes.json", json.dumps(figures, indent=1) + "\n")
    print(describe(figures))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vote.py", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="serve | count")
    page = commands.add_parser("serve", help="open the page", description="Opens the page on two models' pictures.")
    page.set_defaults(run=serve)
    add = page.add_argument
    add("source", nargs="+", help="YAML of an evaluation whose pictures are drawn, or two folders of pictures")
    add("--votes", required=True, metavar="FILE", help="JSON lines; goes on where the file ends")
    add("--models", nargs=2, metavar=("A", "B"), help="which two of the YAML; of two folders, their names")
    add("--captions", metavar="FILE", help="of two folders: JSON lines of id and caption; else their metadata.jsonl")
    add("--name", help="of the study; else the file's")
    add("--num_captions", type=_number, metavar="N", help="so many, by a permutation of --seed; else all")
    add("--seed", type=int, default=0, help="of the choice of captions (%(default)s)")
    add("--num_voters", type=_number, default=5, metavar="N", help="voters a caption, odd (%(default)s)")
    add("--max_votes", type=_number, default=50, metavar="N", help="captions a voter is asked for (%(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    add("--port", type=int, default=7860, help="(%(default)s; 0 takes a free one)")
    words = "answers and page starts a minute from one address (%(default)s)"
    add("--max_per_minute", type=_number, default=300, metavar="N", help=words)
    tally = commands.add_parser("count", help="count the votes", description="Counts votes: table, JSON and chart.")
    tally.set_defaults(run=count)
    tally.add_argument("votes", metavar="FILE")
    tally.add_argument("--output_dir", help="else the file's folder")
    tally.add_argument("--exclude", nargs="+", default=[], metavar="VOTER", help="whose votes do not count")
    return parser.parse_args(argv)


def _number(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {value!r}")
    return int(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"vote.py: {error}")
