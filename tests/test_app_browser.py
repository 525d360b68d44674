"""The page of `hf-segvit app` in headless Chromium: what a visitor sees, clicks and downloads."""

import json
import shutil
import threading
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from hf_segvit import Segmenter
from hf_segvit.app.answers import segment
from hf_segvit.app.server import running_app
from hf_segvit.inference.point_classifier import PointClassifier

from .app_models import bomb, save_models
from .tiny_generators import noise_images

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
WAIT = 60_000  # milliseconds; on a busy machine a page takes its time
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(find_spec, ("gradio", "playwright"))), reason="needs gradio and playwright"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(folders):
    models = [str(folders.model), str(folders.other), str(folders.broken)]
    with running_app(models, str(folders.classifier), port=0, device="cpu", max_bytes=300_000) as address:
        yield address


@contextmanager
def visited(browser, address):
    """The page, once it shows its model; what it asks of other hosts, and its errors, fail the test."""
    context = browser.new_context(viewport={"width": 1300, "height": 1000}, accept_downloads=True)
    context.set_default_timeout(WAIT)
    page = context.new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.get_by_text("5 classes, on").wait_for()
    yield page
    context.close()
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
    assert errors == []


def upload(page, path):
    page.locator("input[type=file]").first.set_input_files(path)


def choose(page, old: str, new: str) -> None:
    page.get_by_label("Model").click()
    page.get_by_role("option", name=new).click()


def shown_overlay(page):
    return page.locator(".hf-segvit-image").nth(1).locator("img")


def test_upload_threshold_task_and_downloads(browser, address, folders, tmp_path):
    segmenter = Segmenter.from_pretrained(str(folders.model))
    expected = segment(segmenter, str(folders.image), model_name="one")
    with visited(browser, address) as page:
        upload(page, folders.image)
        page.get_by_text(f"{len(expected.result.segments)} segments of").wait_for()
        rows = page.locator(".hf-segvit-table tbody tr")
        largest = max(expected.result.segments, key=lambda each: each.area)
        assert rows.count() == len(expected.result.segments)
        assert rows.first.inner_text().split()[:2] == [str(largest.id), largest.label]
        shown_overlay(page).wait_for()

        for name in ("image.overlay.png", "image.panoptic.png", "image.segments.json"):
            with page.expect_download() as download:
                page.locator(f'a[download="{name}"]').click()
            download.value.save_as(tmp_path / name)
        assert json.loads((tmp_path / "image.segments.json").read_text()) == json.loads(
            json.dumps(expected.description)
        )
        with Image.open(tmp_path / "image.panoptic.png") as ids:
            ids = np.asarray(ids.convert("RGB")) @ np.array([1, 256, 65536])
        np.testing.assert_array_equal(ids, np.maximum(expected.result.segment_map, 0))
        with Image.open(tmp_path / "image.overlay.png") as overlay, Image.open(folders.image) as image:
            np.testing.assert_array_equal(overlay, expected.result.plot(image, legend=True))

        scores = sorted(each.score for each in expected.result.segments)
        threshold = round(scores[0] + 0.01, 2)
        number = page.get_by_label("number input for Threshold: the score that a segment needs")
        number.fill(str(threshold))
        number.blur()
        fewer = segment(segmenter, str(folders.image), threshold=threshold).result.segments
        assert len(fewer) < len(scores)
        page.get_by_text(f"{len(fewer)} segments of" if fewer else "Nothing above the threshold").wait_for()

        page.get_by_label("semantic").check()
        classes = segment(Segmenter.from_pretrained(str(folders.model), task="semantic"), str(folders.image)).result
        page.get_by_text(f"{len(classes.segments)} segments of {len(classes.segments)} classes").wait_for()
        assert page.locator('a[download="image.semantic.png"]').count() == 1
        number.wait_for(state="hidden")


def test_clicked_points_are_named(browser, address, folders):
    classifier = PointClassifier.from_pretrained(str(folders.classifier))
    with visited(browser, address) as page:
        upload(page, folders.image)
        page.get_by_text("segments of").wait_for()
        rows = page.locator(".hf-segvit-table:visible tbody tr")
        asked = []

        def clicked(image, x: float, y: float) -> None:
            """Click a point, in pixels of the image, and read which one was asked for."""
            box = image.bounding_box()
            page.mouse.click(box["x"] + x / 80 * box["width"], box["y"] + y / 50 * box["height"])
            page.wait_for_function(
                "count => [...document.querySelectorAll('.hf-segvit-table')].some("
                "table => table.checkVisibility() && table.innerText.includes('x, y') && table.rows.length == count)",
                arg=len(asked) + 2,
            )
            asked.append([int(number) for number in rows.first.locator("td").first.inner_text().split(", ")])
            assert np.abs(np.array(asked[-1]) - (x, y)).max() <= 1

        image = page.locator(".hf-segvit-image img").first
        clicked(image, 10, 20)
        clicked(image, 70, 5)
        box = image.bounding_box()  # beside it, nothing is asked
        page.mouse.click(box["x"] - 20, box["y"] + box["height"] / 2)
        clicked(page.locator(".hf-segvit-image:visible img").nth(1), 40.5, 30.5)  # a drawing, ten times as large
        (*_, last) = classifier.classify(Image.open(folders.image), asked, top_k=3)
        for place, each in enumerate(last, start=1):
            text = rows.first.locator("td").nth(place).inner_text()
            assert text == f"{each['label']} {each['score']:.1%}"
        page.get_by_role("button", name="Remove all points").click()
        page.get_by_text("Click a point").nth(1).wait_for()
        assert rows.count() == 0


