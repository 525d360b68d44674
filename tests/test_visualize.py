"""Drawings: what is tinted, outlined, labelled and written, checked pixel by pixel where it can be."""

import colorsys
import itertools
import re
import threading

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image, ImageChops

from hf_segvit.data.generated_scenes import generate_scene, scene_labels
from hf_segvit.data.mask_files import MAX_ID, panoptic_png, read_color_ids
from hf_segvit.drawing import fonts
from hf_segvit.drawing import name_boxes as label_boxes
from hf_segvit.drawing.segments import contact_sheet, draw_segments, plot_curves, segment_colors

NAMES = {0: "cat", 1: "dog", 2: "grass"}


def rows(*labels, score=None):
    return [
        {"id": i, "label_id": label} | ({} if score is None else {"score": score}) for i, label in enumerate(labels)
    ]


@pytest.fixture
def boxes(monkeypatch):
    """Label boxes in the order in which they are placed."""
    placed = []
    place = label_boxes._free_box

    def record(*args):
        placed.append(place(*args))
        return placed[-1]

    monkeypatch.setattr(label_boxes, "_free_box", record)
    return placed


@pytest.fixture
def no_labels(monkeypatch):
    monkeypatch.setattr("hf_segvit.drawing.segments.draw_labels", lambda *args: None)


def test_tint_outline_and_void(no_labels):
    image = np.full((40, 60, 3), 100, dtype=np.uint8)
    segmentation = np.full((40, 60), -1)
    segmentation[:, :20], segmentation[:, 20:40] = 0, 1
    info = rows(2, 0)
    drawing = np.asarray(draw_segments(image, segmentation, info, NAMES, alpha=0.25)).astype(int)
    colors = segment_colors(info)
    for segment, column in ((0, 10), (1, 30)):
        # Blending rounds to a grey level.
        np.testing.assert_allclose(drawing[20, column], 75 + 0.25 * np.array(colors[segment]), atol=1)
    assert (drawing[:, 40:] == 100).all()
    for segment, column in ((0, 19), (1, 20), (1, 39)):
        assert (drawing[:, column] == colors[segment]).all()
    assert (drawing[:, 0] == drawing[:, 10]).all(), "the edge of the image is no outline"


def test_drawing_takes_tensors_arrays_and_images_alike():
    scene = generate_scene(1)
    names = scene_labels("easy")
    expected = draw_segments(scene.image, scene.segment_map, scene.segments, names)
    other = draw_segments(Image.fromarray(scene.image), torch.from_numpy(scene.segment_map), scene.segments, names)
    assert ImageChops.difference(expected, other).getbbox() is None
    assert expected.size == (96, 96)
    # Ids from 0 in the order of the rows need no look-up; any others do, and are drawn alike.
    shifted = [{**row, "id": row["id"] + 7} for row in scene.segments]
    assert [row["id"] for row in scene.segments] == list(range(len(scene.segments)))
    moved = np.where(scene.segment_map < 0, -1, scene.segment_map + 7)
    assert ImageChops.difference(expected, draw_segments(scene.image, moved, shifted, names)).getbbox() is None
    grey = draw_segments(Image.fromarray(scene.image).convert("L"), scene.segment_map, scene.segments, names)
    assert grey.mode == "RGB"


def test_input_is_left_alone_and_row_order_is_free():
    scene = generate_scene(2)
    before = scene.image.copy(), scene.segment_map.copy()
    shuffled = scene.segments[::-1]
    draw_segments(scene.image, scene.segment_map, shuffled, scene_labels("easy"))
    np.testing.assert_array_equal(scene.image, before[0])
    np.testing.assert_array_equal(scene.segment_map, before[1])


def test_scale_enlarges_without_moving(no_labels):
    segmentation = np.zeros((10, 12), dtype=int)
    segmentation[:, 6:] = 1
    drawing = np.asarray(draw_segments(np.zeros((10, 12, 3), np.uint8), segmentation, rows(0, 1), NAMES, scale=5))
    colors = segment_colors(rows(0, 1))
    assert drawing.shape == (50, 60, 3)
    assert (drawing[:, 29] == colors[0]).all()
    assert (drawing[:, 30] == colors[1]).all()


