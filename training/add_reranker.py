"""Puts a trained reranker into a pipeline's folder: `python training/add_reranker.py RERANKER PIPELINE`.

The weights stay as they are on disk, the pipeline's other parts too. Nothing of it changes before the whole has been
loaded with the new parts; its model_index.json is written last. `pipe.push_to_hub` then publishes both.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoProcessor

from hf_dalle import DALLEPipeline


PARTS = ("reranker", "reranker_processor")
INDEX = "model_index.json"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="add_reranker.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "reranker", type=Path, help="output_dir of train.py's stage `reranker`, or another CLIP's folder"
    )
    parser.add_argument("pipeline", type=Path, help="folder of a DALLEPipeline, whose own reranker is replaced")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    add_reranker(arguments.reranker, arguments.pipeline)
    num_bytes = sum(path.stat().st_size for path in arguments.pipeline.rglob("*") if path.is_file())
    print(f"{arguments.pipeline} ranks its candidates now; it has {num_bytes / 1e6:.1f} MB.")


def add_reranker(reranker: Path, pipeline: Path) -> None:
    """
    Args:
        reranker (`Path`): a folder that `AutoModel` and `AutoProcessor` load, weights as safetensors.
        pipeline (`Path`): a folder that [`DALLEPipeline.from_pretrained`] loads.

    Raises:
        OSError: if one of them is no such folder.
        ValueError: if the whole cannot be loaded; the pipeline is as it was then.
    """
    if not (pipeline / INDEX).is_file():
        raise OSError(f"{pipeline} is no pipeline's folder: it has no {INDEX}.")
    weights = sorted(reranker.glob("model*.safetensors*"))
    if not weights or not (reranker / "config.json").is_file():
        raise OSError(f"{reranker} is no model's folder: it needs config.json and model.safetensors.")
    new, beside = [pipeline / f"{part}.new" for part in PARTS], pipeline / f"{INDEX}.new"
    try:
        write_parts(reranker, weights, new)
        classes = load_whole(pipeline, new)
        index = json.loads((pipeline / INDEX).read_text(encoding="utf-8"))
        index |= {part: ["transformers", name] for part, name in zip(PARTS, classes, strict=True)}
        beside.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for part, folder in zip(PARTS, new, strict=True):
            shutil.rmtree(pipeline / part, ignore_errors=True)
            os.replace(folder, pipeline / part)
        os.replace(beside, pipeline / INDEX)
    finally:
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        beside.unlink(missing_ok=True)


def write_parts(reranker: Path, weights: list[Path], new: list[Path]) -> None:
    """Model and processor, a folder each."""
    processor = AutoProcessor.from_pretrained(reranker)
    for folder in new:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for path in (reranker / "config.json", *weights):
        shutil.copy2(path, new[0])
    processor.save_pretrained(new[1])


def load_whole(pipeline: Path, new: list[Path]) -> tuple[str, str]:
    """Loads the pipeline with the new parts in the place of its own; gives the parts' classes."""
    try:
        parts = AutoModel.from_pretrained(new[0]), AutoProcessor.from_pretrained(new[1])
        DALLEPipeline.from_pretrained(pipeline, **dict(zip(PARTS, parts, strict=True)))
    except Exception as error:  # of safetensors, transformers and diffusers, of many kinds
        raise ValueError(f"{pipeline} cannot be loaded with this reranker, and stays as it is: {error}") from error
    return AutoConfig.from_pretrained(new[0]).architectures[0], type(parts[1]).__name__


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"add_reranker.py: {error}")
