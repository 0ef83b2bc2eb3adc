"""Networks that say how well a picture fits its caption: CLIP-like ones, and the judge of concepts and styles.

Either may judge; a CLIP-like one may rank. The maths of concepts lives in `judge.py`, the scores in
`hf_dalle.reranking`.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from judge import Judge, extract_features, load_judge, name_judge, reference_features
from PIL import Image
from transformers import AutoModel, AutoProcessor, ProcessorMixin

from evaluation.features import digest_weights
from evaluation.frame import Evaluation
from evaluation.models import Model
from evaluation.stored import make_digest
from hf_dalle.data import load_rows
from hf_dalle.reranking import score_images


class Ranker:
    """
    A CLIP-like model with its processor.

    Args:
        place (`str` or `Path`): a folder or a repository of the Hub.
        device (`torch.device`, *optional*): where it runs.
        processor_place (`str` or `Path`, *optional*): of the processor; by default the same.

    Attributes:
        name, fingerprint (`str`): for the report; of the weights.
        qualities (`list[str]`): what [`Ranker.judge`] gives.
        key (`dict`): what stored work of it follows from.

    Raises:
        OSError: if it cannot be loaded.
    """

    qualities = ["similarity"]

    def __init__(
        self, place: str | Path, device: torch.device | None = None, processor_place: str | Path | None = None
    ):
        try:
            self.model = AutoModel.from_pretrained(place).to(device or "cpu").eval()
            self.processor = AutoProcessor.from_pretrained(processor_place or place)
            prepared = digest_processor(self.processor)
        except (OSError, ValueError) as error:
            raise OSError(f"{place} is no CLIP-like model with a processor that can be loaded: {error}") from error
        self.fingerprint = digest_weights(self.model)
        self.name = f"{type(self.model).__name__} {Path(place).name if Path(place).exists() else place}"
        self.key = {"ranker": self.fingerprint, "processor": prepared}

    def score(self, caption: str, pictures: list[Image.Image]) -> np.ndarray:
        """A score a picture, higher is better."""
        return score_images(self.model, self.processor, caption, pictures).numpy()

    def judge(self, row: int, caption: str, pictures: list[Image.Image]) -> dict[str, np.ndarray]:
        """`similarity` a picture, the model's logit for the caption."""
        return {"similarity": self.score(caption, pictures)}


def find_reranker(model: Model, place: str | None, device: torch.device | None = None) -> Ranker:
    """
    The reranker at `place`, or a pipeline's own.

    Raises:
        ValueError: if the pipeline has none.
        OSError: if it cannot be loaded.
    """
    if place is not None:
        return Ranker(place, device)
    index = json.loads((model.folder / "model_index.json").read_text(encoding="utf-8"))
    if not (index.get("reranker") or [None])[0]:
        raise ValueError(
            f"{model.name} has no reranker: name one, a CLIP-like model, by `reranker` of the settings of `reranking`."
        )
    return Ranker(model.folder / "reranker", device, model.folder / "reranker_processor")


def digest_processor(processor: ProcessorMixin) -> str:
    """Of how pictures and captions are prepared; a `ValueError` where one of them is not."""
    lacking = [part for part in ("image_processor", "tokenizer") if not hasattr(processor, part)]
    if lacking:
        raise ValueError(f"its {type(processor).__name__} has no {lacking[0]}")
    tokenizer = processor.tokenizer
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return make_digest([processor.image_processor.to_json_string(), words, tokenizer.model_max_length])


class ConceptJudge:
    """
    The judge of `judge.py` on rows with the columns `hexcode` and `style`, by the training pictures of the same data.

    A training row is left out of its own concept's mean, and the rows that are judged did not teach the probe. Where
    no training picture shows a split's concepts, its own real pictures make their means, each left out of its own.

    Attributes: as those of [`Ranker`].

    Raises:
        ValueError: for rows without these columns, or a concept or style that nothing can be told by.
        OSError: if the network is not installed, or there is no training split.
    """

    qualities = ["recall@1", "recall@5", "style"]

    def __init__(self, evaluation: Evaluation, side: int):
        rows, args = evaluation.rows, evaluation.args
        lacking = [name for name in ("hexcode", "style") if not rows.has_column(name)]
        if lacking or args.data_dir is None:
            what = f"a column {lacking[0]!r}" if lacking else "`data_dir`, with a split `train`"
            raise ValueError(f"`judge: concepts` needs {what}: name a CLIP-like model by `judge` in its place.")
        self.network, self.side = load_judge().to(evaluation.device), side
        train = load_rows(args.data_dir, image_column=args.image_column)
        cache = Path(args.data_dir) / ".judge"
        references = evaluation.on_main_first(
            lambda: reference_features(self.network, train, side, cache, args.image_column)
        )
        self.concepts, self.styles = rows.column("hexcode"), rows.column("style")
        self.own = [row if split == "train" else -1 for split, row, _ in rows.places]
        taught = sorted({row for row in self.own if row >= 0})
        judge = Judge(references, train["hexcode"][:], train["style"][:], without_probe=taught)
        self.judges = {split: self._extend(judge, evaluation, split) for split in dict.fromkeys(rows.splits)}
        self.splits = rows.splits
        self.name = f"{name_judge()}, pictures reduced to {side} x {side}"
        self.fingerprint = hashlib.sha256(references.numpy().tobytes()).hexdigest()[:32]
        labels = [train[name][:] for name in ("hexcode", "style")] + [self.concepts, self.styles]
        self.key = {"network": name_judge(), "side": side, "references": self.fingerprint, "taught": taught}
        self.key |= {"labels": make_digest(labels)}

    def _extend(self, judge: Judge, evaluation: Evaluation, split: str) -> Judge:
        """
        The judge of one split, and `own` of its rows; refuses a row that cannot be judged. A picture of several rows,
        one a caption, is one reference, or it would be compared with itself.
        """
        chosen = evaluation.rows.of_split(split)
        concepts, styles = ([names[row] for row in chosen] for names in (self.concepts, self.styles))
        if not {*judge.concepts} & {*concepts}:
            of_picture = {}  # by the place in the data, its rows
            for row in chosen:
                of_picture.setdefault(evaluation.rows.places[row][1], []).append(row)
            firsts = [rows[0] for rows in of_picture.values()]
            features = extract_features(self.network, [evaluation.rows.picture(row) for row in firsts], self.side)
            for place, rows in enumerate(of_picture.values()):
                for row in rows:
                    self.own[row] = len(judge.places) + place
            judge = judge.extend(features, *([names[row] for row in firsts] for names in (self.concepts, self.styles)))
        try:
            blank = torch.zeros(len(chosen), len(judge.mean))
            judge.judge(blank, concepts, styles, [self.own[row] for row in chosen])
        except ValueError as error:
            raise ValueError(f"Split {split!r} cannot be judged: {error}") from error
        return judge

    def judge(self, row: int, caption: str, pictures: list[Image.Image]) -> dict[str, np.ndarray]:
        """Whether the row's concept is the nearest, among the 5 nearest, and the style right: 0 or 1 a picture."""
        features, number = extract_features(self.network, pictures, self.side), len(pictures)
        names = [self.concepts[row]] * number, [self.styles[row]] * number
        ranks, is_right = self.judges[self.splits[row]].judge(features, *names, own=[self.own[row]] * number)
        hits = {"recall@1": ranks <= 1, "recall@5": ranks <= 5, "style": is_right}
        return {name: values.double().numpy() for name, values in hits.items()}
