"""What the small Hub finds wrong with a card's metadata: some of what the Hub checks, and not the whole of its lists.

Licences and tasks are those that this project's cards could name.
"""

import re
from typing import Any

import yaml


LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "openrail", "other")
PIPELINE_TAGS = ("text-to-image", "image-to-image", "unconditional-image-generation", "image-feature-extraction")
REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+")
TEXTS = ("language", "library_name", "pipeline_tag")  # `language` may be a list too
LISTS = ("tags", "metrics", "datasets", "widget")


def find_faults(text: str) -> list[str]:
    """What is wrong with this YAML, a line a fault."""
    try:
        metadata = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"]
    faults = [f'"{name}" must be a list' for name in LISTS if not isinstance(metadata.get(name, []), list)]
    faults += [f'"{name}" must be a string' for name in TEXTS if not isinstance(metadata.get(name, ""), str | list)]
    faults += [f'"license" must be one of {LICENSES}'] * (metadata.get("license", "other") not in LICENSES)
    if metadata.get("pipeline_tag", "text-to-image") not in PIPELINE_TAGS:
        faults.append(f'"pipeline_tag" must be one of {PIPELINE_TAGS}')
    for key in ("base_model", "datasets"):
        names = metadata.get(key, [])
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or not REPOSITORY.fullmatch(name):
                faults.append(f'"{key}" with value {name!r} is not valid')
    return faults + [fault for entry in _list(metadata.get("model-index")) for fault in _find_index_faults(entry)]


def _find_index_faults(entry: Any) -> list[str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return ['"model-index[].name" is required']
    if not _list(entry.get("results")):
        return ['"model-index[].results" is required']
    faults = []
    for result in _list(entry["results"]):
        places = {"task": ["type"], "dataset": ["type", "name"]}
        parts = [(place, result.get(place), needed) for place, needed in places.items()]
        metrics = _list(result.get("metrics"))
        parts += [("metrics[]", metric, ["type", "value"]) for metric in metrics or [None]]
        for place, part, needed in parts:
            absent = [name for name in needed if not isinstance(part, dict) or part.get(name) is None]
            faults += [f'"model-index[].results[].{place}.{name}" is required' for name in absent]
    return faults


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []
