"""What every reader promises, format by format, and the doors for readers and augmentations from elsewhere."""

import importlib
import inspect
import pickle
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit.data import reading
from hf_segvit.data.augmentation import AugmentedSample, augmentation
from hf_segvit.data.class_lists import VOID
from hf_segvit.data.label_tables import label_table
from hf_segvit.data.readers import FORMATS, NOT_OPTIONS, format_list
from hf_segvit.data.reading import (
    Reading,
    available_splits,
    available_tasks,
    describe,
    load_segmentation_dataset,
    metadata,
)
from hf_segvit.models.mask_encoding import decode_mask
from hf_segvit.training.tasks.eomt import EoMTTask

from .data_folders import (
    SIZE,
    coco_folder,
    halves,
    mask_folder,
    panoptic_folder,
    write_image,
    write_json,
    write_mask,
)
from .field import test_exports
from .tiny_training import tiny_recipe


def coco(root: Path) -> str:
    coco_folder(root / "own", lambda content: content["categories"].__setitem__(slice(None), official_categories()))
    (root / "own" / "train").rename(root / "train2017")
    (root / "annotations").mkdir()
    (root / "own" / "annotations" / "instances_train.json").rename(root / "annotations" / "instances_train2017.json")
    return f"coco:{root}"


def official_categories() -> list[dict[str, object]]:
    return [{"id": row.source_id, "name": row.name} for row in label_table("coco_instance").classes]


def coco_stuff(root: Path) -> str:
    write_image(root / "train2017" / "a.jpg")
    write_mask(root / "stuffthingmaps" / "train2017" / "a.png", halves(0, 255))
    return f"coco_stuff:{root}"


def ade20k(root: Path) -> str:
    write_image(root / "images" / "training" / "a.jpg")
    write_mask(root / "annotations" / "training" / "a.png", halves(1, 150))
    write_mask(root / "annotations_instance" / "training" / "a.png", np.dstack([halves(0, 5)] * 2 + [halves(0, 0)]))
    return f"ade20k:{root}"


def cityscapes(root: Path, annotations: str = "gtFine") -> str:
    write_image(root / "leftImg8bit" / "train" / "city" / "a_leftImg8bit.png")
    folder = root / annotations / "train" / "city"
    write_mask(folder / f"a_{annotations}_labelIds.png", halves(7, 26))
    write_mask(folder / f"a_{annotations}_instanceIds.png", halves(7, 26001, dtype=np.uint16))
    return f"cityscapes:{root}"


def cityscapes_coarse(root: Path) -> str:
    cityscapes(root, "gtCoarse")
    return f"cityscapes_coarse:{root}"


def labelme(root: Path) -> str:
    write_image(root / "train" / "a.jpg")
    shape = {"label": "cat", "points": [[2, 2], [12, 2], [2, 12]], "shape_type": "polygon"}
    content = {"imagePath": "a.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": [shape]}
    write_json(root / "train" / "a.json", content)
    return f"labelme:{root}"


def yolo(root: Path) -> str:
    write_image(root / "images" / "train" / "a.jpg")
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "a.txt").write_text("0 0.1 0.1 0.5 0.1 0.1 0.6\n")
    (root / "data.yaml").write_text("train: images/train\nnames: [cat, dog]\n")
    return f"yolo:{root}"


def hub(root: Path) -> str:
    image, mask = write_image(root / "a.png"), write_mask(root / "m.png", halves())
    columns = {"image": [str(image)], "annotation": [str(mask)]}
    table = datasets.Dataset.from_dict(columns)
    for column in columns:
        table = table.cast_column(column, datasets.Image())
    table.save_to_disk(str(root / "saved"))
    write_json(root / "classes.json", {"0": "road", "1": "car"})
    return f"hub:{root / 'saved'}?classes={root / 'classes.json'}"


