"""Drawings: what is tinted, outlined, labelled and written, checked pixel by pixel where it can be."""

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
from hf_segvit.drawing.colors import COLOR_VISIONS, class_color, segment_colors
from hf_segvit.drawing.segments import class_legend, contact_sheet, draw_segments, plot_curves

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
    monkeypatch.setattr("hf_segvit.drawing.segments.label_segments", lambda *args: set())


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


def oklab_distances(colors, vision):
    """(N, N) distances of sRGB colours as seen with a kind of colour vision."""
    rgb = np.array(colors) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ COLOR_VISIONS[vision].T, 0, 1)
    # Linear sRGB to OKLab by Ottosson's own forward matrices; the code inverts the backward ones.
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    lab = np.cbrt(linear @ np.transpose(to_cones)) @ np.transpose(to_lab)
    return np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(len(lab))


@pytest.mark.parametrize("vision", COLOR_VISIONS)
def test_classes_look_different_to_everyone(vision):
    colors = [class_color(label) for label in range(133)]
    distances = oklab_distances(colors, vision)
    # 0.02 is a difference that is just noticed in flat patches beside one another.
    assert distances[:12, :12].min() > 0.075
    assert distances[:20, :20].min() > 0.06
    assert distances[:40, :40].min() > 0.045
    assert min(distances[label, label + 8] for label in range(125)) > 0.04


def test_colors_keep_their_label_and_differ():
    colors = [class_color(label) for label in range(256)]
    assert len({*colors}) == 256
    assert class_color(256 + 7) == class_color(7)
    assert segment_colors([{"id": 9, "label_id": 5}])[9] == colors[5]
    assert all(isinstance(value, int) and 0 <= value <= 255 for color in colors for value in color)
    for label in range(20):
        shades = [*segment_colors([{"id": i, "label_id": label} for i in range(6)]).values()]
        assert shades[0] == colors[label]
        distances = oklab_distances(shades, "normal")
        assert min(distances[i, i + 1] for i in range(5)) > 0.05
        assert distances[0].min() > 0.04


def test_label_stands_at_the_innermost_point(boxes):
    # A big square with a long, thin arm: the middle of the bounding box is outside the segment.
    segmentation = np.full((300, 400), -1)
    segmentation[150:290, 240:390] = 0
    segmentation[150:155, :240] = 0
    draw_segments(np.zeros((300, 400, 3), np.uint8), segmentation, rows(0, score=0.5), NAMES)
    (box,) = boxes
    np.testing.assert_allclose([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], [315, 220], atol=8)


def test_labels_lie_on_their_segments_and_never_on_one_another(boxes):
    # 4 x 3 segments with room for a name each, and one around them that has none.
    segmentation = np.zeros((480, 640), int)
    for number, (row, column) in enumerate(itertools.product(range(4), range(3)), start=1):
        segmentation[10 + 120 * row :, 10 + 212 * column :][:110, :200] = number
    draw_segments(np.zeros((480, 640, 3), np.uint8), segmentation, rows(*[0] * 13, score=0.5), NAMES)
    placed = np.array([box for box in boxes if box is not None])
    assert len(placed) == 12
    for one, other in itertools.combinations(placed, 2):
        assert (np.minimum(one[2:], other[2:]) <= np.maximum(one[:2], other[:2])).any()
    on = []
    for x0, y0, x1, y1 in placed.round().astype(int):
        ids, counts = np.unique(segmentation[y0:y1, x0:x1], return_counts=True)
        on.append(ids[counts.argmax()])
        assert counts.max() >= 0.8 * counts.sum()
    assert sorted(on) == [*range(1, 13)]


def test_small_segments_are_named_in_the_legend(boxes):
    segmentation = np.zeros((150, 200), int)
    segmentation[20:24, 30:36] = 1  # 24 pixels
    segmentation[60:64, 30:36] = 2
    image, info = np.full((150, 200, 3), 90, np.uint8), rows(2, 0, 0, score=0.5)
    without = draw_segments(image, segmentation, info, NAMES)
    assert without.size == (200, 150)
    assert len(boxes) == 1, "only grass has room"
    drawing = draw_segments(image, segmentation, info, NAMES, with_legend=True)
    assert drawing.width == 200
    assert 150 < drawing.height < 190
    assert ImageChops.difference(drawing.crop((0, 0, 200, 150)), without).getbbox() is None
    strip = np.asarray(drawing.crop((0, 150, *drawing.size)))
    assert (strip == class_color(0)).all(-1).any()
    assert not (strip == class_color(2)).all(-1).any(), "grass is named in the image"
    # Where all names have room there is no legend, nor without names.
    assert draw_segments(image, np.zeros((150, 200), int), rows(2), NAMES, with_legend=True).size == (200, 150)
    assert draw_segments(image, segmentation, info, NAMES, labels=False, with_legend=True).size == (200, 150)


