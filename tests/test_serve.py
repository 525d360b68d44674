"""examples/serve answers like our Segmenter, and turns bad uploads away without falling over."""

import base64
import importlib.util
import io
import struct
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_segvit import Segmenter

from .test_export import processor_of, unmasked
from .tiny_generators import noise_images

SERVE = Path(__file__).parents[1] / "examples" / "serve"
fastapi_installed = pytest.mark.skipif(
    find_spec("fastapi") is None or find_spec("httpx") is None, reason="needs fastapi and httpx"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    unmasked(num_hidden_layers=2, num_query_layers=1).save_pretrained(folder)
    processor_of().save_pretrained(folder)
    return folder


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"serve_{name}", SERVE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(model, monkeypatch):
    from fastapi.testclient import TestClient

    monkeypatch.setenv("HF_SEGVIT_MODEL", str(model))
    monkeypatch.setenv("HF_SEGVIT_MAX_BYTES", "200000")
    monkeypatch.setenv("HF_SEGVIT_MAX_PIXELS", "1000000")
    with TestClient(load("app").app) as client:
        yield client


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A small PNG of 20000 x 20000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(2501 * 20000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def is_ours(answer: dict, image: Image.Image, model: Path) -> None:
    (ours,) = Segmenter.from_pretrained(str(model))([image])
    assert (answer["task"], answer["height"], answer["width"]) == ("panoptic", image.height, image.width)
    assert len(ours.segments) > 1
    for row, segment in zip(answer["segments"], ours.segments, strict=True):
        assert (row["id"], row["label_id"], row["label"]) == (segment.id, segment.label_id, segment.label)
        assert (row["area"], row["bbox"]) == (segment.area, list(segment.bbox))
        assert row["score"] == pytest.approx(segment.score, abs=1e-5)
    segment_map = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["map_png"])))).astype(int) - 1
    np.testing.assert_array_equal(segment_map, ours.segment_map)


@fastapi_installed
def test_the_server_answers_like_the_segmenter(client, model):
    (image,) = noise_images([(80, 50)])
    is_ours(client.post("/segment", content=png(image)).json(), image, model)
    is_ours(client.post("/segment", files={"photo": ("photo.png", png(image))}).json(), image, model)
    assert "map_png" not in client.post("/segment?map=0", content=png(image)).json()
    health = client.get("/health").json()
    assert (health["task"], health["waiting"]) == ("panoptic", 0)
    assert health["runs_on"].startswith("cpu")


@fastapi_installed
def test_bad_uploads_are_turned_away_and_the_server_goes_on(client, model):
    (image,) = noise_images([(80, 50)])
    good = png(image)
    form = {"content-type": "multipart/form-data; boundary=b"}
    file = b'Content-Disposition: form-data; name="x"; filename="x.png"\r\n\r\n'
    for body, headers, status, message in (
        (b"", {}, 422, "empty (0 bytes)"),
        (b"no image", {}, 422, "not an image of the formats"),
        (good[: len(good) // 2], {}, 422, "the upload"),
        (bytes(200_001), {}, 413, "more than 200000 bytes"),
        (iter([bytes(150_000)] * 3), {}, 413, "more than 200000 bytes"),  # without a Content-Length
        (bomb(), {}, 422, "pixels"),
        (good, {"content-type": "multipart/form-data"}, 400, "names no boundary"),
        (b"", form, 400, "the form is damaged"),
        (good, form, 400, "the form is damaged"),
        (b"--b\r\n" + file + good, form, 400, "the form is damaged"),  # cut off before its end
        (b"--b\r\nfilename=broken\r\n--b--\r\n", form, 400, "the form has no file"),
        (
            b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\ntext\r\n--b--\r\n',
            form,
            400,
            "the form has no file",
        ),
        (b"--b\r\n" + file + b"no image\r\n--b--\r\n", form, 422, "not an image of the formats"),
        (good, {"content-type": "multipart/form-data; boundary=\xff".encode("latin-1")}, 400, "the form"),
    ):
        answer = client.post("/segment", content=body, headers=headers)
        assert answer.status_code == status, (body if isinstance(body, bytes) else b"")[:80]
        assert message in answer.json()["detail"]
    assert client.get("/segment").status_code == 405
    assert client.post("/segment?map=perhaps", content=good).status_code == 422
    assert client.get("/health").json()["waiting"] == 0
    is_ours(client.post("/segment", content=good).json(), image, model)


@fastapi_installed
def test_a_full_queue_is_told_to_come_back(client):
    client.app.state.waiting = 33
    answer = client.post("/segment", content=b"")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert client.app.state.waiting == 33


@fastapi_installed
def test_a_server_without_a_model_does_not_start(monkeypatch, tmp_path):
    from fastapi.testclient import TestClient

    monkeypatch.delenv("HF_SEGVIT_MODEL", raising=False)
    monkeypatch.setenv("HF_SEGVIT_MAX_PIXELS", "1000000")  # which the app would otherwise leave behind
    with pytest.raises(ValueError, match="set HF_SEGVIT_MODEL"), TestClient(load("app").app):
        pass
    monkeypatch.setenv("HF_SEGVIT_MODEL", str(tmp_path))
    with pytest.raises(ValueError, match=r"config.json"), TestClient(load("app").app):
        pass


def test_the_endpoint_handler_answers_like_the_segmenter(model):
    handler = load("handler").EndpointHandler(str(model))
    (image,) = noise_images([(80, 50)])
    (ours,) = Segmenter.from_pretrained(str(model))([image])
    text = base64.b64encode(png(image)).decode()
    for inputs in (image, image.convert("RGBA"), png(image), text, f"data:image/png;base64,{text}"):
        answers = handler({"inputs": inputs})
        assert [row["label"] for row in answers] == [segment.label for segment in ours.segments]
        for row, segment in zip(answers, ours.segments, strict=True):
            mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["mask"]))))
            np.testing.assert_array_equal(mask, (ours.segment_map == segment.id) * np.uint8(255))
            assert row["score"] == pytest.approx(segment.score, abs=1e-5)
    assert handler({"inputs": image, "parameters": {"threshold": 1.0}}) == []
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    mask = Image.open(io.BytesIO(base64.b64decode(handler({"inputs": turned})[0]["mask"])))
    assert mask.size == (50, 80), "upright"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "the request has no inputs"),
        ({"inputs": "no base64!"}, "not base64"),
        ({"inputs": "aGVsbG8="}, "not an image of the formats"),
        ({"inputs": [1, 2]}, "inputs is a list"),
        ({"inputs": b"x", "parameters": {"speed": 1}}, "unknown parameters speed; there is only threshold"),
    ],
)
def test_bad_requests_to_the_handler_say_what_is_wrong(model, data, message):
    with pytest.raises(ValueError, match=message):
        load("handler").EndpointHandler(str(model))(data)
