"""Run where the originals are: converts checkpoints with `--verify`, which there compares with the originals' code.

Usage: FOLDER OPTIONS, as JSON {"clone": path of minDALL-E or null, "heads": {width: number}, "cases": {name: arguments
of `convert`, and `exchanged`: a part and two of its weights to exchange}}. Errors are written as errors.json.
"""

import json
import sys
from pathlib import Path

import originals_setup

from conversion import convert
from conversion.families import rudalle


def exchange(module, part, *names):
    """Lets a family's `read_source` fill each of two weights with the other's."""

    def read_source(*args):
        conversion = original(*args)
        keys, others = conversion.parts[part].keys, dict(zip(names, names[::-1], strict=True))
        keys.rules = [
            rule._replace(targets=tuple(others.get(name, name) for name in rule.targets)) for rule in keys.rules
        ]
        return conversion

    original, module.read_source = module.read_source, read_source
    return original


def main(folder, clone, heads, cases):
    if clone:
        originals_setup.add_mindalle(clone)
    rudalle.HEADS_OF_WIDTH.update({int(width): number for width, number in heads.items()})
    errors = {}
    for name, options in cases.items():
        module, exchanged = convert.find_family(options["family"]), options.pop("exchanged", None)
        original = exchange(module, *exchanged) if exchanged else module.read_source
        try:
            convert.convert(**options, output=folder / name, do_verify=True)
        except ValueError as error:
            errors[name] = str(error)
        module.read_source = original
    (folder / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
