"""Overlap: planted near-duplicates are found, two searches agree, the page counts right, what misleads is refused."""

import html.parser
import importlib.util
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from evaluation import fidelity, overlap
from evaluation.features import load_network
from evaluation.frame import Evaluation
from evaluation.overlap import (
    Settings,
    check,
    choose_pairs,
    describe,
    find_overlap,
    list_train,
    measure,
    search_blocks,
)
from evaluation.overlap_page import Pair, write_page
from evaluation.processes import make_accelerator
from evaluation.settings import EvaluationArguments
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tiny_data import write_parquet
from tiny_evaluation import make_settings


NUM_TRAIN, NUM_UNRELATED = 12, 8


def draw_scene(seed, side=96):
    """Polygons and discs of any colour on a ground of any colour."""
    generator = np.random.default_rng(seed)
    picture = Image.new("RGB", (side, side), tuple(generator.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        corners = [tuple(point) for point in generator.integers(0, side, (3, 2)).tolist()]
        pen.polygon(corners, fill=tuple(generator.integers(0, 256, 3).tolist()))
        x, y = generator.integers(0, side - 20, 2).tolist()
        pen.ellipse((x, y, x + 30, y + 30), fill=tuple(generator.integers(0, 256, 3).tolist()))
    return picture


def recompress(picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


PLANTED = {
    "crop": lambda picture: picture.crop((5, 5, 91, 91)).resize((96, 96)),
    "blur": lambda picture: picture.filter(ImageFilter.GaussianBlur(1)),
    "recompression": recompress,
    "flip": ImageOps.mirror,
    "copy": lambda picture: picture,
}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Validation rows: of each kind of change two training pictures, then unrelated ones."""
    home = tmp_path_factory.mktemp("home")
    train = [draw_scene(seed) for seed in range(NUM_TRAIN)]
    changed = [change(train[2 * place + twice]) for place, change in enumerate(PLANTED.values()) for twice in (0, 1)]
    unrelated = [draw_scene(100 + seed) for seed in range(NUM_UNRELATED)]
    for split, pictures in {"train": train, "validation": [*changed, *unrelated]}.items():
        rows = [{"image": picture, "captions": [f"scene {number}"]} for number, picture in enumerate(pictures)]
        write_parquet(home / "data" / f"{split}.parquet", rows)
    folder = home / "pictures"
    folder.mkdir()
    for number in range(len(changed) + len(unrelated)):
        draw_scene(number).save(folder / f"validation-{number:06d}.png")
    return make_evaluation(home, home / "run")


def make_evaluation(home, output_dir, **settings):
    models = [{"name": "somebody", "images": str(home / "pictures")}]
    given = make_settings(home, output_dir, models=models, num_captions=None, **settings)
    made = Evaluation(EvaluationArguments(**given), make_accelerator())
    made.folder.mkdir(exist_ok=True)
    return made


def test_planted_near_duplicates_are_found_above_a_threshold(evaluation):
    found = find_overlap(evaluation, Settings())
    planted, others = np.split(found["similarities"], [2 * len(PLANTED)])
    assert found["nearest"][: 2 * len(PLANTED)].tolist() == list(range(2 * len(PLANTED)))
    # the threshold that a person finds between them
    assert planted.min() > others.max() + 0.1, (planted, others)
    copies = planted[-2:]
    assert copies.min() > 0.9999


def test_measurement_page_and_words(evaluation):
    figures = measure(evaluation, Settings())
    assert figures["threshold"] is None and figures["num_overlapping"] is None
    assert "No threshold is set" in describe(figures) and "overlap: no `threshold` is set" in evaluation.notes[-1]
    similarities = find_overlap(evaluation, Settings())["similarities"]
    threshold = float((similarities[: 2 * len(PLANTED)].min() + similarities[2 * len(PLANTED) :].max()) / 2)
    figures = measure(evaluation, Settings(threshold=round(threshold, 3)))
    assert figures["num_overlapping"] == 2 * len(PLANTED) and figures["num_pictures"] == 18
    assert "10 of 18 pictures (55.6 %) overlap" in describe(figures) and figures["num_train"] == NUM_TRAIN
    json.dumps(figures, allow_nan=False)
    pairs = read_pairs((evaluation.folder / "overlap.html").read_text())
    assert len(pairs) == 18 and pairs == sorted(pairs, reverse=True)
    assert pairs[0] == pytest.approx(similarities.max(), abs=1e-5)


def test_fidelity_leaves_out_what_overlaps(evaluation):
    home, network = evaluation.folder.parent, load_network("efficientnet-lite0", None)
    settings = fidelity.Settings(use_few_pictures=True, num_splits=1)
    similarities = find_overlap(evaluation, Settings())["similarities"]
    assert fidelity.find_kept(evaluation, settings, network) is None
    given = make_evaluation(home, evaluation.folder, measure={"overlap": {"threshold": 0.5}})
    kept = fidelity.find_kept(given, settings, network)
    assert kept.tolist() == (similarities < 0.5).tolist() and 0 < kept.sum() < len(kept)
    given = make_evaluation(home, evaluation.folder, measure={"overlap": {"threshold": -1.0}})
    assert fidelity.find_kept(given, settings, network) is None
    assert "no curve without overlap. There are 0 real (without overlap) pictures" in given.notes[-1]


def test_what_is_counted_is_what_is_left_out():
    similarities = np.array([0.9, 0.5], dtype=np.float32)  # of which the first is 0.89999998
    assert similarities[0] >= 0.9  # as numpy has it, which rounds 0.9 too; report and page count in float64
    assert not overlap.find_from(similarities, 0.9).any() and overlap.count_from(similarities, 0.9) == 0
    assert overlap.find_from(similarities, float(similarities[0])).tolist() == [True, False]


def test_fewer_training_pictures(evaluation):
    found = find_overlap(evaluation, Settings(num_train_pictures=2))
    assert set(found["nearest"].tolist()) <= {0, 1}


def test_pairs_are_of_all_similarities(evaluation):
    train = list_train(evaluation, Settings())
    number = len(evaluation.rows)
    found = {
        "similarities": np.array([0.951] * (number - 2) + [0.5, 0.7], dtype=np.float32),
        "nearest": np.zeros(number, dtype=int),
    }
    pairs = choose_pairs(evaluation, train, found, 4)
    assert [round(pair.similarity, 2) for pair in pairs] == [0.95, 0.95, 0.7, 0.5]
    assert pairs[2].real_name == evaluation.rows.ids[number - 1]


# -------------------------------------------------------------------------------------------------------------- search


def make_vectors(num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(num_rows, 16, generator=generator), dim=1)


def cut(references, size):
    return ((first, references[first : first + size]) for first in range(0, len(references), size))


@pytest.mark.parametrize("use_faiss", [False, True])
@pytest.mark.parametrize("size", [7, 1000])
def test_searches_find_the_nearest(use_faiss, size):
    if use_faiss and importlib.util.find_spec("faiss") is None:
        pytest.skip("faiss is not installed")
    queries, references = make_vectors(40, 0), make_vectors(300, 1)
    queries[:5] = references[10:15]
    similarities, nearest = search_blocks(queries, cut(references, size), use_faiss)
    products = queries.double().numpy() @ references.double().numpy().T
    assert nearest.tolist() == products.argmax(1).tolist() and nearest[:5].tolist() == [10, 11, 12, 13, 14]
    assert similarities == pytest.approx(products.max(1), abs=1e-6)


def test_faiss_gives_the_same_through_the_measurement(evaluation):
    pytest.importorskip("faiss")
    exact, other = (find_overlap(evaluation, Settings(search=search)) for search in ("exact", "faiss"))
    assert exact["nearest"].tolist() == other["nearest"].tolist()
    assert exact["similarities"] == pytest.approx(other["similarities"], abs=1e-6)


def test_shards_change_nothing(evaluation, monkeypatch):
    whole = find_overlap(evaluation, Settings())
    monkeypatch.setattr(overlap, "SHARD_SIZE", 5)
    monkeypatch.setattr(overlap, "NUM_QUERIES", 4)
    parts = find_overlap(evaluation, Settings())
    assert parts["nearest"].tolist() == whole["nearest"].tolist()
    assert parts["similarities"] == pytest.approx(whole["similarities"], abs=1e-4)  # batches are others


# ---------------------------------------------------------------------------------------------------------------- page


class PairReader(html.parser.HTMLParser):
    """Collects similarities and addresses of pictures."""

    def __init__(self):
        super().__init__()
        self.similarities, self.addresses, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "li":
            self.similarities.append(float(attributes["data-similarity"]))
        if tag == "img":
            self.addresses.append(attributes["src"])
        self.links += [value for name, value in attributes.items() if name in ("src", "href") and tag != "img"]


def read_pairs(text):
    reader = PairReader()
    reader.feed(text)
    assert len(reader.addresses) == 2 * len(reader.similarities)
    assert all(address.startswith("data:image/jpeg;base64,") for address in reader.addresses)
    assert reader.links == ["data:,"]  # needs nothing beside it
    return reader.similarities


def test_page_escapes_names_and_holds_all_similarities(tmp_path):
    pair = Pair(draw_scene(0, 300), draw_scene(1), 0.8, '<b>&"', "training 1")
    write_page(tmp_path / "page.html", np.array([0.25, 0.8, 0.5]), [pair], 0.75, "some <net>")
    text = (tmp_path / "page.html").read_text()
    assert "<b>" not in text and "some &lt;net&gt;" in text
    stored = re.search(r'id="similarities">(.*?)</script>', text).group(1)
    assert json.loads(stored) == [0.8, 0.5, 0.25]
    assert 'value="0.75"' in text and 'min="0.2"' in text and "{{" not in text


@pytest.mark.browser
def test_page_counts_in_a_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium")
    similarities = np.linspace(0.2, 0.95, 16)  # 0.2, 0.25, ...
    pairs = [Pair(draw_scene(0), draw_scene(1), similarity, "real", "training") for similarity in (0.95, 0.5, 0.2)]
    for threshold, number, num_over in ((0.425, 11, 2), (0.99, 0, 0), (-1, 16, 3)):
        page = tmp_path / "page.html"
        write_page(page, similarities, pairs, threshold, "a network")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
        text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        assert f"{number} of 16 real pictures overlap ({100 * number / 16:.1f} %)." in text
        assert f"threshold: {threshold}</code>" in text and text.count("<rect") == 80
        assert len(re.findall('<li [^>]*class="over"', text)) == num_over


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_would_mislead_is_refused(evaluation):
    home = evaluation.folder.parent
    check(evaluation, Settings())
    with pytest.raises(ValueError, match="compares split 'validation' with itself"):
        check(evaluation, Settings(train_split="validation"))
    with pytest.raises(ValueError, match="has no column 'photo'"):
        check(evaluation, Settings(train_image_column="photo"))
    with pytest.raises(OSError, match="nowhere. Is the path right"):
        check(evaluation, Settings(train_data_dir=str(home / "nowhere")))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": 1.5}, "a cosine lies between"),
        ({"num_pairs": 0}, "`num_pairs` is 0"),
        ({"side": 0}, "`side` is 0"),
        ({"train_data_dir": "x", "train_dataset_name": "y"}, "at most one"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        Settings(**settings)


def test_a_row_without_a_picture_is_told_from_one_with():
    rows = [{"image": {"bytes": None, "path": None}}], [{"image": {"bytes": b"x", "path": None}}], [{"image": b"x"}]
    absent, given, plain = (overlap.hash_pictures(part, "image", 1) for part in rows)
    assert absent != given == plain
