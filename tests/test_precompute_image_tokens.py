"""The store of image tokens: what is written, what is refused, and training from it."""

import json

import datasets
import pytest
import torch
from precompute_image_tokens import fingerprint, main
from tiny_training import (
    MODEL,
    dvae_settings,
    list_rows,
    losses,
    prior_settings,
    run,
    write_data,
    write_parquet,
    write_tokenizer,
)

from hf_dalle import DalleDVAE, DalleImageProcessor
from hf_dalle.data import load_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, a tokenizer, two dVAEs, and the tokens of the first."""
    folder = tmp_path_factory.mktemp("tokens")
    write_data(folder / "data")
    write_tokenizer(folder / "tokenizer")
    for seed in (0, 1):
        settings = dvae_settings(folder / "data", folder / f"dvae-{seed}", seed=seed, max_train_steps=5)
        run({**settings, "initial_kl_per_token": 2.5})
    precompute(folder, folder / "store", "--splits", "train", "validation", "--num_views", "3")
    return folder


def precompute(home, output_dir, *options, dvae="dvae-0"):
    folders = {"dvae": home / dvae, "train_data_dir": home / "data", "output_dir": output_dir}
    # options given later win
    main([*[part for name, value in folders.items() for part in (f"--{name}", str(value))], *options])


def test_views_are_the_picture_and_crops_of_it(home):
    rows = load_rows(str(home / "store"))
    assert rows.column_names == ["captions", "image_tokens"] and len(rows) == 20
    assert rows.features["image_tokens"] == datasets.List(datasets.List(datasets.Value("int32")))
    assert len(load_rows(str(home / "store"), split="validation")) == 5
    dvae, processor = DalleDVAE.from_pretrained(home / "dvae-0"), DalleImageProcessor(size=16)
    pixel_values = processor.preprocess([row["image"] for row in list_rows()])["pixel_values"]
    tokens = dvae.encode(pixel_values).tokens.flatten(1)
    views = torch.tensor(rows["image_tokens"][:])  # rows x views x tokens
    assert views.shape == (20, 3, 16) and torch.equal(views[:, 0].long(), tokens)
    assert rows["captions"][:] == [row["captions"] for row in list_rows()]


def test_crops_differ_by_view_and_seed(home, tmp_path):
    ranges = ("--resize_range", "1", "2", "--num_views", "3")
    data = write_parquet(tmp_path / "data" / "train.parquet", [
        {**row, "image": row["image"].resize((64, 64))} for row in list_rows()
    ]).parent  # fmt: skip
    stores = {}
    for name, options in (("one", ()), ("same", ("--batch_size", "3")), ("other", ("--seed", "1"))):
        precompute(home, tmp_path / name, "--train_data_dir", str(data), *ranges, *options)
        stores[name] = torch.tensor(load_rows(str(tmp_path / name))["image_tokens"][:])
    assert torch.equal(stores["one"], stores["same"])  # whatever the batches
    assert torch.equal(stores["one"][:, 0], stores["other"][:, 0])
    assert not torch.equal(stores["one"][:, 1:], stores["other"][:, 1:])
    assert not torch.equal(stores["one"][:, 1], stores["one"][:, 2])


def test_broken_rows_are_left_out_and_named(home, tmp_path, capsys):
    rows = list_rows()[:5]
    rows[1]["image"], rows[4]["image"] = b"broken", None
    write_parquet(tmp_path / "data" / "train.parquet", rows)
    arguments = ("--train_data_dir", str(tmp_path / "data"), "--batch_size", "2")
    precompute(home, tmp_path / "store", *arguments)
    printed = capsys.readouterr()
    assert "train: 3 rows of 1 views, 2 skipped." in printed.out
    assert "Skipped row 1 of train: broken picture" in printed.err and "Skipped row 4 of train: no pic" in printed.err
    stored = load_rows(str(tmp_path / "store"))
    assert stored["captions"][:] == [rows[row]["captions"] for row in (0, 2, 3)]
    whole = load_rows(str(home / "store"))["image_tokens"]
    assert [views[0] for views in stored["image_tokens"]] == [whole[row][0] for row in (0, 2, 3)]
    write_parquet(tmp_path / "data" / "train.parquet", [rows[1]])
    with pytest.raises(ValueError, match="None of the 1 rows can be used; the first: broken picture"):
        precompute(home, tmp_path / "none", *arguments)


def test_other_stores_and_the_data_itself_are_not_written_over(home, tmp_path):
    precompute(home, tmp_path / "store", "--splits", "validation")
    precompute(home, tmp_path / "store")  # the same dVAE may add a split
    written = (tmp_path / "store" / "train.parquet").read_bytes()
    with pytest.raises(ValueError, match="store holds the tokens of another dVAE"):
        precompute(home, tmp_path / "store", dvae="dvae-1")
    assert (tmp_path / "store" / "train.parquet").read_bytes() == written
    data = (home / "data" / "train.parquet").read_bytes()
    with pytest.raises(ValueError, match="data holds parquet files that are no store"):
        precompute(home, home / "data")
    assert (home / "data" / "train.parquet").read_bytes() == data


def test_what_is_wrong_is_named(home, tmp_path, capsys):
    with pytest.raises(OSError, match="test.parquet"):
        precompute(home, tmp_path / "store", "--splits", "train", "test")
    with pytest.raises(ValueError, match="no column 'picture'"):
        precompute(home, tmp_path / "store", "--image_column", "picture")
    with pytest.raises(ValueError, match="`resize_range`"):
        precompute(home, tmp_path / "store", "--resize_range", "0", "1")
    with pytest.raises(SystemExit):
        precompute(home, tmp_path / "store", "--num_views", "0")
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"dataloader_num_workers": 2}, {"mixed_precision": "bf16"}])
def test_training_from_the_store_is_training_from_the_pictures(home, tmp_path, changes):
    precompute(home, tmp_path / "store", "--splits", "train", "validation")
    folders = (home / "dvae-0", home / "tokenizer")
    settings = {"max_train_steps": 8, "logging_steps": 1, "validation_split": "validation", "validation_steps": 4}
    settings |= changes
    pictures = run(prior_settings(home / "data", *folders, tmp_path / "pictures", **settings))
    settings |= {"tokens_column": "image_tokens"}
    stored = run(prior_settings(tmp_path / "store", *folders, tmp_path / "stored", **settings))
    for name in ("loss", "image_loss", "grad_norm", "validation_loss", "validation_caption_loss"):
        assert len(losses(stored, name)) in (2, 8) and losses(stored, name) == losses(pictures, name)


def test_a_store_of_another_dvae_is_refused(home, tmp_path):
    settings = prior_settings(home / "store", home / "dvae-1", home / "tokenizer", tmp_path / "run")
    with pytest.raises(ValueError, match="another dVAE than"):
        run({**settings, "tokens_column": "image_tokens"})
    named = {**settings, "train_data_dir": None, "dataset_name": str(home / "store")}
    with pytest.raises(ValueError, match="another dVAE than"):
        run({**named, "tokens_column": "image_tokens"})
    settings["train_data_dir"] = str(home / "data")
    with pytest.raises(OSError, match="has no image_tokens.json"):
        run({**settings, "tokens_column": "image_tokens"})


def test_a_store_of_another_grid_is_refused(home, tmp_path):
    precompute(home, tmp_path / "store")
    dvae = DalleDVAE(**{**MODEL, "sample_size": 32})
    dvae.save_pretrained(tmp_path / "dvae")
    stamp = json.loads((tmp_path / "store" / "image_tokens.json").read_text())
    assert stamp["vocab_size"] == 16
    stamp["dvae"] = fingerprint(tmp_path / "dvae")  # as if it were that one's
    (tmp_path / "store" / "image_tokens.json").write_text(json.dumps(stamp))
    settings = prior_settings(tmp_path / "store", tmp_path / "dvae", home / "tokenizer", tmp_path / "run")
    with pytest.raises(ValueError, match="The stored pictures have 16 tokens, but the dVAE's 64"):
        run({**settings, "tokens_column": "image_tokens"})
