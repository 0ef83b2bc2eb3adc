"""Drawing for strangers: orders out of range are refused in words, pictures are checked before they are decoded."""

import base64
import io
import json
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import build_pipeline, build_reranker

from hf_dalle.drawing_service import MAX_SEED, PNG_ADDRESS, Drawing, DrawingService, Limits, Rows
from hf_dalle.provenance import read_provenance


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


@pytest.fixture(scope="module")
def service(pipe):
    return DrawingService(pipe)


@pytest.fixture(scope="module")
def reranking():
    return DrawingService(build_pipeline(**build_reranker()), Limits(max_candidates=6))


def make_picture(side=16):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def address(content):
    if isinstance(content, Image.Image):
        file = io.BytesIO()
        content.save(file, "PNG")
        content = file.getvalue()
    return PNG_ADDRESS + base64.b64encode(content).decode()


def finish(service, order):
    *rows, drawing = service.draw(order)
    assert all(isinstance(update, Rows) for update in rows) and isinstance(drawing, Drawing)
    return rows, drawing


def read(file):
    return np.asarray(Image.open(io.BytesIO(file)))


def test_pictures_are_those_of_the_pipeline_and_say_how_to_draw_them_again(pipe, service):
    order = service.make_order(" a red fox ", 2, 7, 2.0, 0.9, address(make_picture()), 2)
    rows, drawing = finish(service, order)
    expected = pipe(
        "a red fox",
        image=make_picture(),
        num_prefix_rows=2,
        num_images_per_prompt=2,
        guidance_scale=2.0,
        temperature=0.9,
        generator=torch.Generator().manual_seed(7),
    ).images
    assert [np.array_equal(read(file), image) for file, image in zip(drawing.files, expected, strict=True)] == [
        True
    ] * 2
    assert drawing.num_withheld == 0 and len(rows) == 1  # rows 3 and 4 are drawn, the last is not given unfinished
    for file, image in zip(drawing.files, expected, strict=True):
        provenance = read_provenance(io.BytesIO(file))
        assert (provenance.prompt, provenance.seed) == ("a red fox", 7)
        again = pipe(**provenance.to_arguments()).images[provenance.index]
        assert np.array_equal(again, image)


def test_files_that_say_nothing(pipe):
    _, drawing = finish(service := DrawingService(pipe, use_provenance=False), service.make_order("a red fox", 1, 7))
    assert Image.open(io.BytesIO(drawing.files[0])).info == {}


def test_rows_grow_from_the_top(pipe, service):
    rows, drawing = finish(service, service.make_order("a red fox", 2, 3))
    assert [update.progress for update in rows] == [0.25, 0.5, 0.75] and {len(update.images) for update in rows} == {2}
    latents = pipe(
        "a red fox", num_images_per_prompt=2, generator=torch.Generator().manual_seed(3), output_type="latent"
    )
    for number, update in enumerate(rows, start=1):
        partial = latents.images.clone()
        partial[:, number:] = -1
        assert [np.array_equal(*pair) for pair in zip(update.images, pipe.decode_partial(partial), strict=True)] == [
            True
        ] * 2


def test_previews_are_bounded(monkeypatch, service):
    monkeypatch.setattr("hf_dalle.drawing_service.MAX_PREVIEWS", 2)
    rows, _ = finish(service, service.make_order("a red fox", 1, 3))
    assert [update.progress for update in rows] == [0.5]


def test_defaults_are_the_checkpoints_and_seeds_are_new(pipe):
    pipe.prior.generation_config.guidance_scale, pipe.prior.generation_config.temperature = 12, 0.7
    try:
        service = DrawingService(pipe)
        orders = [service.make_order("a red fox", 1) for _ in range(4)]
    finally:
        pipe.prior.generation_config.guidance_scale = pipe.prior.generation_config.temperature = None
    assert {(order.guidance_scale, order.temperature) for order in orders} == {(12.0, 0.7)}
    assert len({order.seed for order in orders}) == 4 and service.highest["guidance_scale"] == 12


def test_what_is_given_up_stops(pipe, service):
    order = service.make_order("a red fox", 1, 3)
    drawing = service.draw(order)
    next(drawing)
    drawing.close()
    assert pipe._interrupt and not service._turn.locked()
    finish(service, order)  # and the next one is whole