def test_a_score_gives_way_to_its_name(boxes, monkeypatch):
    written = []
    monkeypatch.setattr(label_boxes, "_draw_box", lambda drawing, box, text, *rest: written.append(text))
    for width in (300, 32, 12):
        segmentation = np.full((300, 400), -1)
        segmentation[:200, :width] = 0
        draw_segments(np.zeros((300, 400, 3), np.uint8), segmentation, rows(2, score=0.5), NAMES)
    assert written == ["grass 0.50", "grass"]


def test_long_legends_are_cut_and_counted(monkeypatch):
    drawn = []
    monkeypatch.setattr(label_boxes.ImageDraw.ImageDraw, "text", lambda self, xy, text, **style: drawn.append(text))
    entries = {f"class number {number}": class_color(number) for number in range(200)}
    strip = label_boxes.legend(300, entries, 12)
    assert strip.size == (300, label_boxes.MAX_LEGEND_ROWS * 18 + 6)
    shown = len(drawn) - 1
    assert drawn[-1] == f"… and {200 - shown} more"
    assert drawn[:shown] == [*entries][:shown]


def test_a_sheet_has_one_legend_of_all_its_classes():
    panel = Image.new("RGB", (300, 200), "gray")
    entries = class_legend([rows(2, 0), rows(0, 1)], NAMES)
    assert entries == {name: class_color(label) for label, name in NAMES.items()}
    sheet, plain = contact_sheet([[panel]], entries=entries), contact_sheet([[panel]])
    assert ImageChops.difference(sheet.crop((0, 0, *plain.size)), plain).getbbox() is None
    strip = np.asarray(sheet.crop((0, plain.height, *sheet.size)))
    for color in entries.values():
        assert (strip == color).all(-1).sum() > 50


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


def test_text_is_drawn_on_one_line(boxes):
    drawings = {
        name: draw_segments(np.zeros((200, 200, 3), np.uint8), np.zeros((200, 200), int), rows(0), {0: name})
        for name in ("cat", "dog", "two\nlines")
    }
    assert ImageChops.difference(drawings["cat"], drawings["dog"]).getbbox() is not None
    assert len({round(box[3] - box[1]) for box in boxes}) == 1
    # A name that is wider than the image is for the legend, cut there.
    wide = draw_segments(
        np.zeros((200, 200, 3), np.uint8), np.zeros((200, 200), int), rows(0), {0: "long " * 99}, with_legend=True
    )
    assert wide.width == 200
    assert 205 < wide.height < 230
    assert boxes[3] is None


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


def test_panels_have_labels_and_columns_of_their_own(tmp_path):
    history = {group: [(0.0, 0.5), (1.0, 1.0)] for group in ("precision", "rate", "more precision", "more rates")}
    labels = {group: f"x of {group}" for group in history}
    plot_curves(history, tmp_path / "curves.svg", x_label=labels, columns=2)
    text = (tmp_path / "curves.svg").read_text()
    assert set(labels.values()) <= set(re.findall(r"<!-- (.*) -->", text))
    width, height = map(float, re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups())
    assert width / height == pytest.approx(2 * 4.6 / (2 * 3.1), rel=1e-3)


def test_axes_have_no_offset_and_do_not_magnify_rounding(tmp_path):
    history = {"memory in MiB": [(step, 1494.88 + step / 500) for step in range(60)]}
    plot_curves(history, tmp_path / "curves.svg", exact=("memory in MiB",))
    # Text in an SVG is in comments beside its outlines.
    texts = re.findall(r"<!-- (.*) -->", (tmp_path / "curves.svg").read_text())
    assert not [text for text in texts if text.startswith("+")]
    ticks = [float(text) for text in texts if re.fullmatch(r"1[45]\d\d(\.\d+)?", text)]
    assert max(ticks) - min(ticks) >= 0.015 * 1494


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
