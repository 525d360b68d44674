"""Generated scenes: reproducible, consistent, told by shape, and hard where they claim to be."""

import colorsys
import pickle

import numpy as np
import pytest
from torch.utils.data import DataLoader

from hf_segvit.data.generated_scenes import (
    DIFFICULTIES,
    SCENE_LABELS,
    SCENE_STUFF_CLASSES,
    SPLITS,
    GeneratedScenes,
    generate_scene,
    scene_labels,
    scene_stuff_classes,
)
from hf_segvit.data.scene_painting import SHAPES, STUFF_PAINTERS, place_thing, smooth_noise


def scenes(difficulty, count=40, **options):
    return [generate_scene(seed, difficulty=difficulty, **options) for seed in range(count)]


def same(one, other):
    return np.array_equal(one["image"], other["image"]) and np.array_equal(one["segment_map"], other["segment_map"])


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("size", [(96, 96), (48, 80), (131, 16)])
def test_maps_and_rows_agree(difficulty, size):
    for scene in scenes(difficulty, 15, size=size):
        assert scene.image.shape == (*size, 3)
        assert (scene.image.dtype, scene.segment_map.dtype) == (np.uint8, np.int32)
        ids = [row["id"] for row in scene.segments]
        assert ids == list(range(len(ids)))
        assert set(np.unique(scene.segment_map)) - {-1} == set(ids)
        assert all(row.keys() == {"id", "label_id", "is_crowd"} and row["is_crowd"] is False for row in scene.segments)
        labels = [row["label_id"] for row in scene.segments]
        assert set(labels) <= scene_labels(difficulty).keys()
        stuff = [label for label in labels if label in SCENE_STUFF_CLASSES]
        assert len(stuff) == len(set(stuff)), "stuff is one segment a class"
        assert labels[: len(stuff)] == stuff, "stuff comes first"


def test_label_tables():
    assert set(SCENE_STUFF_CLASSES) == {i for i, name in SCENE_LABELS.items() if name in STUFF_PAINTERS}
    assert scene_labels("easy") == {0: "disc", 1: "sky", 2: "grass", 3: "square", 4: "water", 5: "triangle"}
    assert scene_stuff_classes("easy") == [1, 2, 4]
    assert scene_labels("hard") == SCENE_LABELS
    assert scene_stuff_classes("hard") == SCENE_STUFF_CLASSES


def test_same_seed_same_scene():
    for difficulty in DIFFICULTIES:
        one, other = generate_scene(7, difficulty=difficulty), generate_scene(7, difficulty=difficulty)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.segment_map, other.segment_map)
        assert one.segments == other.segments
        assert not np.array_equal(one.image, generate_scene(8, difficulty=difficulty).image)


def test_a_data_set_depends_on_seed_split_and_index_alone():
    long, short = GeneratedScenes(50, "train", seed=3), GeneratedScenes(4, "train", seed=3)
    assert same(long[3], short[3])
    assert same(short[-1], short[3])
    assert same(pickle.loads(pickle.dumps(long))[3], short[3])
    assert long[3]["image_id"] == 3
    assert not same(GeneratedScenes(4, seed=4)[3], short[3])


def test_no_scene_is_in_two_splits():
    # Among all scenes of all splits, none is seen twice; a shift by one index or seed would show here.
    images = {
        (split, seed, index): GeneratedScenes(20, split, seed=seed, size=(16, 16))[index]["image"].tobytes()
        for split in SPLITS
        for seed in (0, 1)
        for index in range(20)
    }
    assert len(set(images.values())) == len(images) == 120


def test_the_data_set_ends_and_feeds_loader_workers():
    data = GeneratedScenes(6, "val", size=(32, 32), difficulty="hard")
    assert len(data) == len(list(data)) == 6
    with pytest.raises(IndexError, match="no scene 6 among 6"):
        data[6]
    loader = DataLoader(data, batch_size=None, num_workers=2, collate_fn=lambda sample: sample)
    for index, sample in enumerate(loader):
        assert sample["image_id"] == index
        assert same(sample, data[index])
        assert sample.keys() == {"image", "image_id", "segment_map", "segments"}


@pytest.mark.parametrize(("difficulty", "fewest", "most"), [("easy", 1, 3), ("medium", 2, 8), ("hard", 4, 12)])
def test_number_of_things(difficulty, fewest, most):
    counts = [
        sum(row["label_id"] not in SCENE_STUFF_CLASSES for row in scene.segments) for scene in scenes(difficulty, 80)
    ]
    assert fewest <= min(counts)
    assert max(counts) == most
    exactly = generate_scene(0, num_things=(2, 2))
    assert sum(row["label_id"] not in SCENE_STUFF_CLASSES for row in exactly.segments) == 2
    assert all(row["label_id"] in SCENE_STUFF_CLASSES for row in generate_scene(0, num_things=(0, 0)).segments)


def test_easy_scenes_are_balanced_and_large():
    found, areas = [], []
    for scene in scenes("easy", 200):
        for row in scene.segments:
            found.append(row["label_id"])
            if row["label_id"] not in SCENE_STUFF_CLASSES:
                areas.append((scene.segment_map == row["id"]).mean())
        assert (scene.segment_map == -1).mean() < 0.02
    shares = np.bincount(found, minlength=6) / 200
    assert shares.min() > 0.4, "every class is in many scenes"
    assert min(areas) > 0.015, "no thing is tiny"


