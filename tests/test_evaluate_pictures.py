"""`evaluation: pictures`: rows, pairing, drawing and the report, for DALL-Es, other pipelines and folders of pictures.

What is measured has tests of its own; here a measurement stands for work that is divided, killed and gone on with.
"""

import json
import shutil

import evaluate
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from evaluation import pictures
from evaluation.run import load_measurements
from evaluation.settings import EvaluationArguments
from evaluation_log import digest_checkpoint, log_run
from PIL import Image
from settings_file import parse_settings
from tiny_data import list_rows, write_parquet
from tiny_evaluation import build_home, make_evaluation, make_settings, read_report, write_config, write_rows
from tiny_processes import finish, fork, make_ranks, run_script, wait_until
from tiny_training import ROOT
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hf_dalle import DALLEPipeline


ELB = {"elb": {"num_samples": 2}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return build_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def drawn(home, tmp_path_factory):
    """20 pictures, in one process."""
    folder = tmp_path_factory.mktemp("drawn") / "out"
    run(home, folder, num_captions=None)
    return folder


@pytest.fixture(scope="module")
def measured(home, tmp_path_factory):
    """A measurement of 20 rows, in one process."""
    folder = tmp_path_factory.mktemp("measured") / "out"
    run(home, folder, num_captions=None, measure=ELB)
    return folder


def ours(home):
    return {"name": "ours", "pipeline": str(home / "checkpoint")}


def read_pictures(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "pictures" / "ours").glob("*.png"))}


