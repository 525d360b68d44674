"""Any JSON value in place of any other in the files of a checkpoint: it works, or is refused by file and key."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Mask2FormerImageProcessor

from hf_segvit.inference.loading import load_point_classifier, load_universal_model
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.image_processing_vit_p_fusion import ViTPFusionImageProcessor
from hf_segvit.models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation

from ..tiny_generators import LABELS, noise_images, tiny_classifier, tiny_generator
from .test_load_paths import adapter

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
# What is changed of each kind.
FILES = dict.fromkeys(("segvit_eomt", "mask2former", "vit_p", "fusion"), (CONFIG, PROCESSOR)) | {
    "nested processor": ("processor_config.json",),
    "shards": ("model.safetensors.index.json",),
    "adapter": ("adapter_config.json",),
}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(kind == "adapter" and not find_spec("peft"), reason="needs peft"))
    for kind in FILES
]
INTERESTING = [None, True, False, 0, -1, 1, 2, 3.5, 1e300, 10**12, 10**30, "", "x", "0", "os.system", [], [1], [[]], {}]
INTERESTING += [
    {"0": 1},
    {"a": {"b": []}},
    ["x"],
    [1e300],
    [None, None],
    "kernels-community/attn",
    "a/b",
    [10**12, 10**12],
]


def write_checkpoint(kind: str, folder: Path) -> None:
    """A tiny model of a kind with its image processor, or an EoMT in an unusual form."""
    eomt_processor = EoMTImageProcessor(size=64, num_labels=5, stuff_classes=[0, 1])
    vit_p_processor = ViTPImageProcessor(size=56, patch_size=14, id2label=LABELS)
    if kind == "vit_p":
        model, processor = tiny_classifier(), vit_p_processor
    elif kind in ("segvit_eomt", "nested processor", "shards", "adapter"):
        model, processor = tiny_generator("segvit_eomt"), eomt_processor
    elif kind == "mask2former":
        model, processor = tiny_generator(kind), Mask2FormerImageProcessor(size={"height": 64, "width": 64})
    else:
        generator = tiny_generator("segvit_eomt")
        model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(generator, tiny_classifier())
        processor = ViTPFusionImageProcessor.from_generator_and_classifier(
            eomt_processor, vit_p_processor, config=model.config
        )
    model.save_pretrained(folder, max_shard_size="60KB" if kind == "shards" else "1GB")
    processor.save_pretrained(folder)
    if kind == "adapter":
        adapter(folder)
    elif kind == "nested processor":
        settings = json.loads((folder / PROCESSOR).read_text())
        (folder / PROCESSOR).unlink()
        (folder / FILES[kind][0]).write_text(json.dumps({"image_processor": settings, "processor_class": "X"}))


def use(kind: str, folder: Path) -> None:
    """Load a checkpoint and answer about one image."""
    image = noise_images([(40, 30)])[0]
    if kind == "vit_p":
        model, processor = load_point_classifier(str(folder))
        inputs = processor(images=[image], input_points=[[[3, 4]]])
        with torch.no_grad():
            assert torch.isfinite(model(**inputs).logits).all()
        return
    model, processor = load_universal_model(str(folder))
    if kind == "mask2former":  # what its forward pass makes of odd settings is Transformers' affair
        return
    segmenter = Segmenter(model, processor, task=getattr(processor, "task", None) or "panoptic", device="cpu")
    (answer,) = segmenter.answers([image])
    assert answer is not None


def refusal(kind: str, folder: Path) -> str | None:
    """The message of the ValueError that refuses a checkpoint; `None` if it works."""
    try:
        use(kind, folder)
    except ValueError as error:
        return str(error)
    return None


def places(value, path=()):
    """The path of every value within a JSON value."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def changed(value, path, new):
    """A copy of a JSON value with another one at a path."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copy


def check_change(kind: str, original: Path, name: str, path: tuple, new, folder: Path) -> None:
    """With one value replaced, the checkpoint works or is refused by file and key."""
    shutil.copytree(original, folder, copy_function=os.link)  # nothing writes into a file
    try:
        content = json.loads((folder / name).read_text())
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(changed(content, path, new)))
        message = refusal(kind, folder)
        if message is not None:
            # A message about a contradiction may name the other field, which is the file's too.
            names = places_names(content) | {"the weights do not fit", "is a model of type"}
            assert str(folder) in message or name in message, message
            # Transformers' own errors about its own configurations do not all say which field they are about.
            assert kind == "mask2former" or any(key in message for key in names), message
    finally:
        shutil.rmtree(folder)


def places_names(content) -> set[str]:
    """Every key of a file."""
    return {key for path in places(content) for key in path if isinstance(key, str) and not key.isdecimal()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder for each kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for kind in FILES:
        if kind == "adapter" and not find_spec("peft"):
            continue
        write_checkpoint(kind, folder / kind)
    return folder


JSON_VALUES = st.one_of(
    st.sampled_from(INTERESTING),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)


def fuzz(kind: str, checkpoints: Path, tmp_path: Path, examples: int) -> None:
    original = checkpoints / kind
    files = {name: json.loads((original / name).read_text()) for name in FILES[kind]}
    where = [(name, path) for name, content in files.items() for path in places(content)]

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(where), JSON_VALUES)
    def check(place, new):
        check_change(kind, original, *place, new, tmp_path / "changed")

    check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_any_value_works_or_is_refused(kind, checkpoints, tmp_path):
    fuzz(kind, checkpoints, tmp_path, examples=6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_many_values_work_or_are_refused(kind, checkpoints, tmp_path):
    fuzz(kind, checkpoints, tmp_path, examples=60)
