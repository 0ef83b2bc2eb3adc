"""A page of examples: captions with the real picture and each model's, of rows spread evenly, so that nobody picked.

It is drawn when pictures are; what they are worth is measured elsewhere.
"""

from PIL import Image
from report_parts import draw_entries, spread

from evaluation.frame import Evaluation


NUM_EXAMPLES = 16
CELL = 96  # side of a picture, in pixels


def draw_examples(evaluation: Evaluation) -> Image.Image:
    """A line a row, in two columns: its own picture, one of each model, its caption."""
    rows = evaluation.rows
    stores = {name: model.store for name, model in evaluation.models.items() if not model.store.missing()}
    entries = [
        ([rows.picture(row), *(store.read(row) for store in stores.values())], rows.captions[row])
        for row in spread(len(rows), NUM_EXAMPLES)
    ]
    heads = [name if len(name) <= 17 else f"{name[:16]}…" for name in ("real", *stores)]
    return draw_entries(entries, heads, num_columns=2 if len(heads) <= 4 and len(entries) > 1 else 1, cell=CELL)