def save_pictures(folder, names, size=(16, 16), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new(mode, size, (9 * number, 7, 9) if mode == "RGB" else (9 * number, 7, 9, 128)).save(
            folder / f"{name}.png"
        )
    return folder


def run(home, folder, **settings):
    evaluate.main([str(write_config(make_settings(home, folder, **settings)))])
    return read_report(folder)


def start(home, folder, num_processes=1, **settings):
    """`evaluate.py` as a user starts it, on all 20 rows."""
    settings = make_settings(home, folder, num_captions=None, **settings)
    argv = [str(ROOT / "training" / "evaluate.py"), str(write_config(settings))]
    output = folder.with_suffix(".txt")
    ranks = make_ranks(num_processes) if num_processes > 1 else [{}]
    return [fork(run_script, argv, output=output, environment={**rank, "OMP_NUM_THREADS": "1"}) for rank in ranks]


def check_same(folder, other):
    """The same pictures and the same figures."""
    assert read_pictures(folder) == read_pictures(other)
    assert read_report(folder) == read_report(other)
    assert (folder / "report.md").read_text() == (other / "report.md").read_text()


# ------------------------------------------------------------------------------------------------------------- rows


def test_rows_are_chosen_by_the_seed(home, tmp_path):
    def choose(**settings):
        return pictures.choose_rows(EvaluationArguments(**make_settings(home, tmp_path, **settings)))

    rows, again, other = choose(), choose(), choose(seed=1)
    assert rows.ids == again.ids != other.ids and rows.ids == sorted(rows.ids) and len(rows) == 6
    assert rows.references == list(range(6)) and rows.column("number") == [int(name[-2:]) for name in rows.ids]
    expected = list_rows()[rows.column("number")[0]]
    assert rows.captions[0] == expected["captions"][0]
    assert rows.picture(0).tobytes() == expected["image"].tobytes()
    both = choose(splits=["train", "validation"], num_captions=3)
    assert both.splits == ["train"] * 3 + ["validation"] * 3 and both.of_split("validation") == [3, 4, 5]
    whole = choose(num_captions=None)
    assert len(whole) == 20 and whole.captions[3] == list_rows()[3]["captions"][0]
    assert choose(id_column="number").ids == [str(number) for number in rows.column("number")]


def test_which_captions_of_a_picture_are_taken(tmp_path):
    captions = [["a", "b", " a "], ["b", "c"], [], ["", "d"]]
    rows = [{"image": row["image"], "captions": texts} for row, texts in zip(list_rows(), captions, strict=False)]
    write_parquet(tmp_path / "data" / "validation.parquet", rows)

    def choose(how, **settings):
        given = make_settings(tmp_path, tmp_path, num_captions=None, captions=how, **settings)
        return pictures.choose_rows(EvaluationArguments(**given))

    assert choose("first").captions == ["a", "b", "d"]
    unique = choose("all")
    assert unique.captions == ["a", "b", "c", "d"] and unique.references == [0, 2, 3]
    assert unique.ids == ["validation-000000-0", "validation-000000-1", "validation-000001-1", "validation-000003-0"]
    draws = {tuple(choose("random", seed=seed).captions) for seed in range(20)}
    assert draws == {(first, second, "d") for first in "ab" for second in "bc"}


def test_wrong_rows_are_refused(home, tmp_path):
    for settings, words in (
        ({"caption_column": "caption"}, "no column 'caption'"),
        ({"id_column": "style"}, "'plain' comes twice"),
        ({"id_column": "nothing"}, "no column 'nothing'"),
    ):
        with pytest.raises(ValueError, match=words):
            run(home, tmp_path / "out", **settings)
    with pytest.raises(OSError, match="Found neither"):
        run(home, tmp_path / "out", splits=["test"])
    rows = [{"image": b"no picture", "captions": "a"}, {"image": list_rows()[0]["image"], "captions": "b"}]
    write_parquet(tmp_path / "data" / "validation.parquet", rows)
    with pytest.raises(ValueError, match="1 of the data's own pictures cannot be read, as validation-000000"):
        run(home, tmp_path / "out", data_dir=str(tmp_path / "data"))
    assert not read_pictures(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"models": []}, "`models` is empty"),
        ({"models": [{"name": "x"}]}, "exactly one of `pipeline` and `images`"),
        (
            {"models": [{"name": "x", "images": "y", "guidance": 2}]},
            "number 1 has an unknown key `guidance`",
        ),
        ({"models": [{"name": "../x", "images": "y"}]}, "it names a folder"),
        ({"models": [{"name": "x", "images": "y"}, {"name": "X", "images": "z"}]}, "equal but for case"),
        ({"models": [{"name": "x", "pipeline": "y", "generation": {"generator": 1}}]}, "may not hold"),
        ({"measure": {"fidelty": {}}}, "Did you mean `fidelity`"),
        ({"measure": {"elb": {"num_sample": 3}}}, "`measure`, elb has an unknown key `num_sample`"),
        ({"measure": {"elb": {"num_samples": "many"}}}, "`measure`, elb: `num_samples` is 'many'; expected int"),
        ({"measure": {"elb": [1]}}, r"`measure`, elb is \[1\]; expected `key: value` lines"),
        ({"num_captions": 0}, "`num_captions` is 0"),
        ({"splits": ["a", "a"]}, "all different"),
        ({"data_dir": None}, "exactly one of `data_dir`"),
        ({"split": "validation"}, "Did you mean `splits`"),
        ({"evaluation": "everything"}, "expected one of concepts, pictures"),
    ],
)
def test_wrong_settings_are_refused(home, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        run(home, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- folders


def test_folders_are_paired_by_name_by_id_and_by_caption(home, tmp_path):
    rows = make_evaluation(home, tmp_path / "out").rows
    save_pictures(tmp_path / "names", rows.ids)
    save_pictures(tmp_path / "other", [f"{number:03d}" for number in range(6)])
    for key, folder in (("id", "by_id"), ("caption", "by_caption")):
        shutil.copytree(tmp_path / "other", tmp_path / folder)
        values = rows.ids if key == "id" else rows.captions
        lines = [{"file_name": f"{place:03d}.png", key: value} for place, value in enumerate(values)]
        text = "".join(json.dumps(line) + "\n" for line in reversed(lines))
        (tmp_path / folder / "metadata.jsonl").write_text(text)
    for folder in ("names", "by_id", "by_caption"):
        store, notes = pictures.pair_folder(tmp_path / folder, rows)
        assert [store.read(place).getpixel((0, 0))[0] for place in range(6)] == list(range(0, 54, 9)) and not notes
    assert pictures.PictureStore.open(tmp_path / "by_caption").captions == rows.captions[::-1]
    with pytest.raises(ValueError, match=r"no picture for 6 of 6 rows, as validation-0000\d\d \('\w+ and \w+'\)"):
        pictures.pair_folder(tmp_path / "other", rows)


def test_wrong_folders_are_refused_before_anything_is_drawn(home, tmp_path):
    rows = make_evaluation(home, tmp_path / "out").rows
    models = [ours(home), {"name": "theirs", "images": str(tmp_path / "x")}]

    def refuse(words, kind=ValueError):
        with pytest.raises(kind, match=words):
            run(home, tmp_path / "out", models=models)
        assert not read_pictures(tmp_path / "out")
        shutil.rmtree(tmp_path / "x", ignore_errors=True)

    refuse("is not a folder", OSError)
    (tmp_path / "x").mkdir()
    refuse("holds no picture", OSError)
    save_pictures(tmp_path / "x", rows.ids[1:])
    refuse("no picture for 1 of 6 rows")
    save_pictures(tmp_path / "x", rows.ids)
    save_pictures(tmp_path / "x", rows.ids[:2], size=(20, 16))
    refuse(r"theirs have 2 sizes \(4 of 16 x 16, 2 of 20 x 16\)")
    save_pictures(tmp_path / "x", rows.ids)
    (tmp_path / "x" / f"{rows.ids[2]}.png").write_bytes(b"no picture")
    refuse(rf"1 of the pictures of theirs cannot be read, as {rows.ids[2]}\.png")
    save_pictures(tmp_path / "x", rows.ids)
    shutil.copy(tmp_path / "x" / f"{rows.ids[0]}.png", tmp_path / "x" / f"{rows.ids[0]}.jpg")
    refuse(f"2 pictures for the id '{rows.ids[0]}'")
    save_pictures(tmp_path / "x", ["a"])
    (tmp_path / "x" / "metadata.jsonl").write_text('{"file_name": "../home/x.png", "id": "a"}\n')
    refuse("outside of its folder", OSError)
    save_pictures(tmp_path / "x", rows.ids[1:])
    lines = [json.dumps({"file_name": f"{name}.png", "id": name}) + "\n" for name in rows.ids]
    (tmp_path / "x" / "metadata.jsonl").write_text("".join(lines))
    refuse(rf"names {rows.ids[0]}\.png, which is not there", OSError)


def test_what_may_mislead_is_said(home, tmp_path):
    rows = make_evaluation(home, tmp_path / "out").rows
    save_pictures(tmp_path / "x", [*rows.ids, "more"], size=(8, 8), mode="RGBA")
    models = [ours(home), {"name": "theirs", "images": str(tmp_path / "x")}]
    report = run(home, tmp_path / "out", models=models)
    notes = "\n".join(report["notes"])
    assert "theirs: 1 pictures of its folder belong to no row" in notes
    assert "theirs: 6 of 6 pictures are transparent in places; white is put behind" in notes
    assert "theirs: 6 of 6 pictures are of one colour alone" in notes
    assert "different sizes (ours 16 x 16, theirs 8 x 8)" in notes
    assert report["models"]["theirs"]["pictures"]["num_transparent"] == 6
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| theirs | 6 | 8 x 8 | 6 | 0 | 6 | 0 |" in text and all(note in text for note in report["notes"])


# ---------------------------------------------------------------------------------------------------------- drawing


def test_a_drawn_picture_is_what_the_pipeline_gives(home, drawn):
    pipe = DALLEPipeline.from_pretrained(home / "checkpoint")
    store = pictures.PictureStore.open(drawn / "pictures" / "ours")
    assert store.ids == [f"validation-{row:06d}" for row in range(20)]
    assert store.captions == [row["captions"][0] for row in list_rows()] and store.missing() == []
    generator = pictures.make_generator(0, store.ids[3])
    expected = pipe(store.captions[3], generator=generator).images[0]
    assert np.abs(np.asarray(store.read(3), int) - np.asarray(expected, int)).max() <= 1
    assert len({store.read(row).tobytes() for row in range(20)}) > 15
    report = read_report(drawn)
    with Image.open(drawn / report["pictures"]["examples"]) as page:
        left, top, real = 2 * (96 + 4) + 170, 16 + 3 * (96 + 4), list_rows()[11 * 20 // 16]["image"]
        assert page.width == 2 * left and page.convert("RGB").getpixel((left + 5, top + 50)) == real.getpixel((0, 8))
    assert report["models"]["ours"]["kind"] == "DALLEPipeline" and report["data"]["splits"]["validation"] == {
        "num_captions": 20,
        "num_pictures": 20,
    }


def test_the_pictures_can_be_another_evaluations_folder(home, drawn, tmp_path):
    models = [{"name": "again", "images": str(drawn / "pictures" / "ours")}]
    report = run(home, tmp_path / "out", models=models, num_captions=None)
    assert report["models"]["again"]["pictures"] == read_report(drawn)["models"]["ours"]["pictures"]


def test_pictures_of_other_captions_are_told(home, tmp_path):
    rows = make_evaluation(home, tmp_path / "out").rows
    save_pictures(tmp_path / "x", rows.ids)
    captions = ["something else", f" {rows.captions[1]} ", *rows.captions[2:]]
    entries = zip(rows.ids, captions, strict=True)
    lines = [json.dumps({"file_name": f"{name}.png", "id": name, "caption": caption}) for name, caption in entries]
    (tmp_path / "x" / "metadata.jsonl").write_text("\n".join(lines))
    models = [{"name": "theirs", "images": str(tmp_path / "x")}]
    assert (
        "theirs: 1 pictures were made from another caption" in make_evaluation(home, tmp_path, models=models).notes[0]
    )


def test_a_run_goes_on_only_with_its_own_settings(home, tmp_path):
    before = run(home, tmp_path / "out")
    names = sorted((tmp_path / "out" / "pictures" / "ours").glob("*.png"))
    times = [path.stat().st_mtime_ns for path in names]
    names[1].unlink()
    assert run(home, tmp_path / "out") == before
    assert [path.stat().st_mtime_ns == time for path, time in zip(names, times, strict=True)] == [False] * 2 + [
        True
    ] * 4
    for settings, words in (
        ({"seed": 1, "num_captions": None}, "`rows` was|`seed` was 0, now it is 1"),
        ({"models": [{**ours(home), "generation": {"top_k": 1}}]}, "`generation` was"),
        ({"batch_size": 3}, "`batch_size` was 2, now it is 3"),
    ):
        with pytest.raises(ValueError, match=words):
            run(home, tmp_path / "out", **settings)


def test_a_drawing_that_was_killed_goes_on_in_two_processes(home, drawn, tmp_path):
    (process,) = start(home, tmp_path / "out")
    wait_until(lambda: len(read_pictures(tmp_path / "out")) >= 5, process)
    process.kill()
    assert finish(process) == [-9] and 5 <= len(read_pictures(tmp_path / "out")) < 20
    codes = finish(*start(home, tmp_path / "out", num_processes=2))
    assert codes == [0, 0], (tmp_path / "out.txt").read_text()
    check_same(tmp_path / "out", drawn)


@pytest.mark.slow
def test_two_processes_draw_the_same(home, drawn, tmp_path):
    assert finish(*start(home, tmp_path / "out", num_processes=2)) == [0, 0], (tmp_path / "out.txt").read_text()
    check_same(tmp_path / "out", drawn)


@pytest.mark.slow  # in one process, test_evaluation_elb.py and _reranking.py lose stored work and take it up
def test_a_measurement_that_was_killed_goes_on_in_any_number_of_processes(home, measured, tmp_path):
    folder = tmp_path / "out"
    (process,) = start(home, folder, measure=ELB)
    wait_until(lambda: list((folder / "work" / "elb").rglob("*.npz")), process)
    process.kill()
    assert finish(process) == [-9] and not read_report(folder)["measurements"]
    assert finish(*start(home, folder, num_processes=2, measure=ELB)) == [0, 0], (tmp_path / "out.txt").read_text()
    check_same(folder, measured)
    assert read_report(folder)["measurements"]["elb"]["settings"]["num_samples"] == 2


def test_a_run_that_touches_a_test_split_is_logged_before_it_draws(home, tmp_path):
    write_rows(tmp_path / "data", ("train", "test_new"))
    save_pictures(tmp_path / "theirs", [f"test_new-{row:06d}" for row in range(20)])
    log = tmp_path / "logs" / "runs.jsonl"
    given = {"data_dir": str(tmp_path / "data"), "splits": ["train", "test_new"], "num_captions": 2}
    with pytest.raises(ValueError, match="`evaluation_log` is missing, but test_new is measured: runs are logged"):
        run(home, tmp_path / "out", **given, evaluation_log=None)
    given |= {"splits": ["test_new"], "evaluation_log": str(log)}
    with pytest.raises(ValueError, match="needs the columns of prepare_shapes"):
        run(home, tmp_path / "out", **given, measure={"shapes": {}})  # a mistake found first is not logged
    assert not log.exists()
    theirs = {"name": "theirs", "images": str(tmp_path / "theirs")}
    models = [{**ours(home), "generation": {"num_prefix_rows": 2}}, {**ours(home), "name": "again"}, theirs]
    with pytest.raises(ValueError, match="`image` and `num_prefix_rows` belong together"):
        run(home, tmp_path / "drawn", **given, models=models)  # at the first picture
    first, second = lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert first["checkpoint"] == digest_checkpoint(home / "checkpoint") != second["checkpoint"]
    about = {"splits": ["test_new"], "seed": 0, "evaluation": "tiny"}
    assert all(line.items() >= about.items() and {"date", "checkpoint", *about} == {*line} for line in lines)
    assert log_run(str(log), ["validation"], ["x"]) == lines and log_run(None, ["validation"], ["x"]) == []
    assert len(log.read_text().splitlines()) == 2


def build_diffusion(folder):
    """A tiny latent diffusion model of diffusers' own."""
    words = ["<|startoftext|>", "<|endoftext|>", "red</w>", "and</w>", "blue</w>"]
    tokenizer = CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=8, unk_token=words[1]
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text_config = CLIPTextConfig(vocab_size=16, max_position_embeddings=8, **sizes, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            norm_num_groups=4,
            attention_head_dim=4,
        )
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)
        text_encoder = CLIPTextModel(text_config)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def test_any_pipeline_of_diffusers_draws(home, tmp_path):
    build_diffusion(tmp_path / "diffusion")
    generation = {"num_inference_steps": 2, "guidance_scale": 3.0}
    model = {"name": "diffusion", "pipeline": str(tmp_path / "diffusion"), "generation": generation}
    report = run(home, tmp_path / "out", models=[model, ours(home)])
    assert report["models"]["diffusion"]["kind"] == "StableDiffusionPipeline"
    store = pictures.PictureStore.open(tmp_path / "out" / "pictures" / "diffusion")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "diffusion")
    generators = [pictures.make_generator(0, name) for name in store.ids[:2]]
    expected = pipe(store.captions[:2], generator=generators, **generation).images
    assert [store.read(row).tobytes() for row in range(2)] == [image.tobytes() for image in expected]
    assert "| diffusion | StableDiffusionPipeline" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ValueError, match="unknown key `num_inference_step`. Did you mean `num_inference_steps`"):
        run(home, tmp_path / "new", models=[{**model, "generation": {"num_inference_step": 2}}])