def test_hard_scenes_have_rare_classes_void_and_occlusion():
    found, voids, overlaps = [], 0, 0
    for scene in scenes("hard", 150):
        found += [row["label_id"] for row in scene.segments]
        voids += (scene.segment_map == -1).mean() > 0.004
        things = [row["id"] for row in scene.segments if row["label_id"] not in SCENE_STUFF_CLASSES]
        right, below = scene.segment_map[:, 1:], scene.segment_map[1:]
        touching = [np.stack([scene.segment_map[:, :-1], right]), np.stack([scene.segment_map[:-1], below])]
        overlaps += any((np.isin(pair, things).all(0) & (pair[0] != pair[1])).any() for pair in touching)
    counts = {SCENE_LABELS[i]: count for i, count in enumerate(np.bincount(found, minlength=len(SCENE_LABELS)))}
    assert min(counts.values()) > 0
    assert max(counts["heart"], counts["crescent"]) < 0.5 * min(counts["disc"], counts["star"])
    assert 20 < voids < 80  # an unlabelled object in 30 % of 150 scenes
    assert overlaps > 75


def test_things_keep_their_visible_share():
    """Every thing keeps the promised share of a whole shape; the smallest whole shape gives the bound."""
    settings = DIFFICULTIES["easy"]
    shapes = ("disc", "square", "triangle")
    whole = {
        name: place_thing((200, 200), name, (100, 100), settings.radius[0] * 96, 0.0).inside.sum() for name in shapes
    }
    for scene in scenes("easy", 60):
        for row in scene.segments:
            name = SCENE_LABELS[row["label_id"]]
            if name in whole:
                # A thing may also reach over the edge of the image, by 0.3 of its radius at most.
                assert (scene.segment_map == row["id"]).sum() > 0.7 * settings.min_visible * whole[name]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_like_areas_and_fit_their_window(shape):
    thing = place_thing((240, 240), shape, (120, 120), 60, 0.3)
    assert 1.2 < thing.inside.sum() / 60**2 < 3.6  # a disc has pi
    edges = np.concatenate([thing.inside[0], thing.inside[-1], thing.inside[:, 0], thing.inside[:, -1]])
    assert not edges.any(), "the window cuts the shape"


def test_shape_areas_by_formula():
    # Areas of regular shapes of circumradius a in radii; the tolerance is the outline's pixels.
    radius = 200
    areas = {name: place_thing((900, 900), name, (450, 450), radius, 0.2).inside.sum() / radius**2 for name in SHAPES}

    def polygon(corners, outer):
        return corners / 2 * outer**2 * np.sin(2 * np.pi / corners)

    expected = {
        "disc": np.pi,
        "square": 1.8**2,
        "triangle": polygon(3, 1.4),
        "pentagon": polygon(5, 1.15),
        "hexagon": polygon(6, 1.1),
        "star": 5 * 1.35 * 0.55 * np.sin(np.pi / 5),
        "ring": np.pi * (1.15**2 - 0.55**2),
        "cross": 4 * 1.1 * 0.8 - 0.8**2,
    }
    assert {name: areas[name] for name in expected} == pytest.approx(expected, rel=0.01)


def test_color_does_not_tell_the_class():
    """The mean hue of things separates their classes no better than chance would; lightness is the texture's."""
    hues, labels = [], []
    for scene in scenes("easy", 150):
        for row in scene.segments:
            if row["label_id"] not in SCENE_STUFF_CLASSES:
                red, green, blue = scene.image[scene.segment_map == row["id"]].mean(axis=0) / 255
                hues.append(colorsys.rgb_to_hsv(red, green, blue)[0])
                labels.append(row["label_id"])
    hues, labels = np.array(hues), np.array(labels)
    distances = np.abs((hues[:, None] - hues[None] + 0.5) % 1 - 0.5) + np.eye(len(labels))
    nearest = labels[distances.argmin(axis=1)]
    assert (nearest == labels).mean() < 0.45  # a third by chance; 3 standard deviations are 0.09


def test_smooth_noise_is_smooth_and_fills_its_range():
    noise = smooth_noise(np.random.default_rng(0), (200, 300), 5, 8)
    assert noise.shape == (200, 300)
    assert np.abs(noise).max() <= 1
    assert noise.std() > 0.25
    # The steepest slope is 1.5 times the largest difference, 2, over a cell of 37.5 pixels.
    assert np.abs(np.diff(noise, axis=1)).max() <= 3 / 37.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate_scene(0, (8, 96)), r"size is \(8, 96\).*at least 16"),
        (lambda: generate_scene(0, difficulty="extreme"), "no difficulty 'extreme'; choose one of easy, medium, hard"),
        (lambda: generate_scene(0, num_things=(3, 2)), r"num_things is \(3, 2\)"),
        (lambda: generate_scene(0, num_things=(-1, 2)), r"num_things is \(-1, 2\)"),
        (lambda: GeneratedScenes(5, "training"), "no split 'training'; choose one of train, val, test"),
        (lambda: GeneratedScenes(-1), "num_scenes is -1"),
        (lambda: GeneratedScenes(1, seed=-2), "seed -2"),
        (lambda: GeneratedScenes(1, difficulty="no"), "no difficulty 'no'"),
        (lambda: scene_labels("no"), "no difficulty 'no'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