def test_colors_keep_their_label_and_differ():
    many = [{"id": i, "label_id": i} for i in range(12)]
    colors = list(segment_colors(many).values())
    distances = [np.abs(np.subtract(a, b)).max() for a, b in itertools.combinations(colors, 2)]
    assert min(distances) > 40
    assert segment_colors([{"id": 9, "label_id": 5}])[9] == colors[5]
    instances = segment_colors([{"id": i, "label_id": 3} for i in range(6)])
    assert len(set(instances.values())) == 6
    hues = [colorsys.rgb_to_hsv(*(value / 255 for value in color))[0] for color in instances.values()]
    assert max(abs((hue - hues[0] + 0.5) % 1 - 0.5) for hue in hues) < 0.12
    assert all(isinstance(value, int) and 0 <= value <= 255 for color in colors for value in color)


def test_label_stands_at_the_innermost_point(boxes):
    # A big square with a long, thin arm: the middle of the bounding box is outside the segment.
    segmentation = np.full((300, 400), -1)
    segmentation[150:290, 240:390] = 0
    segmentation[150:155, :240] = 0
    draw_segments(np.zeros((300, 400, 3), np.uint8), segmentation, rows(0, score=0.5), NAMES)
    (box,) = boxes
    np.testing.assert_allclose([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], [315, 220], atol=8)


def test_labels_do_not_hide_one_another(boxes):
    # 5 x 4 small segments in the middle, closer than their labels are large.
    segmentation = np.full((480, 640), -1)
    for number, (row, column) in enumerate(itertools.product(range(4), range(5))):
        segmentation[200 + 16 * row :, 260 + 26 * column :][:12, :20] = number
    draw_segments(np.zeros((480, 640, 3), np.uint8), segmentation, rows(*[0] * 20, score=0.5), NAMES)
    assert len(boxes) == 20
    for one, other in itertools.combinations(boxes, 2):
        assert (np.minimum(one[2:], other[2:]) <= np.maximum(one[:2], other[:2])).any()
    corners = np.array(boxes)
    assert corners.min() >= 0
    assert (corners[:, 2:] < [640, 480]).all()


def test_labels_without_a_free_place_are_left_out(boxes):
    # Room for three lines of text, and one label a line.
    segmentation = np.arange(8).repeat(5)[:, None].repeat(60, axis=1)
    draw_segments(np.zeros((40, 60, 3), np.uint8), segmentation, rows(*[0] * 8, score=0.5), NAMES)
    assert len(boxes) == 8
    assert sum(box is not None for box in boxes) == 2


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (1, 300), (300, 1), (24, 32)])
def test_tiny_images(size):
    segmentation = np.zeros(size, dtype=int)
    segmentation[-1, -1] = 1
    info = rows(0, 1, score=0.987)[: segmentation.max() + 1]
    if segmentation.min() == 1:
        segmentation, info = segmentation - 1, rows(1)
    drawing = draw_segments(np.zeros((*size, 3), np.uint8), segmentation, info, NAMES)
    assert drawing.size == size[::-1]


def test_letters_grow_with_the_image(boxes):
    for side in (100, 400, 2000):
        segmentation = np.zeros((side, side), np.int32)
        draw_segments(np.zeros((side, side, 3), np.uint8), segmentation, rows(0), NAMES)
    heights = [box[3] - box[1] for box in boxes]
    assert heights[1] == pytest.approx(400 / 30 * 1.5, abs=2)
    assert heights[2] == pytest.approx(2000 / 30 * 1.5, abs=2)
    assert heights[0] >= 13


def test_text_is_drawn_and_long_names_are_cut(boxes):
    drawings = {
        name: draw_segments(np.zeros((200, 200, 3), np.uint8), np.zeros((200, 200), int), rows(0), {0: name})
        for name in ("cat", "dog", "a very long name " * 20, "two\nlines")
    }
    assert ImageChops.difference(drawings["cat"], drawings["dog"]).getbbox() is not None
    assert all(box[0] >= 0 and box[2] <= 200 for box in boxes)
    assert boxes[2][2] - boxes[2][0] > 150
    assert len({round(box[3] - box[1]) for box in boxes}) == 1, "every label is one line"


def test_hidden_rows_and_empty_images_are_fine(boxes):
    image = np.full((30, 30, 3), 9, dtype=np.uint8)
    assert (np.asarray(draw_segments(image, np.full((30, 30), -1), [], NAMES)) == 9).all()
    draw_segments(image, np.zeros((30, 30), int), rows(0, 1), NAMES)
    assert len(boxes) == 1


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros((4, 5), int), rows(0)), {}, r"image is 4 x 4 but the segmentation 4 x 5 .*target_sizes"),
        ((np.zeros((1, 4, 4), int), rows(0)), {}, r"shape \(1, 4, 4\)"),
        ((np.full((4, 4), 3), rows(0)), {}, r"ids \[3\] that segments_info has no row for"),
        ((np.zeros((4, 4), int), rows(7)), {}, "label_id 7, which id2label has no name for"),
        ((np.zeros((4, 4), int), rows(0)), {"alpha": 1.5}, "alpha is 1.5"),
        ((np.zeros((4, 4), int), rows(0)), {"scale": 0}, "scale is 0"),
    ],
)
def test_bad_drawings_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        draw_segments(np.zeros((4, 4, 3), np.uint8), *arguments, NAMES, **options)