def test_what_does_not_draw_from_captions_is_refused(home, tmp_path):
    def refuse(pipeline, words, kind=OSError):
        with pytest.raises(kind, match=words):
            run(home, tmp_path / "out", models=[{"name": "x", "pipeline": str(pipeline)}])

    refuse(home / "data", "no model_index.json")
    refuse("somebody/nothing", "somebody/nothing is no folder, and the Hub does not give it")
    for name, words in (("DDPMPipeline", "takes no `prompt`"), ("DallEPipeline", "has not")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": name}))
        refuse(tmp_path / name, words, ValueError)


def test_seeds_of_rows_are_their_own():
    seeds = {pictures.make_seed(seed, name) for seed in range(20) for name in ("a", "b", "1", 1)}
    assert len(seeds) == 80 and all(0 <= seed < 2**63 for seed in seeds)
    first, again = (torch.rand(3, generator=pictures.make_generator(0, "a")) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training" / "configs").glob("eval_*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_parses(path):
    args = parse_settings([str(path)], EvaluationArguments, "evaluate.py")
    assert list(load_measurements(args.measure)) == list(args.measure) and args.list_models()
    assert args.output_dir.startswith("runs/")


def test_the_entry_says_how_it_is_called(tmp_path, capsys):
    with pytest.raises(ValueError, match="no settings file"):
        evaluate.main([])
    evaluate.main(["--help"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"evaluation": "pictures"}))
    with pytest.raises(SystemExit):
        evaluate.main([str(path), "--help"])
    assert "--num_captions" in capsys.readouterr().out
    path.write_text("name: x\n")
    with pytest.raises(ValueError, match="`evaluation: None`; expected one of concepts, pictures"):
        evaluate.main([str(path)])
