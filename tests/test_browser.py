"""examples/browser gives our panoptic segments: its script under Node, and its page in headless Chromium."""

import base64
import io
import json
import queue
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit import EoMTImageProcessor, Segmenter, export_model
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.demo import run_demo
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentationOutput

BROWSER = Path(__file__).parents[1] / "examples" / "browser"
RUNTIME = BROWSER / "node_modules" / "onnxruntime-web"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
node_installed = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
onnx_installed = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs the extra onnx"
)

# Answers a JSON question of stdin: pixels and content of an image, and the segments of given logits.
NODE = """
import { readFileSync } from "node:fs";
const { panopticSegments, prepare, readSettings } = await import(process.argv[1]);
const asked = JSON.parse(readFileSync(0, "utf8"));
const floats = (text) => new Float32Array(Uint8Array.from(Buffer.from(text, "base64")).buffer);
const record = { format: "onnx", graphs: { model: { files: { "model.onnx": 1 }, outputs: ["masks_queries_logits"] } } };
const settings = readSettings(record, { id2label: asked.labels }, asked.processor);
const image = { data: Buffer.from(asked.image, "base64"), width: asked.width, height: asked.height };
const { pixels, content } = prepare(image, settings);
const [classes, masks] = [asked.classes, asked.masks].map(({ data, dims }) => ({ data: floats(data), dims }));
const { map, rows } = panopticSegments(classes, masks, content, asked.height, asked.width, settings);
console.log(JSON.stringify({ pixels: Array.from(pixels), content, map: Array.from(map), rows }));
"""


def encoded(tensor: torch.Tensor) -> dict:
    return {"data": base64.b64encode(tensor.numpy().tobytes()).decode(), "dims": list(tensor.shape)}