def test_relabelling_and_another_model(browser, address, folders):
    with visited(browser, address) as page:
        upload(page, folders.image)
        page.get_by_text("segments of").wait_for()
        page.get_by_label("Relabel with ViT-P").check()
        page.get_by_text("ViT-P changed").wait_for()
        page.get_by_role("tab", name="Changed labels").click()
        page.get_by_text("Generator alone").wait_for()
        fused = Segmenter.from_pretrained(str(folders.model), classifier=str(folders.classifier))
        changes = segment(fused, str(folders.image), compare=True).changes
        assert page.locator(".hf-segvit-table:visible tbody tr").count() == len(changes)

        choose(page, "one", "two")
        page.get_by_text("two, 5 classes").wait_for()
        page.get_by_role("tab", name="Segments").click()
        theirs = segment(Segmenter.from_pretrained(str(folders.other)), str(folders.image)).result.segments
        page.get_by_text(f"{len(theirs)} segments of").wait_for()
        choose(page, "two", "broken")
        page.get_by_text("its header claims").first.wait_for()
        assert str(folders.broken) not in page.content()
        choose(page, "broken", "one")
        page.get_by_text("one, 5 classes").wait_for()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.png", b"\x89PNG\r\n\x1a\nhello", "broken.png: the image is truncated or damaged"),
        ("text.png", b"no image at all", "text.png: not an image of the formats"),
        ("bomb.png", None, "20000x20000 pixels, more than the limit of 50,000,000"),
        ("large.png", bytes(300_001), "exceed"),
    ],
    ids=["broken", "text", "bomb", "large"],
)
def test_what_is_no_image_is_a_message(browser, address, folders, tmp_path, name, content, message):
    with visited(browser, address) as page:
        upload(page, folders.image)
        page.get_by_text("segments of").wait_for()
        page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
        page.get_by_text("segments of").wait_for(state="detached")
        (tmp_path / name).write_bytes(bomb(20000) if content is None else content)
        upload(page, tmp_path / name)
        page.get_by_text(message).first.wait_for()
        assert shown_overlay(page).count() == 0, "of another image"
    with visited(browser, address) as page:  # the process goes on
        upload(page, folders.image)
        page.get_by_text("segments of").wait_for()


def test_names_of_models_and_classes_are_text(browser, folders, tmp_path):
    nasty = "it's & <img src=x onerror='window.hacked=1'>${window.hacked=1}{{7*7}}"
    model = tmp_path / "<b>it's & ${1+1}"
    shutil.copytree(folders.model, model)
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {label: f"{nasty}{label}" for label in config["id2label"]}
    config["label2id"] = {name: int(label) for label, name in config["id2label"].items()}
    (model / "config.json").write_text(json.dumps(config))
    broken = tmp_path / "<i>isn't"
    shutil.copytree(folders.broken, broken)
    (broken / "config.json").unlink()
    with running_app([str(model), str(broken)], port=0) as address, visited(browser, address) as page:
        assert f"{model.name}, 5 classes, on" in page.locator(".hf-segvit-note").first.inner_text()
        upload(page, folders.image)
        page.get_by_text("segments of").wait_for()
        name = page.locator(".hf-segvit-table tbody tr").first.locator("td").nth(2).inner_text()
        assert name in config["id2label"].values()
        choose(page, model.name, broken.name)
        message = page.get_by_test_id("toast-text").first
        message.wait_for()
        assert broken.name in message.inner_text()
        assert page.evaluate("window.hacked") is None


def test_two_users_at_once_and_one_who_leaves(browser, folders, tmp_path, monkeypatch):
    from hf_segvit.app import page as app_page

    begun, go_on = threading.Event(), threading.Event()

    def slow(*words, **settings):
        begun.set()
        assert go_on.wait(60)
        return segment(*words, **settings)

    monkeypatch.setattr(app_page, "segment", slow)
    sizes = [(50, 40), (70, 40)]
    paths = [tmp_path / str(width) / "image.png" for width, _ in sizes]
    for path, image in zip(paths, noise_images(sizes), strict=True):
        path.parent.mkdir()
        image.save(path)
    segmenter = Segmenter.from_pretrained(str(folders.model))
    with running_app([str(folders.model)], port=0) as address:
        with visited(browser, address) as leaving:
            upload(leaving, folders.image)
            assert begun.wait(60)  # it is being segmented, and the page closes
        with visited(browser, address) as first, visited(browser, address) as second:
            for page, path in ((first, paths[0]), (second, paths[1])):
                upload(page, path)
            go_on.set()
            for page, path in ((second, paths[1]), (first, paths[0])):
                page.get_by_text("segments of").wait_for()
                with page.expect_download() as download:
                    page.locator('a[download="image.segments.json"]').click()
                expected = segment(segmenter, str(path), model_name="one").description
                assert json.loads(download.value.path().read_text()) == json.loads(json.dumps(expected))
