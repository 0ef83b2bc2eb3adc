"""The store of image tokens in shards: several processes, going on after kills, tar shards and streams."""

import io
import json
import random
import subprocess
import sys
import tarfile
import time
from multiprocessing import get_context

import pytest
import torch
from precompute_image_tokens import main
from tiny_training import MODEL, ROOT, encode_picture, list_rows, write_parquet

from hf_dalle import DalleDVAE
from hf_dalle.data import load_rows


NAMES = [f"train-{index:05d}-of-00007.parquet" for index in range(7)]
SHARDED = ("--rows_per_shard", "3", "--batch_size", "2", "--num_views", "2", "--resize_range", "1", "1.5")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """20 rows, of which two are broken, a dVAE as it starts, and the store that one process makes of them at once."""
    folder = tmp_path_factory.mktemp("shards")
    rows = list_rows()
    rows[4]["image"], rows[17]["image"] = b"broken", None
    write_parquet(folder / "data" / "train.parquet", rows)
    write_tar(folder / "tars" / "00000.tar", rows[:12])
    write_tar(folder / "tars" / "00001.tar", rows[12:])
    DalleDVAE(**MODEL).save_pretrained(folder / "dvae")
    start(folder, "one", "--num_views", "2", "--resize_range", "1", "1.5")
    return folder


def write_tar(path, rows):
    """As `img2dataset` writes shards: `key.jpg` (here .png), `key.txt` and `key.json` with what it knows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, row in enumerate(rows):
            caption = row["captions"][0]
            values = {
                "caption": caption,
                "url": "http://example.com/a",
                "width": 16,
                "height": 16,
                "status": "success",
            }
            image = row["image"] if isinstance(row["image"], bytes | None) else encode_picture(row["image"])
            files = {"png": image, "txt": caption.encode(), "json": json.dumps(values).encode()}
            for ending, content in files.items():
                if content is not None:
                    member = tarfile.TarInfo(f"{path.stem}{index:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def precompute(home, output_dir, *options, data="data", environment=()):
    # A process of its own: the number of threads must not differ, nor may what it is told outlive it.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as context:
        for name, value in dict(environment).items():
            context.setenv(name, str(value))
        folders = ("--dvae", home / "dvae", "--train_data_dir", home / data, "--output_dir", home / output_dir)
        main([*map(str, folders), *options])


def launch(home, output_dir, *options, **kwargs):
    process = get_context("fork").Process(target=precompute, args=(home, output_dir, *options), kwargs=kwargs)
    process.start()
    return process


def start(home, output_dir, *options, **kwargs):
    process = launch(home, output_dir, *options, **kwargs)
    process.join()
    assert process.exitcode == 0


def read_files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_processes_make_the_shards_of_one_and_their_union_is_its_store(home):
    start(home, "sharded", *SHARDED)
    found = read_files(home / "sharded")
    assert sorted(found) == sorted(
        ["image_tokens.json", *NAMES, "train-00001-of-00007.skipped.jsonl", "train-00005-of-00007.skipped.jsonl"]
    )
    processes = [
        launch(home, "two", *SHARDED, environment={"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank})
        for rank in (0, 1)
    ]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert read_files(home / "two") == found
    whole, shards = load_rows(str(home / "one")), load_rows(str(home / "sharded"))
    assert shards[:] == whole[:] and len(whole) == 18
    assert shards.features == whole.features
    skipped = json.loads(found["train-00001-of-00007.skipped.jsonl"])
    assert skipped == {"row": 4, "reason": "broken picture (of no format that Pillow knows)"}
    assert json.loads((home / "one" / "train.skipped.jsonl").read_text().splitlines()[1])["row"] == 17


def test_killed_at_random_moments_it_ends_as_if_never_killed(home):
    start(home, "never", *SHARDED)
    rng, folder = random.Random(0), home / "killed"
    for num_shards in (1, 2, 4, 6):
        process = launch(home, "killed", *SHARDED)
        while process.is_alive() and len(list(folder.glob("train-*.parquet"))) < num_shards:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
    (folder / NAMES[6]).unlink(missing_ok=True)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("train-*.parquet")}
    assert written
    (folder / f".{NAMES[6]}").write_bytes(b"half a shard")  # as a kill in the middle of one leaves it
    start(home, "killed", *SHARDED)
    assert read_files(folder) == read_files(home / "never")
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())  # none was made twice


def test_a_shard_whose_end_is_missing_is_made_again(home):
    start(home, "cut", *SHARDED)
    whole = (home / "cut" / NAMES[2]).read_bytes()
    (home / "cut" / NAMES[2]).write_bytes(whole[:-20])
    start(home, "cut", *SHARDED)
    assert (home / "cut" / NAMES[2]).read_bytes() == whole


def test_tar_shards_by_number_and_in_sequence(home):
    options = ("--caption_column", "txt", "caption")
    start(home, "numbered", *options, "--rows_per_shard", "8", data="tars")
    start(home, "streamed", *options, "--streaming", data="tars")
    tokens = [views[0] for views in load_rows(str(home / "one"))["image_tokens"]]
    for name, num_shards in (("numbered", 3), ("streamed", 2)):
        assert len(list((home / name).glob("train-*.parquet"))) == num_shards
        rows = load_rows(str(home / name))
        assert [views[0] for views in rows["image_tokens"]] == tokens
        assert rows.column_names == ["txt", "caption", "image_tokens"] and rows["txt"][:] == rows["caption"][:]
        assert rows["caption"][:] == [captions[0] for captions in load_rows(str(home / "one"))["captions"]]
        lines = [path.read_text() for path in sorted((home / name).glob("*.skipped.jsonl"))]
        assert [json.loads(line)["row"] for line in lines] == {
            "numbered": ["00000.tar/000000004", "00001.tar/000010005"],
            "streamed": ["00000.tar/4", "00001.tar/5"],
        }[name]


def test_a_stream_of_parquet_keeps_lists_of_captions(home):
    start(home, "stream", "--streaming", "--caption_column", "captions", "--num_views", "2")
    assert load_rows(str(home / "stream"))["captions"][:] == load_rows(str(home / "one"))["captions"][:]
    assert len(load_rows(str(home / "stream"))["image_tokens"][0]) == 2


def test_other_settings_are_not_mixed_in(home):
    start(home, "mixed", *SHARDED)
    before = read_files(home / "mixed")
    for options, words in (
        ((*SHARDED, "--num_views", "3"), r"num_views 2, now 3"),
        ((*SHARDED, "--seed", "1"), r"seed 0, now 1"),
        (
            (*SHARDED, "--rows_per_shard", "4"),
            r"holds train-00000-of-00007.parquet, but this run makes train-00000-of-00005",
        ),
        (("--num_views", "2"), "but this run makes train.parquet"),
    ):
        with pytest.raises(ValueError, match=words):
            precompute(home, "mixed", *options)
    with pytest.raises(ValueError, match=r"name captions by --caption_column among \['caption', 'height', 'image'"):
        precompute(home, "none", data="tars")
    with pytest.raises(ValueError, match="no column 'title'"):
        precompute(home, "none", "--streaming", "--caption_column", "title")
    assert read_files(home / "mixed") == before and not (home / "none").exists()


@pytest.mark.slow
def test_torchrun_shares_the_shards_out(home):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = str(ROOT / "training" / "precompute_image_tokens.py")
    folders = ("--dvae", home / "dvae", "--train_data_dir", home / "data", "--output_dir", home / "torchrun")
    process = subprocess.run([*command, script, *map(str, folders), *SHARDED], text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    start(home, "alone", *SHARDED)
    assert read_files(home / "torchrun") == read_files(home / "alone")
