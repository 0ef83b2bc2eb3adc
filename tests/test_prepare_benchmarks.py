"""MS-COCO and CUB from files of their authors' format to a report: the recipes run on fixtures, with tiny models.

What is measured is shrunk to what random weights and six pictures allow; rows, captions and names are the recipes'.
"""

import json
import shutil

import evaluate
import prepare_benchmarks
import pytest
import yaml
from evaluation.pictures import PictureStore
from evaluation.settings import EvaluationArguments
from tiny_data import encode_picture, list_rows
from tiny_evaluation import build_home, read_report
from tiny_training import ROOT

from hf_dalle.data import load_rows


CONFIGS = ROOT / "training" / "configs"
FEW = {"fidelity": {"network": "efficientnet-lite0", "side": 16, "radii": [0, 2], "use_few_pictures": True}}
FEW["fidelity"] |= {"num_resamples": 2, "num_splits": 2, "num_sizes": 0, "num_subsets": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return build_home(tmp_path_factory.mktemp("home"))


def write_coco(folder):
    """`val2014` and `captions_val2014.json`: pictures of several sizes and their captions, in no order."""
    (folder / "val2014").mkdir(parents=True)
    images, annotations = [], []
    for number, row in enumerate(list_rows()[:8]):
        name, image_id = f"COCO_val2014_{1000 - number:012d}.jpg", 1000 - number
        picture = row["image"].resize((20 + number, 24))
        (folder / "val2014" / name).write_bytes(encode_picture(picture, "JPEG"))
        images.append({"license": 3, "file_name": name, "height": 24, "width": 20 + number, "id": image_id})
        for place in (3, 1, 2):
            caption = f"{row['captions'][place % 2]}, {place}"
            annotations.append({"image_id": image_id, "id": 10 * image_id + place, "caption": caption})
    read = {"info": {}, "licenses": [], "images": images, "annotations": annotations[::-1]}
    (folder / "captions_val2014.json").write_text(json.dumps(read))
    return ["coco", "--images", str(folder / "val2014"), "--annotations", str(folder / "captions_val2014.json")]


def write_cub(folder):
    """`CUB_200_2011/images` and `cvpr2016_cub/text_c10`: four classes of two pictures, of which two are tested."""
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "004.Groove_billed_Ani", "099.Ovenbird"]
    for number, row in enumerate(list_rows()[:8]):
        name = names[number // 2]
        stem = f"{name[4:]}_{number:04d}_{7 * number}"
        picture, text = folder / "CUB_200_2011" / "images" / name, folder / "cvpr2016_cub" / "text_c10" / name
        for part in (picture, text):
            part.mkdir(parents=True, exist_ok=True)
        (picture / f"{stem}.jpg").write_bytes(encode_picture(row["image"], "JPEG"))
        (text / f"{stem}.txt").write_text("\n".join([*row["captions"], "this is a bird", ""]))
    (folder / "cvpr2016_cub" / "testclasses.txt").write_text(f"{names[2]}\n{names[0]}\n")
    return [
        *("cub", "--images", str(folder / "CUB_200_2011" / "images")),
        *("--captions", str(folder / "cvpr2016_cub" / "text_c10")),
    ]


def run_recipe(name, home, folder, data, **settings):
    """A recipe on prepared data, its models and measurements made tiny; gives the report."""
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    EvaluationArguments(**given)  # as it stands
    given |= {"data_dir": str(data), "output_dir": str(folder / "out"), "evaluation_log": str(folder / "log.jsonl")}
    for model in given["models"]:
        model["pipeline"] = str(home / "checkpoint")
    measure = {"fidelity": FEW["fidelity"], "elb": {"num_samples": 2}}
    given["measure"] = {key: measure[key] for key in given["measure"] if key in measure}
    given |= settings
    (folder / "config.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    evaluate.main([str(folder / "config.yaml")])
    return read_report(folder / "out")


def test_coco_from_its_files_to_a_report(home, tmp_path):
    options = write_coco(tmp_path)
    prepare_benchmarks.main([*options, "--output_dir", str(tmp_path / "data")])
    rows = load_rows(str(tmp_path / "data"), split="validation")
    assert rows["id"][:] == [str(number) for number in range(993, 1001)]
    first, second = list_rows()[0]["captions"]
    assert rows[7]["captions"] == [f"{second}, 1", f"{first}, 2", f"{second}, 3"]
    name = "COCO_val2014_000000001000.jpg"
    assert rows[7]["image"] == {"bytes": (tmp_path / "val2014" / name).read_bytes(), "path": name}
    report = run_recipe("eval_coco", home, tmp_path, tmp_path / "data", num_captions=6)
    store = PictureStore.open(tmp_path / "out" / "pictures" / "ours")
    assert len(store) == 6 and set(store.ids) <= set(rows["id"][:]) and not store.missing()
    for own, caption in zip(store.ids, store.captions, strict=True):
        assert caption in rows[int(own) - 993]["captions"]
    assert len({caption[-1] for caption in store.captions}) > 1  # not the first of each
    assert report["data"]["splits"]["validation"] == {"num_captions": 6, "num_pictures": 6}
    assert list(report["measurements"]) == ["fidelity", "elb"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "30,000 captions of MS-COCO" in text and "one caption of each picture, drawn at random" in text


def test_cub_from_its_files_to_a_report(home, tmp_path):
    options = write_cub(tmp_path)
    prepare_benchmarks.main([*options, "--output_dir", str(tmp_path / "data")])
    rows = load_rows(str(tmp_path / "data"), split="test")
    stems = [
        *("Black_footed_Albatross_0000_0", "Black_footed_Albatross_0001_7"),
        *("Groove_billed_Ani_0004_28", "Groove_billed_Ani_0005_35"),
    ]
    assert rows["id"][:] == stems
    assert rows[2]["captions"] == [*list_rows()[4]["captions"], "this is a bird"]
    report = run_recipe("eval_cub", home, tmp_path, tmp_path / "data")
    store = PictureStore.open(tmp_path / "out" / "pictures" / "ours")
    assert len(store) == 9  # two of each of four pictures, and once what all of them say
    assert store.ids[:4] == [f"{stems[0]}-{number}" for number in range(3)] + [f"{stems[1]}-0"]
    assert len(set(store.captions)) == 9 and "this is a bird" in store.captions
    assert report["data"]["splits"]["test"] == {"num_captions": 9, "num_pictures": 4}
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["splits"] == ["test"] and json.loads(line)["evaluation"] == "cub"
    assert "every caption that is unique" in (tmp_path / "out" / "report.md").read_text()


def test_other_files_are_refused(tmp_path):
    coco, cub = write_coco(tmp_path), write_cub(tmp_path)

    def refuse(options, kind, words):
        with pytest.raises(kind, match=words):
            prepare_benchmarks.main([*options, "--output_dir", str(tmp_path / "data")])
        assert not (tmp_path / "data").exists()

    (tmp_path / "val2014" / "COCO_val2014_000000000999.jpg").unlink()
    refuse(coco, OSError, r"1 of 8 pictures are missing, as .*COCO_val2014_000000000999\.jpg")
    refuse([*coco[:3], "--annotations", str(tmp_path / "none.json")], OSError, r"none\.json")
    (tmp_path / "captions_val2014.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    refuse(coco, ValueError, "has not the form of captions_val2014.json")
    (tmp_path / "cvpr2016_cub" / "testclasses.txt").write_text("001.Black_footed_Albatross\n200.Nothing\n")
    refuse(cub, OSError, r"200\.Nothing holds no captions")
    shutil.rmtree(tmp_path / "cvpr2016_cub" / "text_c10" / "002.Laysan_Albatross")
    (tmp_path / "cvpr2016_cub" / "testclasses.txt").unlink()
    refuse(cub, OSError, "give --classes")