@node_installed
@pytest.mark.parametrize("size", [(50, 80), (130, 71), (64, 64)])
@pytest.mark.parametrize("threshold", [0.3, 0.99])
def test_the_script_prepares_and_post_processes_like_our_processor(size, threshold):
    processor = EoMTImageProcessor(
        task="panoptic",
        size={"height": 64, "width": 96},
        stuff_classes=[2, 3],
        threshold=threshold,
        overlap_mask_area_threshold=0.1,
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    inputs = processor(images=[image], return_tensors="pt")
    generator = torch.Generator().manual_seed(1)
    classes = 4 * torch.randn(1, 20, 6, generator=generator)
    coarse = 6 * torch.randn(1, 20, 4, 6, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size=(16, 24), mode="bilinear").contiguous()
    outputs = EoMTForUniversalSegmentationOutput(
        class_queries_logits=classes, masks_queries_logits=masks, content_sizes=inputs["content_sizes"]
    )
    (expected,) = processor.post_process_panoptic_segmentation(outputs, target_sizes=[size[::-1]])
    question = {
        "image": base64.b64encode(image.convert("RGBA").tobytes()).decode(),
        "width": size[0],
        "height": size[1],
        "labels": {str(index): f"class {index}" for index in range(5)},
        "processor": processor.to_dict(),
        "classes": encoded(classes),
        "masks": encoded(masks),
    }
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", NODE, str(BROWSER / "segmentation.js")],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["content"] == inputs["content_sizes"][0].tolist()
    pixels = np.array(answer["pixels"], np.float32).reshape(3, 64, 96)
    # A step of a byte, as torchvision and Pillow round differently.
    assert np.abs(pixels - inputs["pixel_values"][0].numpy()).max() < 1.01 / 255 / min(processor.image_std)
    theirs = expected["segments_info"]
    assert [(row["id"], row["labelId"]) for row in answer["rows"]] == [(row["id"], row["label_id"]) for row in theirs]
    assert [row["label"] for row in answer["rows"]] == [f"class {row['label_id']}" for row in theirs]
    np.testing.assert_allclose(
        [row["score"] for row in answer["rows"]], [row["score"] for row in theirs], atol=1e-5, rtol=0
    )
    segment_map = np.array(answer["map"]).reshape(size[::-1])
    assert (segment_map != expected["segmentation"].numpy()).mean() < 1e-3
    assert len(theirs) > (2 if threshold < 0.9 else 0)


# Uses the page as a visitor would, and posts what it shows.
VISITOR = """<!doctype html><iframe id="frame" src="index.html"></iframe><script type="module">
const frame = document.getElementById("frame");
const until = (condition) => new Promise((resolve) => {
  const page = frame.contentDocument;
  const check = () => { if (condition(page)) { observer.disconnect(); resolve(page); } };
  const observer = new MutationObserver(check);
  observer.observe(page, { subtree: true, childList: true, attributes: true, characterData: true });
  check();
});
const text = (page) => page.getElementById("status").textContent;
const report = {};
try {
  if (frame.contentDocument.readyState !== "complete" || frame.contentWindow.location.href === "about:blank") {
    await new Promise((resolve) => frame.addEventListener("load", resolve, { once: true }));
  }
  const page = await until((page) => !/^Loading/.test(text(page)));
  report.start = text(page);
  const { segment } = await frame.contentWindow.eval("import('./page.js')");
  report.images = [];
  for (const name of await (await fetch("images.json")).json()) {
    const blob = await (await fetch(name)).blob();
    const files = new DataTransfer();
    files.items.add(new File([blob], name, { type: blob.type }));
    const input = page.getElementById("file");
    page.getElementById("status").textContent = "";
    input.files = files.files;
    input.dispatchEvent(new Event("change"));
    await until((page) => text(page));
    const canvas = page.getElementById("result");
    const bitmap = await createImageBitmap(blob);
    const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
    context.drawImage(bitmap, 0, 0);
    const { map, rows } = await segment(context.getImageData(0, 0, bitmap.width, bitmap.height));
    const lines = Array.from(page.querySelectorAll("#segments li"), (line) => line.textContent);
    const overlay = canvas.toDataURL("image/png");
    report.images.push({ status: text(page), map: Array.from(map), rows, lines, overlay });
  }
  page.getElementById("status").textContent = "";
  page.getElementById("camera").click();
  await until((page) => text(page));
  report.camera = [text(page), page.getElementById("result").width];
  page.getElementById("camera").click();
} catch (error) {
  report.error = String(error.stack ?? error);
}
await fetch("report", { method: "POST", body: JSON.stringify(report) });
</script>"""


class Site(SimpleHTTPRequestHandler):
    """Serves a folder, and hands on what is posted."""

    protocol_version = "HTTP/1.1"
    reports: queue.Queue

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.reports.put(json.loads(body))

    def log_message(self, *args):
        pass


def visit(site: Path, profile: Path) -> dict:
    handler = type("Handler", (Site,), {"reports": queue.Queue()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={profile}"]
    command += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    # A port to debug through keeps it running after the page has loaded.
    command += ["--remote-debugging-port=0", f"http://127.0.0.1:{server.server_address[1]}/visitor.html"]
    with (
        (profile.parent / "chromium.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as browser,
    ):
        try:
            return handler.reports.get(timeout=240)
        except queue.Empty:
            pytest.fail(f"the page did not report: {(profile.parent / 'chromium.log').read_text()[-2000:]}")
        finally:
            browser.terminate()
            server.shutdown()
            server.server_close()


@pytest.mark.slow
@onnx_installed
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")
@pytest.mark.skipif(not RUNTIME.is_dir(), reason="needs `npm install` in examples/browser")
def test_the_page_shows_our_segments(tmp_path):
    run_demo(tmp_path / "demo", seed=0, steps=200, num_training_scenes=800, num_test_scenes=4)
    compare_with_the_page(tmp_path / "demo" / "model", tmp_path, threshold=0.1)


def compare_with_the_page(model: Path, folder: Path, threshold: float | None = None) -> None:
    site = folder / "site"
    shutil.copytree(BROWSER, site, ignore=shutil.ignore_patterns("node_modules", "model"))
    (site / "node_modules").symlink_to(BROWSER / "node_modules")
    export_model(str(model), site / "model", "onnx")
    if threshold is not None:  # so that a model that was hardly trained finds something
        settings = json.loads((site / "model" / "preprocessor_config.json").read_text())
        (site / "model" / "preprocessor_config.json").write_text(json.dumps({**settings, "threshold": threshold}))
    (site / "visitor.html").write_text(VISITOR)
    scenes = GeneratedScenes(3, "test", seed=0, size=(64, 64))
    images = [np.asarray(scenes[index]["image"]) for index in range(3)]
    images = [images[0], images[1], np.asarray(Image.fromarray(images[2]).resize((150, 90)))]
    for index, image in enumerate(images):
        Image.fromarray(image).save(site / f"{index}.png")
    (site / "images.json").write_text(json.dumps([f"{index}.png" for index in range(3)]))
    report = visit(site, folder / "profile")
    assert "error" not in report, report["error"]
    assert report["start"] == "Choose an image, or start the camera."
    expected = Segmenter.from_pretrained(str(model), threshold=threshold)(images)
    assert sum(len(answer.segments) for answer in expected) >= 3
    for answer, ours, image in zip(report["images"], expected, images, strict=True):
        assert [row["label"] for row in answer["rows"]] == [segment.label for segment in ours.segments]
        scores = [segment.score for segment in ours.segments]
        np.testing.assert_allclose([row["score"] for row in answer["rows"]], scores, atol=5e-3)
        segment_map = np.array(answer["map"]).reshape(ours.segment_map.shape)
        # The page counts from 0, as an image processor does.
        assert (segment_map != np.maximum(ours.segment_map, 0) - 1).mean() < 5e-3
        assert answer["status"].startswith(f"{len(ours.segments)} segments in ")
        assert [line.split()[0] for line in answer["lines"]] == [segment.label.split()[0] for segment in ours.segments]
        overlay = Image.open(io.BytesIO(base64.b64decode(answer["overlay"].partition(",")[2])))
        changed = (np.asarray(overlay.convert("RGB")) != image).any(-1)
        assert not changed[segment_map < 0].any()
        assert changed[segment_map >= 0].mean() > 0.9
    assert "segments in" in report["camera"][0]
    assert report["camera"][1] >= 320
