// The page: loads the exported folder `model/`, and shows the segments of a file or of the camera.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { panopticSegments, prepare, readSettings } from "./segmentation.js";

const LONGEST_SIDE = 1280; // of what is shown; larger images are scaled down first
const element = (id) => document.getElementById(id);
const model = load();

async function load() {
  const read = async (name) => {
    const answer = await fetch(`model/${name}`);
    if (!answer.ok) throw new Error(`model/${name} is missing; copy an exported folder to model/`);
    return answer.json();
  };
  const names = ["export.json", "config.json", "preprocessor_config.json"];
  const settings = readSettings(...(await Promise.all(names.map(read))));
  const session = await ort.InferenceSession.create(`model/${settings.file}`, { executionProviders: ["wasm"] });
  return { settings, session };
}

/** Segments of ImageData: { map, rows }; see segmentation.js. */
export async function segment(image) {
  const { settings, session } = await model;
  const { pixels, content } = prepare(image, settings);
  const input = new ort.Tensor("float32", pixels, [1, 3, settings.height, settings.width]);
  const outputs = await session.run({ pixel_values: input }, ["class_queries_logits", "masks_queries_logits"]);
  const { class_queries_logits: classes, masks_queries_logits: masks } = outputs;
  return panopticSegments(classes, masks, content, image.height, image.width, settings);
}

/** Pixels of a file's bitmap or a video's frame. */
function grab(source, width, height) {
  const factor = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const size = [width, height].map((side) => Math.max(1, Math.round(side * factor)));
  const context = new OffscreenCanvas(...size).getContext("2d", { willReadFrequently: true });
  context.drawImage(source, 0, 0, ...size);
  return context.getImageData(0, 0, ...size);
}

/** Hues far from each other for ids next to each other. */
function colour(id) {
  const hue = (id * 137.5) % 360;
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (0.5 - 0.45 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

async function show(image) {
  const start = performance.now();
  const { map, rows } = await segment(image);
  const drawn = new ImageData(new Uint8ClampedArray(image.data), image.width, image.height);
  const areas = rows.map(() => 0);
  map.forEach((id, pixel) => {
    if (id < 0) return;
    areas[id]++;
    colour(id).forEach((value, channel) => {
      drawn.data[4 * pixel + channel] = (drawn.data[4 * pixel + channel] + value) / 2;
    });
  });
  const canvas = element("result");
  [canvas.width, canvas.height] = [image.width, image.height];
  canvas.getContext("2d").putImageData(drawn, 0, 0);
  element("segments").replaceChildren(...rows.map((row) => {
    const line = document.createElement("li");
    const mark = document.createElement("span");
    mark.style.background = `rgb(${colour(row.id)})`;
    line.append(mark, `${row.label} ${row.score.toFixed(3)}, ${areas[row.id]} pixels`);
    return line;
  }));
  element("status").textContent = `${rows.length} segments in ${Math.round(performance.now() - start)} ms`;
}

const fail = (error) => { element("status").textContent = `Failed: ${error.message}`; };

let stream = null;
function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  element("camera").textContent = "Start camera";
}

element("file").addEventListener("change", async ({ target }) => {
  if (!target.files.length) return;
  stopCamera();
  try {
    const bitmap = await createImageBitmap(target.files[0]);
    await show(grab(bitmap, bitmap.width, bitmap.height));
  } catch (error) {
    fail(error);
  }
});

element("camera").addEventListener("click", async () => {
  if (stream) return stopCamera();
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: true });
    element("camera").textContent = "Stop camera";
    const video = document.createElement("video");
    [video.srcObject, video.muted, video.playsInline] = [stream, true, true];
    await video.play();
    while (stream) {
      await show(grab(video, video.videoWidth, video.videoHeight));
      await new Promise(requestAnimationFrame); // lets the page draw and take clicks
    }
  } catch (error) {
    stopCamera();
    fail(error);
  }
});

model.then(() => {
  element("status").textContent = "Choose an image, or start the camera.";
  for (const id of ["file", "camera"]) element(id).disabled = false;
}, fail);