def written(name: str) -> Callable[[Path], str]:
    """The export of a tool, in a folder that is its split for training."""

    def write(root: Path) -> str:
        inside = name not in ("supervisely", "datumaro", "voc")
        getattr(test_exports, WRITERS_OF_TOOLS[name])(root / "train" if inside else root)
        for old, new in (("ds0", "train"), ("annotations/default.json", "annotations/train.json")):
            if (root / old).exists():
                (root / old).rename(root / new)
        return f"{name}:{root}"

    return write


WRITERS_OF_TOOLS = {
    "cvat": "cvat_images",
    "datumaro": "cvat_datumaro",
    "label_studio": "label_studio_json",
    "segments_ai": "segments_ai",
    "supervisely": "supervisely",
    "via": "via_json",
    "voc": "voc_masks",
}


def roboflow_masks(root: Path) -> str:
    write_image(root / "train" / "a.jpg")
    write_mask(root / "train" / "a_mask.png", halves())
    (root / "train" / "_classes.csv").write_text("Pixel Value, Class\n0, road\n1, car\n")
    return f"roboflow_masks:{root}"


def anomaly(name: str, values: tuple[int, int] = (0, 1)) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        write_image(root / "images" / "train" / "a.jpg")
        write_mask(root / "labels_masks" / "train" / "a.png", halves(*values))
        return f"{name}:{root}"

    return write


def lost_and_found(root: Path) -> str:
    write_image(root / "leftImg8bit" / "train" / "01_Street" / "01_Street_000000_000010_leftImg8bit.png")
    folder = root / "gtCoarse" / "train" / "01_Street"
    write_mask(folder / "01_Street_000000_000010_gtCoarse_labelIds.png", halves(1, 40))
    return f"lost_and_found:{root}"


def bravo(root: Path) -> str:
    folder = root / "bravo_SMIYC" / "RoadAnomaly21" / "images"
    write_image(folder / "a.jpg")
    write_mask(folder / "a_labels_semantic_fake.png", halves(0, 0))
    write_mask(folder / "a_labels_semantic.png", halves())
    return f"bravo:{root}"


def generated(root: Path) -> str:
    return "generated:easy?num_scenes=3&size=32"


WRITERS = {
    "coco": coco,
    "coco_folder": panoptic_folder,
    "coco_stuff": coco_stuff,
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "cityscapes_coarse": cityscapes_coarse,
    "mask_folder": mask_folder,
    "roboflow_masks": roboflow_masks,
    "labelme": labelme,
    "yolo": yolo,
    "hub": hub,
    "generated": generated,
    "anomaly": anomaly("anomaly"),
    "smiyc": anomaly("smiyc"),
    "fishyscapes": anomaly("fishyscapes"),
    "road_anomaly": anomaly("road_anomaly", (0, 2)),
    "lost_and_found": lost_and_found,
    "bravo": bravo,
    **{name: written(name) for name in WRITERS_OF_TOOLS},
}
FIRST_SPLIT = {"bravo": "SMIYC"}  # its subsets
# Of the other tasks of these formats the folders have no files.
TASKS_WITH_FILES = {
    "coco": ("instance",),
    "coco_folder": ("panoptic",),
    "mask_folder": ("semantic",),
    "hub": ("semantic",),
}


@pytest.fixture(params=[name for name in FORMATS if name != "auto"])  # which stands for another one
def spec(request, tmp_path) -> str:
    """A small data set in each format; a new format needs a line in `WRITERS`."""
    return WRITERS[request.param](tmp_path / "data")


def readable(spec: str) -> dict[str, datasets.Dataset]:
    """The data set, for each task that these files have masks for."""
    tasks = TASKS_WITH_FILES.get(spec.partition(":")[0], available_tasks(spec))
    return {task: load_segmentation_dataset(spec, task=task) for task in tasks}