def test_visitors_at_once_get_each_their_own(pipe, service):
    orders = [service.make_order("a red fox", 1, seed) for seed in range(4)]
    drawn = {}
    threads = [
        threading.Thread(target=lambda o=order: drawn.update({o.seed: finish(service, o)[1]})) for order in orders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        expected = pipe("a red fox", guidance_scale=1.0, generator=torch.Generator().manual_seed(seed)).images[0]
        assert np.array_equal(read(drawn[seed].files[0]), expected)


def test_candidates(reranking, service):
    _, drawing = finish(reranking, reranking.make_order("a red fox", 2, 5, num_candidates=4))
    expected = reranking.pipe(
        "a red fox", num_images_per_prompt=2, num_candidates=4, generator=torch.Generator().manual_seed(5)
    ).images
    assert [np.array_equal(read(file), image) for file, image in zip(drawing.files, expected, strict=True)] == [
        True
    ] * 2
    with pytest.raises(ValueError, match="from 2 to 6"):
        reranking.make_order("a red fox", 2, num_candidates=7)
    with pytest.raises(ValueError, match="no reranker"):
        service.make_order("a red fox", 1, num_candidates=2)


def test_what_a_safety_checker_flags_is_never_given():
    def check(images):
        return np.zeros_like(images), [index == 0 for index in range(len(images))]

    service = DrawingService(build_pipeline(safety_checker=check))
    rows, drawing = finish(service, service.make_order("a red fox", 3, 1))
    assert rows and all(update.images == [] for update in rows)
    assert len(drawing.files) == 2 and drawing.num_withheld == 1


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "write a caption"),
        ({"prompt": None}, "write a caption"),
        ({"prompt": ["a"]}, "write a caption"),
        ({"prompt": "x" * 301}, "301 characters; at most 300"),
        ({"prompt": "a \ud800 fox"}, "not valid text"),
        ({"prompt": "zq" * 40}, "this model reads 12"),
        ({"num_images": 0}, "number of pictures must be a whole number from 1 to 9"),
        ({"num_images": 10}, "from 1 to 9"),
        ({"num_images": 1.5}, "whole number"),
        ({"num_images": "2"}, "whole number"),
        ({"num_images": True}, "whole number"),
        ({"seed": -1}, "seed must be"),
        ({"seed": MAX_SEED + 1}, "seed must be"),
        ({"seed": float("nan")}, "seed must be"),
        ({"guidance_scale": 0.5}, "guidance scale must be a number from 1 to 10"),
        ({"guidance_scale": float("nan")}, "guidance scale"),
        ({"temperature": 0}, "temperature must be a number from 0.01 to 2"),
        ({"picture": address(make_picture()), "num_prefix_rows": 4}, "rows kept must be a whole number from 1 to 3"),
        ({"picture": address(make_picture())}, "rows kept"),
    ],
)
def test_orders_out_of_range(service, changes, words):
    with pytest.raises(ValueError, match=words):
        service.make_order(**{"prompt": "a red fox", "num_images": 1, **changes})


def test_limits():
    with pytest.raises(ValueError, match="`max_waiting` is 0"):
        Limits(max_waiting=0)


def make_bomb(side):
    """A PNG file of some hundred bytes that says it has so many pixels a side."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (5, "did not come as a PNG"),
        ("/etc/hostname", "did not come as a PNG"),
        ("http://example.com/a.png", "did not come as a PNG"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "did not come as a PNG"),
        (PNG_ADDRESS + "!!!", "cannot be read"),
        (address(b"no picture"), "cannot be read"),
        (address(b"GIF89a" + bytes(20)), "cannot be read"),
        (address(make_bomb(65)), "65 x 65 pixels; at most 64 x 64"),
        (address(make_bomb(30_000)), "at most 64 x 64|cannot be read"),  # PIL itself refuses more than 179 million
        (address(make_bomb(64)), "cannot be read"),  # cut
        (PNG_ADDRESS + "A" * 200_000, "larger than 81,920 bytes"),
    ],
)
def test_wrong_pictures(service, picture, words):
    with pytest.raises(ValueError, match=words):
        service.make_order("a red fox", 1, picture=picture, num_prefix_rows=1)


def test_the_largest_picture_that_may_come_is_let_in(service):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    assert service.read_picture(address(Image.fromarray(noise))).size == (64, 64)
    assert service.read_picture("") is None is service.read_picture(None)


@given(
    st.one_of(st.text(), st.none(), st.integers()),
    *[st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.booleans())] * 4,
    st.text(),
)
def test_anything_is_an_order_or_refused_in_words(prompt, number, seed, scale, heat, picture):
    service = SERVICE.get("service") or SERVICE.setdefault("service", DrawingService(build_pipeline()))
    try:
        order = service.make_order(prompt, number, seed, scale, heat, picture)
    except ValueError as error:
        # the caption is not repeated
        assert len(str(error)) < 120 and (not isinstance(prompt, str) or len(prompt) < 9 or prompt not in str(error))
        return
    assert 1 <= order.num_images_per_prompt <= 9 and 0 <= order.seed <= MAX_SEED and order.image is None
    json.dumps(order.to_arguments())


SERVICE = {}
