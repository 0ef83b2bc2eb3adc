"""Training runs on tar shards, by number and streamed: they go on bit for bit, and name the rows they skip."""

import json
import multiprocessing
import os
import shutil
import socket

import pytest
from tiny_shards import make_samples, write_shards, write_tar
from tiny_training import dvae_settings, read_log, run


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_on_tar_shards_goes_on_bit_for_bit(tmp_path, streaming):
    samples = make_samples()
    samples[3][1]["jpg"] = b"broken"
    for index, (first, last) in enumerate(((0, 7), (7, 12), (12, 20))):
        write_tar(tmp_path / "data" / f"{index:05d}.tar", samples[first:last])
    settings = dvae_settings(tmp_path / "data", tmp_path / "whole", train_batch_size=4, max_train_steps=12)
    settings |= {"logging_steps": 1, "checkpointing_steps": 5, "streaming": streaming, "shuffle_buffer_size": 3}
    settings |= {"dataloader_num_workers": 2, "initial_kl_per_token": 2.5, "checkpoints_total_limit": 5}
    whole = run(settings)
    # What a run that was killed after update 7 leaves: its checkpoint, and logs that go beyond it.
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "killed" / "checkpoint-5")
    for name in ("metrics.jsonl", "skipped_rows.jsonl"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "killed" / name)
    again = run({**settings, "output_dir": str(tmp_path / "killed")})
    assert [(row["step"], row["loss"], row["skipped_rows"]) for row in again] == [
        (row["step"], row["loss"], row["skipped_rows"]) for row in whole
    ]
    names = [(tmp_path / folder / "skipped_rows.jsonl").read_text() for folder in ("whole", "killed")]
    assert names[0] == names[1]
    assert [json.loads(line)["row"] for line in names[0].splitlines()] == [
        "00000.tar/3" if streaming else "00000.tar/000000003"
    ]


def run_as(settings, index, port):
    """One of two processes of a run."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run(settings)


def run_two(settings):
    """The log of a run of two processes, forked: all is imported already."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_as, args=(settings, index, port)) for index in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return read_log(settings["output_dir"])


def test_two_processes_go_on_in_their_own_lanes_and_one_cannot(tmp_path):
    write_shards(tmp_path / "data", (7, 5, 8))
    settings = dvae_settings(tmp_path / "data", tmp_path / "whole", train_batch_size=3, max_train_steps=8)
    settings |= {"logging_steps": 1, "checkpointing_steps": 3, "streaming": True, "shuffle_buffer_size": 4}
    whole = run_two({**settings, "checkpoints_total_limit": None})
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "killed" / "checkpoint-3")
    settings |= {"output_dir": str(tmp_path / "killed")}
    with pytest.raises(ValueError, match="number of processes is 1, but was 2"):
        run({**settings, "train_batch_size": 6})  # the same pictures an update
    again = run_two(settings)
    assert {row["step"]: row["loss"] for row in again} == {
        row["step"]: row["loss"] for row in whole if row["step"] > 3
    }


def test_validation_on_a_stream_may_be_bounded(tmp_path):
    write_shards(tmp_path / "data", (6, 6), "train-{}.tar")
    write_tar(tmp_path / "data" / "validation.tar", make_samples(0, 5))
    settings = dvae_settings(tmp_path / "data", tmp_path / "run", max_train_steps=2, streaming=True)
    settings |= {"validation_split": "validation", "max_validation_samples": 3, "initial_kl_per_token": None}
    run(settings)
    bounded = read_log(tmp_path / "run")[-1]["validation_psnr"]
    write_tar(tmp_path / "data" / "validation.tar", make_samples(0, 3))
    run({**settings, "output_dir": str(tmp_path / "three"), "max_validation_samples": None})
    assert read_log(tmp_path / "three")[-1]["validation_psnr"] == bounded
