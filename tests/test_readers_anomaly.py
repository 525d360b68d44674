"""Data sets of anomalies as they are delivered, and BRAVO's files: read, written, read back, damaged."""

import json
import pickle
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_segvit.cli import main
from hf_segvit.data.bravo_files import (
    bravo_images,
    decode_samples,
    decode_submission,
    encode_samples,
    encode_submission,
    encoded_submission,
    read_ground_truth,
    read_prediction,
    read_samples,
    read_submission,
    write_prediction,
)
from hf_segvit.data.checking import check_dataset
from hf_segvit.data.label_tables import label_table
from hf_segvit.data.mask_files import read_index_map
from hf_segvit.data.readers.auto import recognise
from hf_segvit.data.reading import available_splits, describe, load_segmentation_dataset, validation_split
from hf_segvit.inference.exports import Classes, refuse_exports
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.metrics.bravo import BravoSubset, quantized_confidence, sampled_pixels
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor

from .data_folders import SIZE, halves, write_image, write_mask
from .tiny_models import tiny_eomt

MASK = np.zeros(SIZE, dtype=np.uint8)
MASK[:5], MASK[10:12] = 255, 1


def road_anomaly(root: Path) -> None:
    for name in ("animals01_Road", "b.c"):
        write_image(root / "frames" / f"{name}.jpg")
        write_mask(root / "frames" / f"{name}.labels" / "labels_semantic.png", np.where(MASK == 1, 2, MASK))
        write_mask(root / "frames" / f"{name}.labels" / "labels_semantic_color.png", np.dstack([MASK] * 3))
    (root / "frame_list.json").write_text(json.dumps(["animals01_Road.jpg", "b.c.jpg"]))