def test_samples_have_the_same_columns_and_ids(spec):
    for task, dataset in readable(spec).items():
        facts = describe(dataset)
        assert facts.task == task
        assert f"{facts.format}:{facts.path}" == spec.partition("?")[0]
        assert facts.split == available_splits(spec)[0] == FIRST_SPLIT.get(facts.format, "train")
        assert set(facts.stuff_classes) <= set(facts.id2label)
        assert set(dataset.column_names) == {"image", "image_id", "segment_map", "segments"}
        for sample in dataset:
            assert (sample["image"].mode, isinstance(sample["image"], Image.Image)) == ("RGB", True)
            shape = (sample["image"].height, sample["image"].width)
            rows = sample["segments"]
            assert rows, "the files above have segments"
            assert {row["label_id"] for row in rows} <= set(facts.id2label)
            assert len({row["id"] for row in rows}) == len(rows)
            assert all(type(row["is_crowd"]) is bool for row in rows)
            if sample["segment_map"] is None:
                assert all(decode_mask(row["rle"]).shape == shape and decode_mask(row["rle"]).any() for row in rows)
                continue
            assert (sample["segment_map"].shape, sample["segment_map"].dtype) == (shape, np.int32)
            assert set(np.unique(sample["segment_map"]).tolist()) - {VOID} == {row["id"] for row in rows}
            if task == "semantic":
                assert all(row["id"] == row["label_id"] for row in rows)


def test_reading_again_and_pickling_give_the_same(spec):
    for task, dataset in readable(spec).items():
        others = (load_segmentation_dataset(spec, task=task), pickle.loads(pickle.dumps(dataset)))
        for other in others:
            assert metadata(other)["image_id"][:] == metadata(dataset)["image_id"][:]
            for one, sample in zip(dataset, other, strict=True):
                assert one["segments"] == sample["segments"]
                assert np.array_equal(np.asarray(one["image"]), np.asarray(sample["image"]))
                assert np.array_equal(np.asarray(one["segment_map"]), np.asarray(sample["segment_map"]))


def test_what_is_not_there_is_told_with_what_is(spec):
    name = spec.partition(":")[0]
    with pytest.raises(ValueError, match=rf"{name} has no task 'depth'; choose one of {available_tasks(spec)[0]}"):
        load_segmentation_dataset(spec, task="depth")
    with pytest.raises(ValueError, match=r"'elsewhere'"):
        load_segmentation_dataset(spec, split="elsewhere")
    with pytest.raises(ValueError, match=rf"format {name} has no option 'colour'; (choose|did you|it has none)"):
        load_segmentation_dataset(spec, colour=1)
    with pytest.raises(ValueError, match=rf"{name}.*no path|absent|no split|no such file|cannot be found"):
        load_segmentation_dataset(f"{name}:" if name in ("hub", "generated") else f"{name}:/absent")


def test_formats_are_known_as_their_modules_say():
    assert {*WRITERS, "auto"} == set(FORMATS)
    for name, known in FORMATS.items():
        module = importlib.import_module(known.module)
        assert known.layout == module.LAYOUT
        assert name in getattr(module, "VARIANTS", {}) or known.description == module.DESCRIPTION
        parameters = inspect.signature(module.read).parameters
        assert known.options == tuple(option for option in parameters if option not in (*NOT_OPTIONS, *known.preset))
        assert set(module.TASKS) <= {"panoptic", "instance", "semantic"}


