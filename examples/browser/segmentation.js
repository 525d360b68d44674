// Panoptic segmentation of RGBA pixels by an exported EoMT: what examples/onnx_only.py does, in JavaScript.
//
// Nothing here touches the page or the runtime, so that it also runs in a worker or under Node. An image is
// { data: RGBA bytes, width, height }, as ImageData is.

/** Settings of the exported folder, from its export.json, config.json and preprocessor_config.json. */
export function readSettings(record, config, processor) {
  const graph = record.graphs?.model;
  if (record.format !== "onnx" || !graph?.outputs.includes("masks_queries_logits")) {
    throw new Error("the folder holds no EoMT in one ONNX file; export one with --format onnx");
  }
  if (processor.do_split_image) {
    throw new Error("the folder is a semantic model, whose images are cut into windows; export a panoptic one");
  }
  if ((processor.resample ?? 2) !== 2) {
    throw new Error(`the model's images are resized with filter ${processor.resample}, and only 2 (bilinear) is here`);
  }
  if (processor.image_mean.length !== 3) {
    throw new Error(`the model takes ${processor.image_mean.length} channels, and a browser's images have 3`);
  }
  return {
    file: Object.keys(graph.files)[0],
    labels: config.id2label,
    height: processor.size.height,
    width: processor.size.width,
    rescale: processor.rescale_factor ?? 1 / 255,
    mean: processor.image_mean,
    std: processor.image_std,
    threshold: processor.threshold ?? 0.8,
    maskThreshold: processor.mask_threshold ?? 0.5,
    overlapThreshold: processor.overlap_mask_area_threshold ?? 0.8,
    stuff: new Set(processor.stuff_classes ?? []),
  };
}

/** Float32 pixels (3, H, W) of the model's size, and height and width of the image in them; the rest is black. */
export function prepare(image, settings) {
  const { height, width } = settings;
  const factor = Math.min(height / image.height, width / image.width);
  const content = [image.height, image.width].map((side) => Math.max(1, roundHalfToEven(side * factor)));
  const resized = resize(image, content[0], content[1]);
  const pixels = new Float32Array(3 * height * width);
  for (let channel = 0; channel < 3; channel++) {
    const black = -settings.mean[channel] / settings.std[channel];
    const scale = settings.rescale / settings.std[channel];
    const plane = pixels.subarray(channel * height * width, (channel + 1) * height * width).fill(black);
    for (let y = 0; y < content[0]; y++) {
      for (let x = 0; x < content[1]; x++) {
        plane[y * width + x] = resized[(y * content[1] + x) * 3 + channel] * scale + black;
      }
    }
  }
  return { pixels, content };
}

/** Rounds as Python does: halves to the even neighbour. */
function roundHalfToEven(value) {
  const low = Math.floor(value);
  return value - low === 0.5 ? low + (low % 2) : Math.round(value);
}

/** RGB bytes of an image at another size: bilinear, over the whole of the pixels that shrink into one. */
function resize(image, height, width) {
  const columns = triangles(image.width, width);
  const rows = triangles(image.height, height);
  const wide = new Float32Array(image.height * width * 3); // first along the rows, rounded as Pillow does
  for (let y = 0; y < image.height; y++) {
    for (let x = 0; x < width; x++) {
      const { start, weights } = columns[x];
      for (let channel = 0; channel < 3; channel++) {
        let sum = 0;
        weights.forEach((weight, k) => { sum += weight * image.data[(y * image.width + start + k) * 4 + channel]; });
        wide[(y * width + x) * 3 + channel] = Math.floor(sum + 0.5);
      }
    }
  }
  const bytes = new Uint8Array(height * width * 3);
  for (let y = 0; y < height; y++) {
    const { start, weights } = rows[y];
    for (let x = 0; x < width * 3; x++) {
      let sum = 0;
      weights.forEach((weight, k) => { sum += weight * wide[(start + k) * width * 3 + x]; });
      bytes[y * width * 3 + x] = Math.floor(sum + 0.5);
    }
  }
  return bytes;
}

