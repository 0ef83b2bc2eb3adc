"""Puts a trained reranker into a pipeline's folder: `python training/add_reranker.py RERANKER PIPELINE`.

The weights stay as they are on disk, the pipeline's other parts too; its model_index.json is written last, once the
whole loads. `pipe.push_to_hub` then publishes both.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from transformers import AutoConfig, AutoProcessor

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
        ValueError: if the parts do not fit; the pipeline is as it was then.
    """
    if not (pipeline / INDEX).is_file():
        raise OSError(f"{pipeline} is no pipeline's folder: it has no {INDEX}.")
    weights = sorted(reranker.glob("model*.safetensors*"))
    if not weights or not (reranker / "config.json").is_file():
        raise OSError(f"{reranker} is no model's folder: it needs config.json and model.safetensors.")
    processor = AutoProcessor.from_pretrained(reranker)
    classes = (AutoConfig.from_pretrained(reranker).architectures[0], type(processor).__name__)
    new = [pipeline / f"{part}.new" for part in PARTS]
    for folder in new:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for path in (reranker / "config.json", *weights):
        shutil.copy2(path, new[0])
    processor.save_pretrained(new[1])
    index = json.loads((pipeline / INDEX).read_text(encoding="utf-8"))
    index |= {part: ["transformers", name] for part, name in zip(PARTS, classes, strict=True)}
    beside = pipeline / f"{INDEX}.new"
    beside.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for part, folder in zip(PARTS, new, strict=True):
        shutil.rmtree(pipeline / part, ignore_errors=True)
        os.replace(folder, pipeline / part)
    os.replace(beside, pipeline / INDEX)
    DALLEPipeline.from_pretrained(pipeline)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"add_reranker.py: {error}")