OWN = """
from hf_segvit.data.label_maps import LabelMaps
from hf_segvit.data.reading import Reading

TASKS = ("semantic",)
LAYOUT = "any path"

def splits(path, wanted=()):
    return ["train"]

def read(path, split, task, problems, names="a"):
    place = {"archive": None, "member": path}
    row = {"image": place, "image_id": 7, "segment_map": [place], "segments": None}
    return Reading(LabelMaps({value: value % 2 for value in range(256)}, ""), [names, "b"], [0, 1], [row])
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Folder of modules that can be imported."""
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").touch()
    (tmp_path / "own_package" / "grey.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "own_package"
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        del sys.modules[name]


def test_a_reader_of_ones_own_by_import_path_and_by_entry_point(own, tmp_path, monkeypatch):
    image = write_mask(tmp_path / "a.png", halves(3, 4))
    point = EntryPoint("grey", "own_package.grey", "hf_segvit.readers")
    monkeypatch.setattr(reading, "entry_points", lambda group: {"grey": point} if group == point.group else {})
    for name in ("own_package.grey", "grey"):
        dataset = load_segmentation_dataset(f"{name}:{image}?names=odd")
        assert describe(dataset).id2label == {0: "odd", 1: "b"}
        assert (describe(dataset).format, describe(dataset).path) == (name, str(image))
        assert np.array_equal(dataset[0]["segment_map"], halves(1, 0))
    monkeypatch.setattr("hf_segvit.data.readers.entry_points", lambda group: {"grey": point})
    assert "  grey: the reader own_package.grey\n" in format_list()
    # A known format wins over a module of the same name.
    monkeypatch.setitem(sys.modules, "yolo", ModuleType("yolo"))
    assert available_tasks("yolo:x") == ("instance", "semantic", "panoptic")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mask_foldr:x", r"no format 'mask_foldr'; did you mean mask_folder\?"),
        ("json:x", r"no format 'json'; "),  # there is such a module, but it reads something else
        ("a b:x", r"no format 'a b'; "),
        (
            "own_package.absent:x",
            r"own_package\.absent cannot be imported \(ModuleNotFound.*its folder to PYTHONPATH",
        ),
        ("own_package.broken:x", r"own_package\.broken cannot be imported \(ZeroDivisionError"),
        ("own_package.part:x", r"own_package\.part is not a reader: it has no LAYOUT and no read; "),
    ],
)
def test_what_is_no_reader_is_told_with_what_is_missing(own, spec, message):
    (own / "broken.py").write_text("1 / 0")
    (own / "part.py").write_text("TASKS = ('semantic',)\ndef splits(path, wanted=()): ...")
    with pytest.raises(ValueError, match=message):
        load_segmentation_dataset(spec)


def test_a_reading_without_rows_says_the_layout(own, monkeypatch):
    module = importlib.import_module("own_package.grey")
    monkeypatch.setattr(module, "read", lambda path, split, task, problems: Reading(None, ["a"], []))
    with pytest.raises(ValueError, match="there are no images for semantic segmentation; expected any path"):
        load_segmentation_dataset("own_package.grey:here")


class Plain:
    """Resizes, and does nothing at random."""

    def __init__(self, size, offset=0):
        self.size, self.offset = size, offset

    def __call__(self, entry, generator):
        pixels = torch.from_numpy(np.array(entry["image"].resize(self.size[::-1]))).permute(2, 0, 1)
        segment_map = torch.full(self.size, self.offset, dtype=torch.int16)
        return AugmentedSample(entry["image_id"], pixels, segment_map, torch.tensor([0]))


class NotCalled:
    """No augmentation, as it cannot be called."""

    def __init__(self, size): ...


def test_an_augmentation_of_ones_own(tmp_path):
    assert augmentation(f"{__name__}:Plain", 16, offset=3).size == (16, 16)
    with pytest.raises(ValueError, match=r"Plain does not take .*colour"):
        augmentation(f"{__name__}:Plain", 16, colour=1)
    with pytest.raises(ValueError, match=r"NotCalled has no method __call__"):
        augmentation(f"{__name__}:NotCalled", 16)
    with pytest.raises(ValueError, match=r"augmentation=.*:Plane: .* has no Plane; did you mean Plain\?"):
        augmentation(f"{__name__}:Plane", 16)
    with pytest.raises(ValueError, match=r"no augmentation 'vit'; did you mean vit_p\?, or give package\.module:Class"):
        augmentation("vit", 16)
    changes = {"augmentation": f"{__name__}:Plain", "augmentation_options": {"offset": -1}}
    task = EoMTTask(tiny_recipe(tmp_path, **changes))
    task.device = torch.device("meta")  # where published recipes leave scaling to the device
    sample = task.train_samples()[0, 1]
    assert sample.segment_map.unique().tolist() == [-1]
    assert torch.equal(sample.pixels, task.train_samples()[1, 1].pixels)