/** For each pixel of the target, the first pixel of the source that it takes and the weights from there on. */
function triangles(length, target) {
  const scale = length / target;
  const support = Math.max(scale, 1);
  return Array.from({ length: target }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const start = Math.max(0, Math.floor(centre - support + 0.5));
    const end = Math.min(length, Math.floor(centre + support + 0.5));
    const weights = [];
    for (let k = start; k < end; k++) weights.push(Math.max(0, 1 - Math.abs((k + 0.5 - centre) / support)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { start, weights: weights.map((weight) => weight / sum) };
  });
}

/**
 * The panoptic segments of an image, as `EoMTImageProcessor.post_process_panoptic_segmentation` gives them.
 *
 * `classes` and `masks` are { data, dims } of dims (1, Q, C + 1) and (1, Q, h, w). Gives the map of segment ids, an
 * Int32Array of height x width with void as -1, and a row for each segment: id, labelId, label, score.
 */
export function panopticSegments(classes, masks, content, height, width, settings) {
  const [, queries, numClasses] = classes.dims;
  const [, , maskHeight, maskWidth] = masks.dims;
  const kept = [];
  for (let query = 0; query < queries; query++) {
    const logits = classes.data.subarray(query * numClasses, (query + 1) * numClasses);
    const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
    const score = 1 / logits.reduce((sum, logit) => sum + Math.exp(logit - logits[best]), 0);
    if (best !== numClasses - 1 && score > settings.threshold) kept.push({ query, label: best, score });
  }
  const map = new Int32Array(height * width).fill(-1);
  const won = new Uint32Array(kept.length);
  const inside = new Uint32Array(kept.length);
  const winners = new Int16Array(height * width);
  const winnersInside = new Uint8Array(height * width);
  const rows = axis(maskHeight, settings.height, content[0], height);
  const columns = axis(maskWidth, settings.width, content[1], width);
  const lines = kept.map(() => new Float32Array(maskWidth));
  for (let y = 0; y < height && kept.length; y++) {
    kept.forEach(({ query }, index) => {
      lines[index].fill(0);
      for (const [row, weight] of rows[y]) {
        const offset = (query * maskHeight + row) * maskWidth;
        for (let x = 0; x < maskWidth; x++) lines[index][x] += weight * masks.data[offset + x];
      }
    });
    for (let x = 0; x < width; x++) {
      let winner = 0, highest = -1, winnerInside = false;
      for (let index = 0; index < kept.length; index++) {
        let logit = 0;
        for (const [column, weight] of columns[x]) logit += weight * lines[index][column];
        const probability = 1 / (1 + Math.exp(-logit));
        const isInside = probability >= settings.maskThreshold;
        if (isInside) inside[index]++;
        if (probability * kept[index].score > highest) {
          [winner, highest, winnerInside] = [index, probability * kept[index].score, isInside];
        }
      }
      winners[y * width + x] = winner;
      winnersInside[y * width + x] = winnerInside;
      won[winner]++;
    }
  }
  return { map, rows: paint(map, kept, winners, winnersInside, won, inside, settings) };
}

/** Paints the segments that keep enough of their own masks against the others; gives their rows. */
function paint(map, kept, winners, winnersInside, won, inside, settings) {
  const visible = new Uint32Array(kept.length);
  winners.forEach((winner, pixel) => { visible[winner] += winnersInside[pixel]; });
  const found = [];
  const stuffIds = new Map();
  const ids = kept.map(({ label, score }, index) => {
    if (!visible[index] || won[index] / Math.max(inside[index], 1) < settings.overlapThreshold) return -1;
    if (stuffIds.has(label)) return stuffIds.get(label); // the stuff of a class is one segment
    const id = found.length;
    if (settings.stuff.has(label)) stuffIds.set(label, id);
    found.push({ id, labelId: label, label: settings.labels[label], score });
    return id;
  });
  if (kept.length) winners.forEach((winner, pixel) => { if (winnersInside[pixel]) map[pixel] = ids[winner]; });
  return found;
}

/** For each pixel of the result, cells of the mask and weights: to the model's input, cropped, to the image's size. */
function axis(cells, whole, kept, target) {
  const toInput = bilinear(cells, whole);
  return bilinear(kept, target).map((pixel) => {
    const sums = new Map();
    for (const [position, weight] of pixel) {
      for (const [cell, inner] of toInput[position]) sums.set(cell, (sums.get(cell) ?? 0) + weight * inner);
    }
    return [...sums];
  });
}

/** For each of `target` positions, the two of `length` that it lies between, with their weights. */
function bilinear(length, target) {
  return Array.from({ length: target }, (_, index) => {
    const position = Math.min(Math.max(((index + 0.5) * length) / target - 0.5, 0), length - 1);
    const low = Math.floor(position);
    return [[low, 1 - (position - low)], [Math.min(low + 1, length - 1), position - low]];
  });
}