def smiyc(root: Path) -> None:
    for name in ("validation0000", "cow0013"):
        write_image(root / "images" / f"{name}.webp")
    write_mask(root / "labels_masks" / "validation0000_labels_semantic.png", MASK)
    write_mask(root / "labels_masks" / "validation0000_labels_semantic_color.png", np.dstack([MASK, MASK // 2, MASK]))


def fishyscapes(root: Path) -> None:
    write_image(root / "0000_04_Maurener_Weg_8_000000_000030_rgb.png")
    write_mask(root / "0000_04_Maurener_Weg_8_000000_000030_labels.png", MASK)


def lost_and_found(root: Path) -> None:
    for split in ("train", "test"):
        name = f"04_Maurener_Weg_8/04_Maurener_Weg_8_000000_0000{30 if split == 'test' else 60}"
        write_image(root / "leftImg8bit" / split / f"{name}_leftImg8bit.png")
        values = np.where(MASK == 255, 0, np.where(MASK == 1, 200, 1)).astype(np.uint8)
        write_mask(root / "gtCoarse" / split / f"{name}_gtCoarse_labelIds.png", values)
        write_mask(root / "gtCoarse" / split / f"{name}_gtCoarse_instanceIds.png", halves())


def course(root: Path) -> None:
    """The flat copies, whose numbers are names."""
    write_image(root / "images" / "0.jpg")
    write_mask(root / "labels_masks" / "0.png", MASK)


def own_folder(root: Path) -> None:
    write_image(root / "images" / "a.jpg")
    write_mask(root / "masks" / "a.png", MASK)


LAYOUTS = {
    "road_anomaly": (road_anomaly, ["animals01_Road", "b.c"], "road_anomaly"),
    "smiyc": (smiyc, ["validation0000"], "smiyc"),
    "fishyscapes": (fishyscapes, ["0000_04_Maurener_Weg_8_000000_000030"], "fishyscapes"),
    "anomaly": (course, ["0"], "anomaly"),
    "own": (own_folder, ["a"], "anomaly"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_as_delivered(name, tmp_path):
    write, ids, format_name = LAYOUTS[name]
    write(tmp_path)
    spec = f"{format_name}:{tmp_path}"
    assert available_splits(spec) == ["val"]
    assert validation_split(spec, "") == "val"
    dataset = load_segmentation_dataset(spec)
    assert describe(dataset).id2label == {0: "known", 1: "anomaly"}
    assert [row["image_id"] for row in dataset] == ids
    for row in dataset:
        np.testing.assert_array_equal(row["segment_map"], np.where(MASK == 255, -1, MASK.astype(int)))
        assert [(each["id"], each["label_id"]) for each in row["segments"]] == [(0, 0), (1, 1)]
    if name != "own":  # which mask_folder reads, too
        assert recognise(str(tmp_path))[0] == format_name
        assert describe(load_segmentation_dataset(f"auto:{tmp_path}")).format == format_name
    assert len(load_segmentation_dataset(spec, split="all")) == len(ids)


def test_lost_and_found_and_masks_of_fishyscapes_without_images(tmp_path):
    lost_and_found(tmp_path / "laf")
    assert available_splits(f"lost_and_found:{tmp_path / 'laf'}") == ["train", "test"]
    assert recognise(str(tmp_path / "laf"))[0] == "lost_and_found"
    (row,) = load_segmentation_dataset(f"lost_and_found:{tmp_path / 'laf'}", split="test")
    assert row["image_id"] == "04_Maurener_Weg_8/04_Maurener_Weg_8_000000_000030"
    np.testing.assert_array_equal(row["segment_map"], np.where(MASK == 255, -1, MASK.astype(int)))
    fishyscapes(tmp_path / "fs")
    (tmp_path / "fs" / "0000_04_Maurener_Weg_8_000000_000030_rgb.png").unlink()
    spec = f"fishyscapes:{tmp_path / 'fs'}"
    with pytest.raises(ValueError, match="there are no images for semantic segmentation"):
        load_segmentation_dataset(spec)
    (row,) = load_segmentation_dataset(f"{spec}?images={tmp_path / 'laf'}")
    np.testing.assert_array_equal(row["segment_map"], np.where(MASK == 255, -1, MASK.astype(int)))


def test_lost_and_found_in_its_archives(tmp_path):
    lost_and_found(tmp_path / "laf")
    for name in ("leftImg8bit", "gtCoarse"):
        shutil.make_archive(str(tmp_path / "zipped" / name), "zip", tmp_path / "laf", name)
    fishyscapes(tmp_path / "fs")
    for spec in (
        f"lost_and_found:{tmp_path / 'zipped'}?known=1",
        f"fishyscapes:{tmp_path / 'fs'}?images={tmp_path / 'zipped'}",
    ):
        (row,) = load_segmentation_dataset(spec, split=available_splits(spec)[-1])
        np.testing.assert_array_equal(row["segment_map"], np.where(MASK == 255, -1, MASK.astype(int)))


def test_cityscapes_coarse_is_still_recognised(tmp_path):
    write_image(tmp_path / "leftImg8bit" / "train" / "aachen" / "aachen_000000_000019_leftImg8bit.png")
    write_mask(tmp_path / "gtCoarse" / "train" / "aachen" / "aachen_000000_000019_gtCoarse_labelIds.png", halves())
    assert recognise(str(tmp_path))[0] == "cityscapes_coarse"


def test_values_of_ones_own(tmp_path):
    write_image(tmp_path / "images" / "a.jpg")
    values = np.zeros(SIZE, dtype=np.uint8)
    values[0], values[1], values[2], values[3] = 3, 7, 9, 255
    write_mask(tmp_path / "masks" / "a.png", values)
    spec = f"anomaly:{tmp_path}"
    with pytest.raises(
        ValueError, match=r"a\.png: .*3, 7, 9.*masks: 0 known; 1 anomaly; 255 void; .*road_anomaly:PATH"
    ):
        _ = load_segmentation_dataset(spec)[0]
    dataset = load_segmentation_dataset(f"{spec}?known=0,3&anomaly=7-8,255&void=9")
    assert np.asarray(dataset[0]["segment_map"])[:5, 0].tolist() == [0, 1, -1, 1, 0]
    assert "0, 3 known; 7-8, 255 anomaly; 9 void" in describe(dataset).remarks[0]
    for option, message in (
        ("anomaly=x", "'x' is no value of a mask"),
        ("anomaly=1-y", "no value of a mask"),
        ("anomaly=0", "the value 0 of masks is listed twice"),
        ("void=1", "the value 1 of masks is listed twice"),
        ("anomaly=9-8", "give at least one value for each"),
    ):
        with pytest.raises(ValueError, match=message):
            load_segmentation_dataset(f"{spec}?{option}")


def test_images_without_masks(tmp_path):
    smiyc(tmp_path / "smiyc")
    remarks = describe(load_segmentation_dataset(f"smiyc:{tmp_path / 'smiyc'}")).remarks
    assert remarks[1] == "images without a mask, as of a test set, which are left out: 1"
    course(tmp_path / "course")
    write_image(tmp_path / "course" / "images" / "1.jpg", seed=1)
    with pytest.raises(ValueError, match=r"1\.jpg.*the image has no mask of the same name"):
        load_segmentation_dataset(f"anomaly:{tmp_path / 'course'}")
    with pytest.raises(ValueError, match="no split of a anomaly data set is there"):
        load_segmentation_dataset(f"anomaly:{tmp_path / 'smiyc' / 'images'}")


def test_check_data_says_what_cannot_be_scored(tmp_path, capsys):
    for number, values in enumerate([MASK, np.where(MASK == 1, 0, MASK), np.full(SIZE, 255, np.uint8)]):
        write_image(tmp_path / "images" / f"{number}.jpg", seed=number)
        write_mask(tmp_path / "labels_masks" / f"{number}.png", values)
    report = check_dataset(f"anomaly:{tmp_path}")
    messages = [problem.message for problem in report.problems]
    assert "2 images of 3 without a pixel of 'anomaly'" in messages
    assert "1 image of 3 without a pixel of 'known'" in messages
    assert any("mask is all void" in message for message in messages)
    write_mask(tmp_path / "labels_masks" / "0.png", np.where(MASK == 1, 0, MASK))
    (error,) = [problem.message for problem in check_dataset(f"anomaly:{tmp_path}").problems.errors]
    assert error.startswith("no pixel of any image is 'anomaly', so that AUROC, AUPRC and FPR are undefined")
    write_mask(tmp_path / "labels_masks" / "1.png", np.where(MASK == 1, 77, MASK))
    assert main(["check-data", f"anomaly:{tmp_path}", "--output", str(tmp_path / "report")]) == 1
    assert "77" in capsys.readouterr().out


def bravo_tree(root: Path) -> np.random.Generator:
    generator = np.random.default_rng(0)
    places = {
        "bravo_ACDC/fog/test/GOPR0475/GOPR0475_frame_000247": ("_rgb_anon.png", "_gt_labelTrainIds", "_gt_invIds"),
        "bravo_ACDC/night/test/GOPR0594/GOPR0594_frame_000715": ("_rgb_anon.png", "_gt_labelTrainIds", "_gt_invIds"),
        "bravo_SMIYC/RoadAnomaly21/images/cow0013": (".jpg", "_labels_semantic_fake", "_labels_semantic"),
        "bravo_synobjs/armchair/1": (".png", "_gt", "_mask"),
        "bravo_synrain/munster/munster_000000_000019": ("_leftImg8bit.png", "_gt_labelTrainIds", "_gt_invIds"),
    }
    for name, (image, labels, invalid) in places.items():
        write_image(root / f"{name}{image}")
        truth = generator.integers(0, 19, SIZE).astype(np.uint8)
        truth[0] = 255
        write_mask(root / f"{name}{labels}.png", truth)
        write_mask(root / f"{name}{invalid}.png", (generator.random(SIZE) < 0.2).astype(np.uint8) * 255)
    return generator


def test_bravo_is_read(tmp_path):
    bravo_tree(tmp_path)
    images = {image.name: image for image in bravo_images(str(tmp_path))}
    assert [(image.subset, image.name.rpartition("/")[2]) for image in images.values()] == [
        ("ACDCfog", "GOPR0475_frame_000247"),
        ("ACDCnight", "GOPR0594_frame_000715"),
        ("SMIYC", "cow0013"),
        ("synobjs", "1"),
        ("synrain", "munster_000000_000019"),
    ]
    spec = f"bravo:{tmp_path}"
    assert recognise(str(tmp_path))[0] == "bravo"
    assert available_splits(spec) == ["SMIYC", "synobjs"]
    assert available_splits(spec, annotations="semantic") == ["ACDCfog", "ACDCnight", "synobjs", "synrain"]
    (row,) = load_segmentation_dataset(spec, split="synobjs")
    truth = read_ground_truth(images["bravo_synobjs/armchair/1"])
    np.testing.assert_array_equal(
        row["segment_map"], np.where(truth["labels"] == 255, -1, (truth["invalid"] > 0).astype(int))
    )
    dataset = load_segmentation_dataset(f"{spec}?annotations=semantic", split="synobjs")
    assert describe(dataset).id2label[13] == "car"
    np.testing.assert_array_equal(
        dataset[0]["segment_map"],
        np.where((truth["labels"] == 255) | (truth["invalid"] > 0), -1, truth["labels"].astype(int)),
    )
    with pytest.raises(ValueError, match="annotations is 'both'"):
        load_segmentation_dataset(f"{spec}?annotations=both")
    for path in tmp_path.rglob("*_labels_semantic.png"):
        path.unlink()
    with pytest.raises(ValueError, match="there is no ground truth"):
        read_ground_truth(bravo_images(str(tmp_path))[2])
    assert available_splits(spec) == ["synobjs"]


def test_bravo_submission_is_written_and_read_back(tmp_path):
    generator = bravo_tree(tmp_path / "data")
    images = bravo_images(str(tmp_path / "data"))
    folder, answers = tmp_path / "answers", {}
    for image in images:
        classes, confidence = generator.integers(0, 19, SIZE), generator.random(SIZE) * 1.2
        paths = write_prediction(folder, image, classes, confidence)
        answers[image.name] = classes, quantized_confidence(confidence)
        for path, (height, width) in zip(paths, (SIZE, SIZE), strict=True):
            assert read_index_map({"archive": None, "member": str(path)}).shape == (height, width)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert "bravo_ACDC/fog/test/GOPR0475/GOPR0475_frame_000247_rgb_anon_pred.png" in names
    assert "bravo_synrain/munster/munster_000000_000019_leftImg8bit_conf.png" in names
    assert {"bravo_synobjs/armchair/1_pred.png", "bravo_SMIYC/RoadAnomaly21/images/cow0013_conf.png"} <= names
    assert len(names) == 10
    fog = images[0].name
    given = {fog: np.arange(30, 330, 3)}
    with tarfile.open(tmp_path / "samples.tar", "w") as tar:
        (tmp_path / "list").write_bytes(encode_samples(given[fog]))
        tar.add(tmp_path / "list", f"{fog}_samples.bin")
    samples = read_samples(tmp_path / "samples.tar")
    np.testing.assert_array_equal(samples[fog], given[fog])
    tar_path = encoded_submission(folder, images, tmp_path / "out" / "submission.tar", samples)
    again = encoded_submission(folder, images, tmp_path / "again.tar", samples)
    assert tar_path.read_bytes() == again.read_bytes()
    read_back = read_submission(tar_path)
    assert set(read_back) == set(answers)
    metrics = BravoSubset("ACDCfog"), BravoSubset("ACDCfog")
    for image in images:
        classes, levels = answers[image.name]
        truth = read_ground_truth(image)
        chosen = samples.get(image.name, sampled_pixels(truth["labels"]))
        np.testing.assert_array_equal(read_prediction(folder, image)[0], classes)
        np.testing.assert_array_equal(read_prediction(folder, image)[1], levels)
        np.testing.assert_array_equal(read_back[image.name][0], classes)
        np.testing.assert_array_equal(read_back[image.name][1], levels.ravel()[chosen])
        if image.subset == "ACDCfog":
            for metric, (shown, confidence) in zip(metrics, (answers[fog], read_back[fog]), strict=True):
                prediction = {"classes": shown, "confidence": confidence}
                metric.add_batch(predictions=[prediction], references=[{**truth, "samples": chosen}])
    assert metrics[0].compute() == metrics[1].compute()
    assert metrics[0].compute()["auroc_valid"] is not None


def test_bravo_submission_of_a_model(tmp_path):
    """From the command to the tar file: `segment --outputs bravo` names the files as the challenge does."""
    bravo_tree(tmp_path / "data")
    for path in [*(tmp_path / "data").rglob("*.png")]:  # the public data set has images alone
        if path.stem.endswith(("TrainIds", "invIds", "_gt", "_mask", "_fake", "_semantic")):
            path.unlink()
    labels = {label: row.name for label, row in enumerate(label_table("cityscapes").classes)}
    model = tiny_eomt(id2label=labels, label2id={name: label for label, name in labels.items()})
    model.set_masked_attention_probabilities(0.0)
    model.save_pretrained(tmp_path / "model")
    processor = EoMTImageProcessor(task="semantic", size={"height": 64, "width": 64}, num_labels=19)
    processor.save_pretrained(tmp_path / "model")
    command = ["segment", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main([*command, "--outputs", "bravo"]) == 2  # without a confidence
    with pytest.raises(ValueError, match="--outputs bravo needs a model of its classes"):
        refuse_exports(["bravo"], "semantic", Classes({0: "road", 1: "car"}))
    with pytest.raises(ValueError, match="--outputs bravo is for semantic segmentation"):
        refuse_exports(["bravo"], "panoptic", Classes(labels))
    assert main([*command, "--outputs", "bravo", "--confidence", "maxscore"]) == 0
    images = bravo_images(str(tmp_path / "data"))
    samples = {image.name: np.arange(0, 600, 7) for image in images}
    folder = tmp_path / "out" / "bravo"
    answers = read_submission(encoded_submission(folder, images, tmp_path / "submission.tar", samples))
    assert len(answers) == 5
    segmenter = Segmenter.from_pretrained(str(tmp_path / "model"), task="semantic", confidence="maxscore")
    for image in images:
        (answer,) = segmenter([image.image["member"]])
        classes, levels = answers[image.name]
        np.testing.assert_array_equal(classes, answer.segment_map)
        expected = np.clip(answer.confidence, 0, 1).ravel()[::7]
        np.testing.assert_allclose(levels / 65535, expected, atol=1e-5)


def test_bravo_encoding_byte_by_byte():
    classes = np.array([[0, 1, 2], [3, 4, 18]])
    levels = np.array([[0, 256, 65535], [7, 8, 9]], dtype=np.uint16)
    encoded = encode_submission(classes, levels, np.array([1, 2, 4]))
    assert struct.unpack("<4sIIIIII", encoded[:28]) == (b"BV23", 2, 2, 3, 3, 6, 6)
    assert encoded[28:32] == bytes.fromhex("28b52ffd")  # zstd
    assert struct.unpack("<I", encoded[-4:])[0] == zlib.crc32(encoded[:-4])
    shown, confidence = decode_submission(encoded)
    np.testing.assert_array_equal(shown, classes)
    assert confidence.tolist() == [256, 65535, 8]
    indices = np.array([0, 255, 511, 512, 70_000, 70_001])
    content = decompress(encode_samples(indices))
    long = bytes([0, 0, 1, 0]), bytes([0, *(70_000 - 512).to_bytes(3, "little")])
    assert content == bytes([6, 0, 0, 0, 0, 0, 255]) + long[0] + b"\1" + long[1] + b"\1"
    np.testing.assert_array_equal(decode_samples(encode_samples(indices)), indices)


def decompress(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd").read()


def test_bravo_refuses_damage(tmp_path):
    bravo_tree(tmp_path / "data")
    image = bravo_images(str(tmp_path / "data"))[0]
    encoded = encode_submission(np.zeros((3, 4), int), np.zeros((3, 4), int), np.array([0, 5]))

    def sealed(body: bytes) -> bytes:
        return body + struct.pack("<I", zlib.crc32(body))

    for damaged, message in (
        (b"", "0 bytes are no encoded prediction"),
        (b"BV24" + encoded[4:], "begins with b'BV24', version 2"),
        (encoded[:30] + b"x" + encoded[31:], "the checksum is wrong"),
        (sealed(encoded[:8] + b"\4" + encoded[9:-4]), "sizes contradict each other"),
        (sealed(encoded[:28] + encoded[30:-4]), "cannot be decompressed"),
        (sealed(struct.pack("<4sIIIIII", b"BV23", 2, 3, 5, 2, 15, 4) + encoded[28:-4]), "other numbers of pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_submission(damaged)
    with pytest.raises(ValueError, match="cannot be decompressed"):
        decode_samples(b"nothing")
    with pytest.raises(ValueError, match="ascend within"):
        encode_samples(np.array([3, 3]))
    with pytest.raises(ValueError, match=r"frame_000247: the class map holds \[19\]"):
        write_prediction(tmp_path, image, np.full((2, 2), 19), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="frame_000247: the confidence is NaN at 1 pixels"):
        write_prediction(tmp_path, image, np.zeros((1, 2), int), np.array([[0.1, np.nan]]))
    with pytest.raises(ValueError, match=r"the confidence is \(1, 3\), but the class map \(1, 2\)"):
        write_prediction(tmp_path, image, np.zeros((1, 2), int), np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"_pred\.png"):
        encoded_submission(tmp_path, [image], tmp_path / "a.tar", {})
    assert not (tmp_path / "a.tar").exists()
    with pytest.raises(ValueError, match="cannot be read as a tar archive"):
        read_samples(tmp_path / "absent.tar")


STATIC = {"0000": "frankfurt_000000_000294", "0001": "lindau_000001_000019"}


class TestFishyscapesStatic:
    """Masks, and overlays that are added to images of Cityscapes."""

    def write(self, root: Path) -> str:
        for number, name in STATIC.items():
            write_image(root / "cityscapes" / "leftImg8bit" / "val" / name.split("_")[0] / f"{name}_leftImg8bit.png")
            write_mask(root / "static" / f"{number}_{name}_labels.png", MASK)
            overlay = np.zeros((*SIZE, 3), dtype=np.int16)
            overlay[MASK == 1] = 300, -300, int(number) + 1
            np.savez_compressed(root / "static" / f"{number}_{name}_rgb.npz", rgb=overlay)
        return f"fishyscapes:{root / 'static'}?images={root / 'cityscapes'}"

    def test_overlays_are_added_to_the_images(self, tmp_path):
        dataset = load_segmentation_dataset(self.write(tmp_path))
        assert [row["image_id"] for row in dataset] == [f"{number}_{name}" for number, name in STATIC.items()]
        for (number, name), row in zip(STATIC.items(), dataset, strict=True):
            path = tmp_path / "cityscapes" / "leftImg8bit" / "val" / name.split("_")[0] / f"{name}_leftImg8bit.png"
            expected = np.array(Image.open(path).convert("RGB")).astype(int)
            expected[MASK == 1] += 300, -300, int(number) + 1
            np.testing.assert_array_equal(np.asarray(row["image"]), np.clip(expected, 0, 255))
            np.testing.assert_array_equal(row["segment_map"], np.where(MASK == 255, -1, MASK.astype(int)))
        # Workers read through a copy.
        copied = pickle.loads(pickle.dumps(dataset))
        np.testing.assert_array_equal(np.asarray(copied[1]["image"]), np.asarray(dataset[1]["image"]))
        np.testing.assert_array_equal(
            np.asarray(dataset.select_columns(["image"])[0]["image"]), np.asarray(dataset[0]["image"])
        )

    def test_check_data_reads_them(self, tmp_path, capsys):
        spec = self.write(tmp_path)
        assert main(["check-data", spec, "--output", str(tmp_path / "report")]) == 0
        assert "overlays of Fishyscapes Static" in capsys.readouterr().out
        assert recognise(str(tmp_path / "static"))[0] == "fishyscapes"

    def test_what_is_missing_is_named(self, tmp_path):
        spec = self.write(tmp_path)
        with pytest.raises(ValueError, match=r"_rgb.npz is what Fishyscapes Static adds .* \?images=FOLDER"):
            load_segmentation_dataset(spec.partition("?")[0])
        (tmp_path / "static" / "0001_lindau_000001_000019_rgb.npz").unlink()
        with pytest.raises(ValueError, match="there is no overlay of its number"):
            load_segmentation_dataset(spec)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (lambda path: np.savez(path, image=np.zeros((*SIZE, 3))), "it has no array rgb"),
            (lambda path: np.savez(path, rgb=np.zeros((*SIZE[::-1], 3), np.int16)), r"rgb is int16 \("),
            (lambda path: np.savez(path, rgb=np.full((*SIZE, 3), np.nan)), "rgb is float64"),
            (lambda path: np.savez_compressed(path, rgb=np.zeros((4000, 4000, 3))), "it has no array rgb"),
            (lambda path: np.savez(path, rgb=np.array([{}], dtype=object)), "is no overlay of Fishyscapes Static"),
            (lambda path: path.write_bytes(b"PK\x03\x04 cut off"), "is no overlay of Fishyscapes Static"),
        ],
    )
    def test_damaged_overlays_are_named(self, content, message, tmp_path):
        dataset = load_segmentation_dataset(self.write(tmp_path))
        content(tmp_path / "static" / "0001_lindau_000001_000019_rgb.npz")
        with pytest.raises(ValueError, match=message) as error:
            dataset[1]
        assert "0001_lindau_000001_000019_rgb.npz" in str(error.value)
