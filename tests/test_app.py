"""`hf-segvit app`: its functions answer like `Segmenter` and `PointClassifier`, and its server like its functions."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from hf_segvit import Segmenter
from hf_segvit.app.answers import (
    change_table,
    classify,
    open_upload,
    point_table,
    segment,
    segment_table,
    shown_points,
    shown_scale,
    shown_segments,
    write_files,
)
from hf_segvit.app.model_cache import ModelCache, short_names
from hf_segvit.app.server import example_files, free_port, running_app
from hf_segvit.cli import main
from hf_segvit.inference.exports import Classes
from hf_segvit.inference.loading import load_fused_model
from hf_segvit.inference.output_files import label_changes
from hf_segvit.inference.point_classifier import PointClassifier
from hf_segvit.models.image_values import RGB
from hf_segvit.models.mask_encoding import decode_mask

from .app_models import Folders, bomb, save_models
from .tiny_generators import noise_images

ROOT = Path(__file__).parents[1]
gradio_installed = pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra app")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return save_models(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def segmenter(folders) -> Segmenter:
    return Segmenter.from_pretrained(str(folders.model))


# Models to choose from.


def test_models_are_loaded_when_asked_for_and_the_oldest_makes_room(folders):
    cache = ModelCache([str(folders.model), str(folders.other), str(folders.broken)], keep=1)
    assert cache.names == ["one", "two", "broken"]
    assert cache.loaded == []
    first = cache.segmenter()
    assert cache.segmenter("one") is first
    assert cache.loaded == ["one"]
    # A task more takes no weights more.
    assert cache.segmenter("one", "semantic").model is first.model
    assert cache.segmenter("one", "semantic").task == "semantic"
    assert cache.tasks("one") == ["panoptic", "instance", "semantic"]
    cache.segmenter("two")
    assert cache.loaded == ["two"]
    with pytest.raises(ValueError, match="broken"):
        cache.segmenter("broken")
    with pytest.raises(ValueError, match="there is no model 'tow' here; did you mean two"):
        cache.segmenter("tow")
    with pytest.raises(ValueError, match="there is no task 'panoptc'; did you mean panoptic"):
        cache.segmenter("two", "panoptc")
    with pytest.raises(ValueError, match="no ViT-P is offered here"):
        cache.point_classifier("two")
    assert (cache.has_points("two"), cache.can_relabel("two")) == (False, False)
    assert cache.loaded == ["two"], "it goes on"


def test_the_vit_p_is_loaded_once_and_joins_every_model(folders):
    cache = ModelCache([str(folders.model), str(folders.other)], str(folders.classifier))
    for name in cache.names:
        joined = cache.segmenter(name, relabel=True)
        assert joined.model.classifier is cache.point_classifier().model
        assert joined.model.generator is cache.segmenter(name).model
        assert cache.segmenter(name, "instance", relabel=True).model is joined.model
        assert cache.has_points(name)
        assert cache.can_relabel(name)


def test_a_fused_checkpoint_brings_its_own_vit_p(folders, tmp_path):
    model, processor = load_fused_model(str(folders.model), str(folders.classifier), alpha=0.7)
    model.save_pretrained(tmp_path / "fused")
    processor.save_pretrained(tmp_path / "fused")
    cache = ModelCache([str(tmp_path / "fused")])
    assert (cache.has_points(), cache.can_relabel()) == (True, True)
    alone = PointClassifier.from_pretrained(str(folders.classifier))
    asked = str(folders.image), [[10, 20]]
    assert classify(cache.point_classifier(), *asked) == classify(alone, *asked)
    assert cache.segmenter(relabel=True) is cache.segmenter(), "it is one already"


def test_short_names_tell_models_apart(tmp_path, monkeypatch):
    for name in ("a/run/model", "b/run/model", "b/eomt"):
        (tmp_path / name).mkdir(parents=True)
    sources = [str(tmp_path / name) for name in ("a/run/model", "b/run/model", "b/eomt")]
    assert short_names([*sources, "owner/eomt"]) == ["a/run/model", "b/run/model", "eomt", "owner/eomt"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the model .*b/eomt is named twice"):
        short_names(["b/eomt", str(tmp_path / "b/eomt")])
    with pytest.raises(ValueError, match="there is no model to offer"):
        ModelCache([])


# What is answered for an image.


def same(ours, expected) -> None:
    assert (ours.task, ours.segments, ours.source) == (expected.task, expected.segments, "image.png")
    np.testing.assert_array_equal(ours.segment_map, expected.segment_map)


def panoptic_ids(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")) @ np.array([1, 256, 65536])


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_the_answer_and_its_files_are_the_segmenters(folders, task, tmp_path):
    cache = ModelCache([str(folders.model)])
    segmenter = cache.segmenter(task=task)
    answer = segment(segmenter, str(folders.image), model_name="one")
    (expected,) = Segmenter.from_pretrained(str(folders.model), task=task)([Image.open(folders.image)])
    same(answer.result, expected)
    assert len(expected.segments) > 1
    described = [(row["id"], row["label"], row["area"]) for row in answer.description["segments"]]
    assert described == [(each.id, each.label, each.area) for each in expected.segments]
    assert (answer.description["model"], answer.description["picture"]) == ("one", "image.png")
    assert answer.description["threshold"] == {"panoptic": 0.3, "instance": 0.5, "semantic": None}[task]

    paths = write_files(answer, Classes(segmenter.id2label), tmp_path / "files")
    names = ["image.overlay.png", f"image.{task}.png", "image.segments.json", "coco_annotations.json"]
    assert [path.name for path in paths] == [*names, "coco_results.json"]
    assert json.loads(paths[2].read_text()) == answer.description
    with Image.open(paths[0]) as overlay:
        np.testing.assert_array_equal(overlay, expected.plot(Image.open(folders.image), legend=True))
    if task == "panoptic":
        ids = panoptic_ids(paths[1])
    else:
        ids = np.asarray(Image.open(paths[1])).astype(int)
    np.testing.assert_array_equal(ids, np.maximum(expected.segment_map, 0))
    coco = COCO(paths[3])
    assert coco.loadImgs([1])[0]["file_name"] == "image.png"
    annotations = coco.loadAnns(coco.getAnnIds([1]))
    for annotation, each in zip(annotations, expected.segments, strict=True):
        assert annotation["category_id"] == each.label_id
        np.testing.assert_array_equal(decode_mask(annotation["segmentation"]), expected.mask(each))


def test_the_threshold_decides(folders, segmenter):
    path = str(folders.image)
    scores = sorted(each.score for each in segment(segmenter, path).result.segments)
    assert len(segment(segmenter, path, threshold=scores[0] + 1e-4).result.segments) < len(scores)
    empty = segment(segmenter, path, threshold=1.0)
    assert empty.result.segments == []
    assert empty.remark.startswith("nothing above the threshold 1; the highest score is")
    assert "--" not in empty.remark, "a page has no options"
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            segment(segmenter, path, threshold=threshold)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_relabelling_shows_what_changed(folders, alpha):
    cache = ModelCache([str(folders.model)], str(folders.classifier))
    answer = segment(cache.segmenter(relabel=True), str(folders.image), alpha=alpha, compare=True)
    fused = Segmenter.from_pretrained(str(folders.model), classifier=str(folders.classifier), alpha=alpha)
    ((before, after),) = fused.compare([Image.open(folders.image)])
    same(answer.before, before)
    same(answer.result, after)
    assert bool(answer.changes) == (alpha == 1)
    assert answer.changes == label_changes(before, after)
    assert answer.description["label_changes"] == [change.as_row() for change in answer.changes]
    assert answer.description["alpha"] == alpha
    html = change_table(answer.changes, before.segment_map.size)
    assert html.count("<tr>") == (1 + len(answer.changes) if alpha else 0)
    with pytest.raises(ValueError, match=r"alpha=2 is outside"):
        segment(cache.segmenter(relabel=True), str(folders.image), alpha=2)


def test_points_are_named_as_the_classifier_does(folders):
    classifier = PointClassifier.from_pretrained(str(folders.classifier))
    points, boxes = [[3, 4], [70.5, 20]], [[0, 0, 40, 30]]
    rows = classify(classifier, str(folders.image), points, boxes, top_k=2)
    expected = classifier.classify(Image.open(folders.image), points, boxes, top_k=2)
    assert [row["classes"] for row in rows] == expected
    assert [row.get("point", row.get("box")) for row in rows] == [*points, *boxes]
    assert len(classify(classifier, str(folders.image), points, top_k=99)[0]["classes"]) == len(classifier.id2label)
    assert point_table(rows[:2]).count("<tr>") == 3
    for wrong, message in (
        (([], []), "nothing to classify"),
        (([[80, 10]], []), r"80"),  # beside the image
        (([[-1, 10]], []), r"-1"),
        (([[1, 2, 3]], []), r"points: \[\[1, 2, 3\]\] is no list of \[x, y\]"),
        (([[float("nan"), 2]], []), "points"),
        (([[True, 2]], []), "points"),
        (("ab", []), "points: ab is no list"),
        (([], [[1, 2]]), r"boxes: \[\[1, 2\]\] is no list of \[x0"),
        (([[1, 1]] * 101, []), "101 points and boxes"),
    ):
        with pytest.raises(ValueError, match=message):
            classify(classifier, str(folders.image), *wrong)
    with pytest.raises(ValueError, match="top_k=0"):
        classify(classifier, str(folders.image), points, top_k=0)


def test_uploads_that_are_no_image_are_refused_without_their_folder(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SEGVIT_MAX_PIXELS", "1000000")
    path = tmp_path / "upload.png"
    for content, message in (
        (b"", r"upload.png: empty \(0 bytes\)"),
        (b"<svg onload='alert(1)'>", "upload.png: not an image of the formats"),
        (folders.image.read_bytes()[:3000], "upload.png: the image is truncated or damaged"),
        (bomb(2000), "upload.png: 2000x2000 pixels, more than the limit of 1,000,000"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            open_upload(str(path), RGB)
        assert str(tmp_path) not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"upload.png: .*upload it again"):
        open_upload(str(path), RGB)
    with pytest.raises(ValueError, match="there is no image"):
        open_upload(None, RGB)


@pytest.mark.parametrize(
    ("size", "shown"), [((64, 48), (640, 480)), ((700, 500), (700, 500)), ((4000, 50), (1600, 20))]
)
def test_drawings_fit_a_screen(segmenter, size, shown):
    (image,) = noise_images([size])
    (result,) = segmenter([image])
    assert shown_segments(result).size == shown
    point = {"point": [size[0] - 1, 0], "classes": [{"label_id": 0, "label": "road", "score": 0.5}]}
    drawn = shown_points(image, [point])
    assert drawn.size == shown
    # The dot is where a click on the drawing would ask for the same point.
    column = int(shown_scale(image) * (size[0] - 0.5))
    plain = shown_points(image, [{**point, "point": [0, size[1] - 1]}])
    assert drawn.getpixel((min(column, shown[0] - 1), 0)) != plain.getpixel((min(column, shown[0] - 1), 0))


def test_tables_escape_what_comes_from_a_model(segmenter):
    (result,) = segmenter(noise_images([(40, 30)]))
    nasty = "<img src=x onerror=alert(1)>\u202e{{7*7}}"
    named = replace(result, segments=[replace(each, label=nasty) for each in result.segments])
    html = segment_table(named)
    assert "<img" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;\\u202e") == len(result.segments)
    areas = [float(area) for area in re.findall(r"([\d.]+) %", html)]
    assert areas == sorted(areas, reverse=True)
    rows = [{"point": [1, 2], "classes": [{"label_id": 0, "label": nasty, "score": 0.5}]}]
    assert "<img" not in point_table(rows)


# The command and its server.


def test_a_port_in_use_ends_the_command_before_models_load(folders, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["app", "--model", str(folders.broken), "--port", str(port)]) == 2
    message = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1 port {port}: address already in use; name another with --port" in message
    assert "broken" not in message
    assert free_port("127.0.0.1", 0) > 0
    with pytest.raises(ValueError, match=r"cannot listen on 203\.0\.113\.1 port 7860"):
        free_port("203.0.113.1", 7860)


@gradio_installed
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "{broken}"], "broken"),
        (["--model", "{model}", "--model", "{model}"], "is named twice"),
        (["--model", "{model}", "--classifier", "{other}"], "other"),
        (["--model", "./nowhere"], "there is no folder ./nowhere"),
        (["--model", "{model}", "--port", "70000"], "--port 70000 must be at most 65535"),
        (["--model", "{model}", "--keep", "0"], "--keep 0 must be at least 1"),
        (["--model", "{model}", "--examples", "./nowhere"], "--examples nowhere: no such folder"),
    ],
)
def test_what_cannot_be_served_ends_the_command(folders, capsys, words, message):
    words = [word.format(**{name: str(path) for name, path in vars(folders).items()}) for word in words]
    assert main(["app", "--port", "0", *words] if "--port" not in words else ["app", *words]) == 2
    assert message.replace("other", str(folders.other)) in capsys.readouterr().err


def test_without_gradio_the_message_names_the_extra(folders, capsys, monkeypatch):
    monkeypatch.setattr("hf_segvit.app.server.find_spec", lambda name: None)
    assert main(["app", "--model", str(folders.model)]) == 2
    assert 'pip install "hf-segvit[app]"' in capsys.readouterr().err


def test_examples_are_images_of_a_folder_or_scenes(folders, tmp_path):
    assert example_files(folders.image.parent, tmp_path) == [folders.image]
    scenes = example_files(None, tmp_path / "scenes")
    assert len(scenes) == 4
    assert all(Image.open(path).size == (256, 192) for path in scenes)


@pytest.fixture(scope="module")
def address(folders):
    if find_spec("gradio") is None:
        pytest.skip("needs the extra app")
    models = [str(folders.model), str(folders.other), str(folders.broken)]
    with running_app(models, str(folders.classifier), port=0, keep=1, max_bytes=200_000, device="cpu") as address:
        yield address


def requested(address: str, data: list) -> str:
    """The events that answer a request of /segment, without `gradio_client`, which uploads files and asks the Hub."""
    request = urllib.request.Request(
        f"{address}/gradio_api/call/segment", json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/segment/{event}") as answer:
        return answer.read().decode()


@pytest.fixture
def client(address, tmp_path):
    from gradio_client import Client

    with contextlib.closing(Client(address, verbose=False, download_files=str(tmp_path / "downloads"))) as client:
        yield client


@pytest.mark.slow
def test_the_api_answers_like_the_functions(client, folders, segmenter):
    from gradio_client import handle_file

    assert [row["model"] for row in client.predict(api_name="/models")] == ["one", "two", "broken"]
    image = handle_file(folders.image)
    answer, files = client.predict(image=image, api_name="/segment")
    expected = segment(segmenter, str(folders.image), model_name="one")
    assert answer == json.loads(json.dumps(expected.description))
    assert [Path(file).name for file in files][:2] == ["image.overlay.png", "image.panoptic.png"]
    ids = panoptic_ids(files[1])
    np.testing.assert_array_equal(ids, np.maximum(expected.result.segment_map, 0))

    other, _ = client.predict(image=image, model="two", task="semantic", api_name="/segment")
    assert other["task"] == "semantic"
    (theirs,) = Segmenter.from_pretrained(str(folders.other), task="semantic")([Image.open(folders.image)])
    assert [row["area"] for row in other["segments"]] == [each.area for each in theirs.segments]

    relabelled, _ = client.predict(image=image, relabel=True, alpha=1.0, api_name="/segment")
    assert relabelled["label_changes"]
    rows = client.predict(image=image, points=[[3, 4]], top_k=2, api_name="/classify")
    classifier = PointClassifier.from_pretrained(str(folders.classifier))
    assert [each["label"] for each in rows[0]["classes"]] == [
        each["label"] for each in classifier.classify(Image.open(folders.image), [[3, 4]], top_k=2)[0]
    ]
    assert rows[0]["point"] == [3, 4]


@pytest.mark.slow
def test_bad_requests_are_messages_and_the_app_goes_on(client, folders, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    files = {"text.png": b"no image", "bomb.png": bomb(20000)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    image = handle_file(folders.image)
    (tmp_path / "large.png").write_bytes(bytes(200_001))
    for arguments, message in (
        ({"image": handle_file(tmp_path / "text.png")}, "text.png: not an image of the formats"),
        ({"image": handle_file(tmp_path / "bomb.png")}, "20000x20000 pixels, more than the limit of 50,000,000"),
        ({"image": None}, "there is no image"),
        ({"image": image, "model": "broken"}, "broken"),
        ({"image": image, "threshold": 2}, r"threshold=2 is outside \[0, 1\]"),
    ):
        with pytest.raises(AppError, match=message) as caught:
            client.predict(**arguments, api_name="/segment")
        assert str(folders.broken) not in str(caught.value)
    with pytest.raises(Exception, match=r"413|exceed"):
        client.predict(image=handle_file(tmp_path / "large.png"), api_name="/segment")
    with pytest.raises(AppError, match="80"):
        client.predict(image=image, points=[[80, 10]], api_name="/classify")
    answer, _ = client.predict(image=image, api_name="/segment")
    assert answer["segments"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "message"), [("http://127.0.0.1:9/a.png", "addresses are not downloaded"), ("{image}", "null")]
)
def test_a_request_names_uploads_only(address, folders, path, message):
    image = {"path": path.format(image=folders.image), "meta": {"_type": "gradio.FileData"}}
    text = requested(address, [image, "one", None, None, False, None])
    assert "event: error" in text
    assert message in text
    assert str(folders.image) not in text


@pytest.mark.slow
def test_files_of_the_machine_and_of_others_are_not_served(address, client, folders):
    from gradio_client import handle_file

    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(f"{address}{path}") as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    client.predict(image=handle_file(folders.image), api_name="/segment")
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    made = [path for path in uploads.rglob("*") if path.is_file()]
    assert status(f"/gradio_api/file={made[0]}") == 200
    # Whoever has a file's address has been given it: each is in a folder with 256 random or hashed bits.
    assert all(re.search(r"/[0-9a-f]{64}/", str(path)) for path in made)
    assert uploads.parent.stat().st_mode & 0o077 == 0
    for path in ("/etc/passwd", str(folders.image), f"{uploads}/../../etc/passwd", str(uploads), __file__):
        assert status(f"/gradio_api/file={path}") in (403, 404), path
    assert status("/monitoring") in (403, 404)
    assert status("/") == 200


@pytest.mark.slow
def test_answers_of_two_users_at_once_are_never_mixed(address, folders, segmenter, tmp_path):
    from gradio_client import Client, handle_file

    images = noise_images([(50 + 5 * index, 40) for index in range(4)])
    paths = [tmp_path / f"{index}" / "image.png" for index in range(4)]  # all of the same name
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir()
        image.save(path)
    start = threading.Barrier(len(paths))

    def ask(path: Path) -> list:
        client = Client(address, verbose=False, download_files=str(path.parent))
        start.wait()
        answers = [client.predict(image=handle_file(path), api_name="/segment") for _ in range(2)]
        client.close()
        return answers

    with ThreadPoolExecutor(len(paths)) as pool:
        for path, answers in zip(paths, pool.map(ask, paths), strict=True):
            expected = json.loads(json.dumps(segment(segmenter, str(path), model_name="one").description))
            for answer, files in answers:
                assert answer == expected
                with Image.open(files[0]) as overlay, Image.open(path) as image:
                    assert overlay.width == image.width
                    assert overlay.height >= image.height, "a legend may follow below"


@pytest.mark.slow
@gradio_installed
def test_nothing_is_asked_of_other_machines(folders, monkeypatch):
    seen = set()
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def looked_up(host, *rest, **options):
        seen.add(host)
        return look_up(host, *rest, **options)

    def connected(self, where):
        seen.add(where[0] if isinstance(where, tuple) else "")
        return connect(self, where)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    monkeypatch.setattr(socket.socket, "connect", connected)
    with running_app([str(folders.model)], port=0) as address:
        uploads = Path(os.environ["GRADIO_TEMP_DIR"])
        (uploads / "a").mkdir(parents=True, exist_ok=True)
        shutil.copy(folders.image, uploads / "a")
        image = {"path": str(uploads / "a" / "image.png"), "meta": {"_type": "gradio.FileData"}}
        assert "event: complete" in requested(address, [image, "one", None, None, False, None])
        with urllib.request.urlopen(address) as answer:
            page = answer.read().decode()
    assert seen - {b"127.0.0.1"} == {"127.0.0.1"}
    assert not uploads.parent.exists(), "all files go when it ends"
    assert "fonts.googleapis" not in page


@pytest.mark.slow
@gradio_installed
def test_a_full_queue_refuses_and_who_leaves_holds_nobody_up(folders, monkeypatch):
    from hf_segvit.app import page

    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(*words, **settings):
        begun.release()
        assert go_on.wait(60)
        return segment(*words, **settings)

    monkeypatch.setattr(page, "segment", slow)
    with running_app([str(folders.model)], port=0, queue=2) as address, ThreadPoolExecutor(4) as pool:
        nothing = [None, "one", None, None, False, None]
        answers = [pool.submit(requested, address, nothing)]
        assert begun.acquire(timeout=60)  # it runs, and those that follow wait
        leaving = urllib.request.Request(
            f"{address}/gradio_api/call/segment",
            json.dumps({"data": nothing}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(leaving) as answer:
            assert json.load(answer)["event_id"]  # whose answer nobody fetches
        with urllib.request.urlopen(leaving) as answer:
            assert json.load(answer)["event_id"]
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(leaving)
        assert caught.value.code == 503
        assert "Queue is full" in caught.value.read().decode()
        go_on.set()
        assert "there is no image" in answers[0].result(60)
        for _ in range(2):  # those that waited are taken up, although nobody fetches their answers
            assert begun.acquire(timeout=60)
        assert "there is no image" in requested(address, nothing)


@pytest.mark.slow
@gradio_installed
def test_errors_of_whoever_uses_the_page_are_their_own(folders):
    with pytest.raises(FileNotFoundError, match="mine"), running_app([str(folders.model)], port=0):
        raise FileNotFoundError("mine")


@pytest.mark.slow
@gradio_installed
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT, "SIGTERM to another thread"])
def test_the_process_ends_when_asked_and_leaves_no_file(folders, tmp_path, way):
    words = [sys.executable, "-m", "hf_segvit", "app", "--model", str(folders.model), "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        found = re.match(r"the page is at (http://127\.0\.0\.1:\d+); Ctrl-C ends it", process.stdout.readline())
        assert len(list(tmp_path.glob("hf-segvit-app-*"))) == 1
        with urllib.request.urlopen(found[1]) as answer:
            assert answer.status == 200
        if isinstance(way, signal.Signals):
            process.send_signal(way)
        else:
            threads = sorted(int(path.name) for path in Path(f"/proc/{process.pid}/task").glob("*"))
            tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
            if tgkill is None or not threads:
                process.kill()
                pytest.skip("needs Linux, to choose the thread that gets a signal")
            assert tgkill(process.pid, threads[-1], signal.SIGTERM) == 0
        assert process.wait(60) == 0
    assert list(tmp_path.glob("hf-segvit-app-*")) == []


def test_the_space_is_complete():
    folder = ROOT / "examples" / "space"
    head = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (head["sdk"], head["app_file"]) == ("gradio", "app.py")
    assert (folder / "requirements.txt").read_text().split() == ["hf-segvit[app]"]