def test_contact_sheet_places_every_panel():
    red, wide, blue = (
        Image.new("RGB", size, c) for size, c in (((40, 40), "red"), ((80, 20), "lime"), ((20, 40), "blue"))
    )
    sheet = contact_sheet([[red, wide], [blue]], panel_size=(100, 100))
    pixels = np.asarray(sheet).astype(int)
    counts = {name: (pixels == rgb).all(-1).sum() for name, rgb in (("r", (255, 0, 0)), ("b", (0, 0, 255)))}
    assert counts == {"r": 100 * 100, "b": 50 * 100}
    assert (pixels == (0, 255, 0)).all(-1).sum() == 100 * 25
    red_place, lime_place, blue_place = (
        np.argwhere((pixels == rgb).all(-1)).mean(0) for rgb in ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    )
    assert abs(red_place[0] - lime_place[0]) <= 0.5, "rows are centred"
    assert abs(red_place[1] - blue_place[1]) <= 0.5, "columns are centred"
    assert red_place[1] < lime_place[1]
    assert red_place[0] < blue_place[0]
    titled = contact_sheet([[red, wide], [blue]], ["input", "truth"], row_titles=["one", "two"], panel_size=(100, 100))
    assert titled.height > sheet.height
    assert titled.width == sheet.width
    assert (np.asarray(titled)[: (titled.height - sheet.height) // 3] < 128).any(), "titles are written above"


@pytest.mark.parametrize(
    ("panels", "titles", "message"),
    [
        ([], (), "no image to lay out"),
        ([[]], (), "no image to lay out"),
        ([[Image.new("RGB", (9, 9))]], ("a", "b"), "2 column_titles for 1 columns"),
    ],
)
def test_bad_sheets_are_named(panels, titles, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(panels, titles)


def test_curves_are_drawn_without_global_state(tmp_path):
    history = {
        "loss/train": [(step, 10 / (step + 1)) for step in range(120)],
        "loss/val": [(0, 9.0), (60, 2.0), (119, float("nan"))],
        "pq": [(60, 0.3), (119, 0.5)],
        "empty": [],
    }
    plot_curves(history, tmp_path / "curves.png", title="demo")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert pixels.shape[1] > 3 * pixels.shape[0] * 0.8, "three panels in a row"
    colorful = np.ptp(pixels.astype(int), axis=-1) > 80
    assert colorful.sum() > 500
    # From another thread, and to a vector file.
    thread = threading.Thread(target=plot_curves, args=({"loss": [(1, 2.0)]}, tmp_path / "curve.svg"))
    thread.start()
    thread.join()
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    import matplotlib.pyplot

    assert matplotlib.pyplot.get_fignums() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.svg", "curves.png"]


def test_noisy_curves_are_smoothed_to_their_ends_and_exact_ones_stay(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).normal(size=200)
    noise[-1] = 40.0  # an outlier at the end, which a window that shrinks to one point would end in
    schedule = np.linspace(0, 1, 200) ** 9
    drawn = {}

    def record(axes, steps, values, label=None, **style):
        drawn[label or "raw"] = np.asarray(values)
        return plot(axes, steps, values, label=label, **style)

    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", record)
    history = {"loss": list(enumerate(noise)), "learning rate/rest": list(enumerate(schedule))}
    plot_curves(history, tmp_path / "curves.png", exact=("learning rate",))
    # A tenth of 200 points is 10 on either side.
    naive = [noise[max(0, place - 10) : place + 11].mean() for place in range(200)]
    np.testing.assert_allclose(drawn["loss"], naive, atol=1e-12)  # a cumulative sum rounds differently
    np.testing.assert_array_equal(drawn["raw"], noise)
    np.testing.assert_array_equal(drawn["rest"], schedule)


def test_axes_have_no_offset(tmp_path):
    history = {"memory in MiB": [(step, 1425 + step / 1000) for step in range(60)]}
    plot_curves(history, tmp_path / "curves.svg", exact=("memory in MiB",))
    # Text in an SVG is in comments beside its outlines.
    texts = re.findall(r"<!-- (.*) -->", (tmp_path / "curves.svg").read_text())
    assert "1425.00" in texts
    assert not [text for text in texts if text.startswith("+")]


def test_bad_curves_are_named(tmp_path):
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_curves({"loss": []}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"cannot write .*missing.*No such file"):
        plot_curves({"loss": [(1, 2.0)]}, tmp_path / "missing" / "a.png")


def read_panoptic_png(path):
    """(H, W) ids of a COCO panoptic PNG, less one so that void is -1."""
    return read_color_ids({"archive": None, "member": str(path)}) - 1


def test_panoptic_png_round_trip(tmp_path):
    ids = np.array([[-1, 0, 1, 255], [256, 65535, 65536, MAX_ID]])
    path = tmp_path / "ids.png"
    for segmentation in (ids, torch.from_numpy(ids), ids.astype(np.int32).T.copy().T):
        panoptic_png(segmentation, path)
        np.testing.assert_array_equal(read_panoptic_png(path), ids)
    rgb = np.asarray(Image.open(path)).astype(int)
    np.testing.assert_array_equal(rgb @ [1, 256, 65536], ids + 1)
    assert read_panoptic_png(path).dtype == np.int32
    assert [p.name for p in tmp_path.iterdir()] == ["ids.png"]


def test_bad_panoptic_pngs_are_named(tmp_path):
    for segmentation, message in (
        (np.array([[MAX_ID + 1]]), "do not fit"),
        (np.array([[-2]]), "do not fit"),
        (np.zeros((2, 2)), "integer id map"),
        (np.zeros((1, 2, 2), int), r"shape \(1, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            panoptic_png(segmentation, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"cannot write .*missing.*No such file"):
        panoptic_png(np.zeros((2, 2), int), tmp_path / "missing" / "a.png")
    Image.new("L", (3, 3)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"grey\.png: a mask of mode L"):
        read_panoptic_png(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png: not an image"):
        read_panoptic_png(tmp_path / "broken.png")


def test_real_annotations_read_as_their_rows_say(sample_data):
    import json

    folder = sample_data / "panoptic_sample"
    for annotation in json.loads((folder / "panoptic_examples.json").read_text())["annotations"]:
        ids = read_panoptic_png(folder / "panoptic_examples" / annotation["file_name"])
        areas = {row["id"] - 1: row["area"] for row in annotation["segments_info"]}
        found = {int(i): int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True) if i >= 0}
        assert found == areas


def test_a_font_file_gives_letters_that_the_system_lacks(tmp_path, monkeypatch):
    """A font with one Chinese character, by the setting and by its folder."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000, isTTF=True)
    pen_class = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen
    glyphs = {}
    for name, side in ((".notdef", 300), ("space", 0), ("dot", 200), ("han", 900)):
        pen = pen_class(None)
        if side:
            pen.moveTo((50, 0))
            for point in ((50, side), (side, side), (side, 0)):
                pen.lineTo(point)
            pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({0x20: "space", 0x2E: "dot", 0x2026: "dot", 0x9F98: "han"})  # the rare 龘
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "One", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    (tmp_path / "fonts").mkdir()
    path = tmp_path / "fonts" / "one.ttf"
    builder.save(path)
    letter = chr(0x9F98)
    monkeypatch.delenv(fonts.VARIABLE, raising=False)
    monkeypatch.setattr(fonts, "_fontconfig_files", lambda letters: [])
    monkeypatch.setattr(fonts, "_FOLDERS", (str(tmp_path / "empty"),))
    for cached in (fonts._system_font, fonts._folder_files):
        cached.cache_clear()
    assert fonts.drawable(letter, "class 1") == "class 1"
    fonts.use_font(path)
    try:
        assert fonts.drawable(letter, "class 1") == letter
        assert str(fonts.font_of(letter, 20).path) == str(path)
        ids = np.zeros((80, 120), int)
        drawn = draw_segments(np.zeros((80, 120, 3), np.uint8), ids, [{"id": 0, "label_id": 0}], {0: letter})
        other = draw_segments(np.zeros((80, 120, 3), np.uint8), ids, [{"id": 0, "label_id": 0}], {0: "class 0"})
        assert (np.asarray(drawn) != np.asarray(other)).any()
    finally:
        fonts.use_font(None)
    # Without the setting, it is found in a folder of fonts.
    monkeypatch.setattr(fonts, "_FOLDERS", (str(tmp_path / "fonts"),))
    for cached in (fonts._system_font, fonts._folder_files):
        cached.cache_clear()
    assert str(fonts.font_of(letter, 20).path) == str(path)
    for cached in (fonts._system_font, fonts._folder_files):
        cached.cache_clear()
