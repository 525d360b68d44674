"""The segments of one image: as masks, boxes and polygons, for other libraries, and as files.

`Segmenter` answers with a `SegmentedImage` of `Segment`s. Ids are the same in memory and in all files. `save` writes
what `hf-segvit segment` writes, as `OutputChoice` says:

- `NAME.overlay.png` (or jpg): the image with its segments tinted, outlined and labelled; below it, classes
  whose names have no room there, so that the file may be higher than the image.
- `NAME.panoptic.png` (panoptic): segment ids in COCO's encoding, id = R + 256 * G + 65536 * B, void 0.
- `NAME.semantic.png` (semantic): one channel of class ids, with a palette.
- `NAME.confidence.npy`: with a confidence, it as (H, W) float32, higher where the model is surer; `confidence-png`
  writes it as `NAME.confidence.png` of 16 bits, see `confidence_image`. Overlays then fade where the model is unsure.
- `NAME.segments.json`: what the segments are; its form is described at `description`.

H W pixels, R segments.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from ..atomic_files import write_json, writing
from ..data.mask_files import panoptic_png
from ..data.outlines import Polygon, mask_polygons
from ..data.png_files import png_bytes
from ..drawing.colors import class_color
from ..drawing.segments import draw_segments
from ..models.confidence import Confidence
from ..models.image_decoding import shown_rgb
from ..models.mask_encoding import decode_mask, encode_mask

FORMAT, VERSION = "hf-segvit segments", 1
IMAGE_OUTPUTS = ("overlay", "json", "panoptic", "semantic", "comparison", "confidence")

logger = logging.get_logger(__name__)


class ImageFault(ValueError):
    """What concerns one image only, so that the others go on."""


class OccupiedName(ImageFault):
    """Something else has the name of a result."""


@dataclass(frozen=True)
class Segment:
    """One segment of an image.

    Attributes:
        id: its value in the segment map and in files: 1, 2, ...; for semantic segmentation the label id.
        score: class probability (panoptic), that times the mean mask probability inside (instance), or `None`
            (semantic: a pixel's class is decided by all queries together).
        area: pixels; of an instance's whole mask, hidden pixels included.
        bbox: (x, y, width, height) in pixels, around the same pixels as `area`.
        rle: an instance's mask in COCO's run-length encoding, since instances may overlap.
    """

    id: int
    label_id: int
    label: str
    score: float | None
    area: int
    bbox: tuple[int, int, int, int]
    rle: dict[str, Any] | None = None


@dataclass(frozen=True)
class OutputChoice:
    """What is written for an image.

    Attributes:
        kinds: of `IMAGE_OUTPUTS`, `confidence-png`, and those of exports.py; None: all of the first that there are.
        overlay_format: `png`, exact, or `jpg`, many times faster and smaller.
        labels: whether overlays name the segments.
    """

    kinds: frozenset[str] | None = None
    overlay_format: str = "png"
    labels: bool = True

    def has(self, kind: str) -> bool:
        """Whether files of a kind are wanted."""
        return kind in (IMAGE_OUTPUTS if self.kinds is None else self.kinds)


DEFAULT_CHOICE = OutputChoice()


@dataclass(frozen=True)
class SegmentedImage:
    """The answer for one image.

    Attributes:
        segment_map: (H, W) int32, the id of the segment at each pixel, void -1; the best of overlapping instances.
        segments: in the order of their ids.
        highest_score: where there are no segments, the best score that did not suffice; `None`: no object at all.
        limit: the most segments that the answer could have had, if there is a limit.
        image: what was segmented, upright, for `crop` and `plot`.
        source: what the image was given as, for files; "" if it has no name.
        id2label: names of all classes of the model.
        confidence: (H, W) float32, how sure the model is of each pixel, if asked for; `confidence_score` says by what.
    """

    task: str
    segment_map: np.ndarray
    segments: list[Segment]
    highest_score: float | None = None
    limit: int | None = None
    image: Any = field(default=None, repr=False, compare=False)
    source: str = ""
    id2label: Mapping[int, str] = field(default_factory=dict, repr=False, compare=False)
    confidence: np.ndarray | None = field(default=None, repr=False, compare=False)
    confidence_score: Confidence | None = None

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def segments_info(self) -> list[dict[str, Any]]:
        """The rows of Transformers' post-processing: `id`, `label_id` and `score`."""
        return [{"id": each.id, "label_id": each.label_id, "score": each.score} for each in self.segments]

    @property
    def measures(self) -> list[tuple[int, tuple[int, int, int, int]]] | None:
        """Area and box of each segment in the map; `None` for instances, which the map may hide in part."""
        return None if self.task == "instance" else [(each.area, each.bbox) for each in self.segments]

    def mask(self, segment: Segment) -> np.ndarray:
        """(H, W) bool: the pixels of a segment; of an instance also those that others hide."""
        return self.segment_map == segment.id if segment.rle is None else decode_mask(segment.rle)

    @cached_property
    def masks(self) -> np.ndarray:
        """(R, H, W) bool; `mask` gives one without the memory of all."""
        if not self.segments:
            return np.zeros((0, *self.segment_map.shape), dtype=bool)
        return np.stack([self.mask(each) for each in self.segments])

    @property
    def boxes(self) -> np.ndarray:
        """(R, 4) float32 of x0, y0, x1, y1 in pixels, edges included."""
        boxes = np.array([each.bbox for each in self.segments], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes

    @property
    def polygons(self) -> list[list[Polygon]]:
        """The exact outlines of each segment, by parts; `outlines` simplifies them."""
        return self.outlines(0.0)

    def outlines(self, tolerance: float = 1.0) -> list[list[Polygon]]:
        """Outlines of each segment that are at most `tolerance` pixels from the exact ones."""
        return [mask_polygons(self.mask(each), tolerance) for each in self.segments]

    def rle(self, segment: Segment) -> dict[str, Any]:
        """The mask of a segment in COCO's run-length encoding."""
        return segment.rle if segment.rle is not None else encode_mask(self.mask(segment))

    def crop(self, segment: Segment, transparent: bool = False) -> Image.Image:
        """The image within the box of a segment; on request transparent outside of its mask.

        Raises:
            ValueError: the answer was made without keeping its image.
        """
        x, y, width, height = segment.bbox
        crop = shown_rgb(self._image()).crop((x, y, x + width, y + height))
        if transparent:
            mask = self.mask(segment)[y : y + height, x : x + width]
            crop.putalpha(Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))))
        return crop

    def plot(self, image: Any = None, *, labels: bool = True, alpha: float = 0.5, legend: bool = False) -> Image.Image:
        """The image (or another of its size) with its segments tinted, outlined and, on request, labelled.

        A legend lists the classes whose names have no room, in a strip below the image.
        """
        names = dict(self.id2label) or {each.label_id: each.label for each in self.segments}
        return draw_segments(
            self._image() if image is None else image,
            self.segment_map,
            self.segments_info,
            names,
            alpha=alpha,
            measures=self.measures,
            labels=labels,
            with_legend=legend,
            strength=None if self.confidence is None else np.clip(self._relative_confidence(), 0, 1),
        )

    def to_coco(self, image_id: int = 1, category_ids: Mapping[int, int] | None = None) -> list[dict[str, Any]]:
        """The segments as COCO's results: `image_id`, `category_id`, `segmentation` (RLE), `bbox`, `area` and `score`.

        `category_ids` gives the data set's id of each label id; None: they are the same.
        """
        return [
            {
                "image_id": image_id,
                "category_id": each.label_id if category_ids is None else category_ids[each.label_id],
                "segmentation": self.rle(each),
                "bbox": list(each.bbox),
                "area": each.area,
                "score": 1.0 if each.score is None else each.score,
            }
            for each in self.segments
        ]

    def to_supervision(self) -> Any:
        """The segments as `supervision.Detections`, with ids, names and masks.

        Raises:
            ValueError: the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ValueError("to_supervision needs the package supervision: pip install supervision") from error
        scores = [1.0 if each.score is None else each.score for each in self.segments]
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=np.array(scores, dtype=np.float32),
            class_id=np.array([each.label_id for each in self.segments], dtype=np.int64),
            data={
                "class_name": np.array([each.label for each in self.segments], dtype=str),
                "segment_id": np.array([each.id for each in self.segments], dtype=np.int64),
            },
        )

    # The JSON file has this form (null threshold: none; `classifier` and `alpha` follow `model` if there is a
    # classifier; `confidence`, its name, follows `height` if there is one):
    #
    #     {"format": "hf-segvit segments", "version": 1, "model": "...", "task": "panoptic", "threshold": 0.8,
    #      "picture": "cat.jpg", "width": 640, "height": 480,
    #      "segments": [{"id": 1, "label_id": 15, "label": "cat", "score": 0.98, "area": 1234, "bbox": [x, y, w, h]}],
    #      "label_changes": [{"id": 1, "area": 1234, "old": {"label_id": 16, "label": "dog", "score": 0.61},
    #                         "new": {"label_id": 15, "label": "cat", "score": 0.98}}]}
    #
    # `id` is the value of the segment's pixels in the PNG: 1, 2, ... (panoptic), or the class (semantic, where `score`
    # is null). Instances are numbered 1, 2, ... and carry `segmentation`, their mask in COCO's RLE, as they may
    # overlap. `highest_score` follows `segments` where these are empty: the best score that did not suffice.
    # `area` and `bbox` are in pixels of the image as displayed, with its EXIF orientation applied. `label_changes`
    # comes with a comparison; `old` is null for a segment that the generator alone would not have shown, `new` and `id`
    # for one that no longer reaches the threshold.
    def description(self, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The content of the JSON file; `about` has `model`, `threshold`, `picture`, and `classifier` and `alpha`."""
        about = about or {}
        height, width = self.segment_map.shape
        segments = []
        for segment in self.segments:
            row: dict[str, Any] = {
                "id": segment.id,
                "label_id": segment.label_id,
                "label": segment.label,
                "score": segment.score,
                "area": segment.area,
                "bbox": list(segment.bbox),
            }
            if segment.rle is not None:
                row["segmentation"] = segment.rle
            segments.append(row)
        description = {
            "format": FORMAT,
            "version": VERSION,
            "model": about.get("model"),
            **{name: about[name] for name in ("classifier", "alpha") if about.get(name) is not None},
            "task": self.task,
            "threshold": about.get("threshold"),
            "picture": about.get("picture", self.source),
            "width": width,
            "height": height,
            **({} if self.confidence_score is None else {"confidence": str(self.confidence_score)}),
            "segments": segments,
        }
        if not segments and self.highest_score is not None:
            description["highest_score"] = self.highest_score
        return description

    def save(
        self,
        prefix: str | PathLike[str],
        *,
        about: Mapping[str, Any] | None = None,
        choice: OutputChoice = DEFAULT_CHOICE,
        further: Mapping[str, Any] | None = None,
    ) -> list[Path]:
        """Write the files of the image, each whole or not at all, and return their paths.

        Args:
            prefix: folder and NAME.
            about: as for `description`.
            choice: which files.
            further: fields at the end of the JSON file.

        Raises:
            OccupiedName: something else has the name of a file.
            ValueError: a file cannot be written, or there is no image to draw on.
        """
        prefix = Path(prefix)
        endings = [f"overlay.{choice.overlay_format}"] if choice.has("overlay") else []
        endings += [f"{self.task}.png"] if self.task != "instance" and choice.has(self.task) else []
        if self.confidence is not None:
            endings += ["confidence.npy"] if choice.has("confidence") else []
            endings += ["confidence.png"] if choice.has("confidence-png") else []
        endings += ["segments.json"] if choice.has("json") else []
        # The list is written last, as it must never name a file that is missing.
        paths = {ending: prefix.with_name(f"{prefix.name}.{ending}") for ending in endings}
        prepare_paths(paths.values())
        for ending, path in paths.items():
            if ending.startswith("overlay"):
                save_image(self.plot(labels=choice.labels, legend=choice.labels), path)
            elif ending == "panoptic.png":
                panoptic_png(np.maximum(self.segment_map, 0) - 1, path)  # adds one to what it is given
            elif ending == "semantic.png":
                save_image(self.label_image(), path)
            elif ending == "confidence.npy":
                _save_array(self.confidence, path)
            elif ending == "confidence.png":
                save_image(self.confidence_image(), path)
            else:
                write_json(path, {**self.description(about), **(further or {})})
        return list(paths.values())

    def label_image(self) -> Image.Image:
        """The semantic map as an image of class ids: 8 bits with the classes' colours as palette, or 16 bits.

        The palette only shows the ids in colour; 16 bits, for more than 256 classes, cannot have one.
        """
        if len(self.id2label) > 256:
            return Image.fromarray(self.segment_map.astype(np.uint16))
        image = Image.fromarray(self.segment_map.astype(np.uint8))
        image.putpalette([value for label in range(256) for value in class_color(label)])
        return image

    def confidence_image(self) -> Image.Image:
        """The confidence as a greyscale image of 16 bits.

        0 is a pixel that no class claims and 65535 one that a single class claims wholly (`Confidence.bounds`), for
        `maxscore` 0 and 1; what lies outside is clipped, and said once.
        """
        relative = self._relative_confidence()
        # Written without clipping, 1.01 would become 0.01.
        if ((relative < -1e-4) | (relative > 1 + 1e-4)).any():
            logger.warning_once(
                f"confidences of {self.confidence_score} beyond the range of a 16-bit PNG are clipped there, since "
                "several queries may claim a pixel; the kind confidence (.npy) holds all values"
            )
        levels = np.rint(np.clip(relative, 0, 1) * 65535).astype(np.uint16)
        return Image.fromarray(levels)

    def _relative_confidence(self) -> np.ndarray:
        """The confidence between its bounds, in [0, 1] where it does not exceed them."""
        if self.confidence is None or self.confidence_score is None:
            raise ValueError("this answer has no confidence; ask for one with Segmenter(..., confidence=NAME)")
        low, high = self.confidence_score.bounds(max(len(self.id2label), 2))
        return (self.confidence.astype(np.float64) - low) / (high - low)

    def _image(self) -> Any:
        if self.image is None:
            raise ValueError("this answer was made without its image; pass the image, or segment it with a Segmenter")
        return self.image


def prepare_paths(paths: Iterable[Path]) -> None:
    """Create the folders of files; `OccupiedName` if something else is in the way of one."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise OccupiedName(f"cannot write to {path.parent}: a file is in its way; move it") from error
        if path.is_dir():
            raise OccupiedName(f"cannot write {path}: it is a folder; move it, or choose another --output")


def _save_array(values: Any, path: Path) -> None:
    """Save an array, whole or not at all; a ValueError if it cannot be written."""
    with writing(path) as partial, open(partial, "wb") as file:
        np.save(file, values, allow_pickle=False)


def save_image(image: Image.Image, path: Path) -> None:
    """Save a PNG or JPEG, whole or not at all; a ValueError if it cannot be written."""
    with writing(path) as partial:
        if path.suffix == ".jpg":
            image.save(partial, quality=90)
        elif image.mode in ("L", "RGB", "RGBA"):
            partial.write_bytes(png_bytes(np.asarray(image)))
        else:
            image.save(partial, compress_level=1)
