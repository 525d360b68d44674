"""The sizes of the models are those of the paper: parameters exactly, multiply-adds as the benchmark prints them."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "model_sizes.py"


@pytest.fixture(scope="module")
def model_sizes():
    spec = importlib.util.spec_from_file_location("model_sizes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row_of(module, backbone, masked=False, image_size=640, **wanted):
    wanted = {"backbone": backbone, "masked": masked, "image_size": image_size, "removed": None, **wanted}
    return next(row for row in module.ROWS if all(getattr(row, name) == value for name, value in wanted.items()))


# Parameters of the official model with 133 classes and 200 queries.
@pytest.mark.parametrize(
    ("backbone", "parameters"), [("S", 23_975_942), ("B", 93_663_110), ("L", 316_695_686), ("g", 1_163_622_022)]
)
def test_parameters_are_exactly_those_of_the_official_model(model_sizes, backbone, parameters):
    assert model_sizes.count(row_of(model_sizes, backbone)).parameters == parameters


@pytest.mark.parametrize(("backbone", "masked", "paper"), [("S", False, 68), ("S", True, 89), ("B", False, 216)])
def test_multiply_adds_are_within_one_percent_of_the_paper(model_sizes, backbone, masked, paper):
    assert model_sizes.count(row_of(model_sizes, backbone, masked)).multiply_adds / 1e9 == pytest.approx(
        paper, rel=0.01
    )


def test_multiply_adds_are_those_of_a_count_by_hand(model_sizes):
    """ViT-S at 640: 12 blocks, the last 3 with queries, and the heads, from the shapes alone."""
    width, patches, queries = 384, 1600, 200
    tokens = patches + 5

    def block(count):
        return 12 * count * width**2 + 2 * count**2 * width  # projections and MLP; scores and weighted sums

    upscaling = sum(
        4 ** (step + 1) * patches * (width**2 + 9 * width) for step in range(2)
    )  # every cell from its parent, then 3 x 3 depth-wise
    heads = queries * width * (3 * width + 134) + queries * 16 * patches * width
    expected = 3 * 256 * width * patches + 9 * block(tokens) + 3 * block(tokens + queries) + upscaling + heads
    assert model_sizes.count(row_of(model_sizes, "S")).multiply_adds == expected


def test_windows_are_counted_as_the_image_processor_cuts_them(model_sizes):
    assert model_sizes.windows_of_images([(1024, 2048)], 1024) == 2
    assert model_sizes.windows_of_images([(512, 512), (512, 683), (1100, 500)], 512) == pytest.approx(2)


# Millions of parameters and 10^9 multiply-adds, as formulas give them, beside the paper's rounded ones.
LADDER = {
    "nothing": (348.7, 828.7, 830),
    "adapter": (342.3, 739.5, None),
    "pixel_decoder": (337.2, 686.0, 685),
    "multi_scale": (328.3, 673.3, 673),
}


@pytest.mark.slow
@pytest.mark.parametrize("removed", LADDER)
def test_rows_of_the_ladder_have_the_sizes_of_the_paper(model_sizes, removed):
    size = model_sizes.count(row_of(model_sizes, "L", removed=removed))
    millions, giga, paper = LADDER[removed]
    assert size.parameters / 1e6 == pytest.approx(millions, rel=0.0005)
    assert size.multiply_adds / 1e9 == pytest.approx(giga, rel=0.0005)
    if paper is None:  # the paper's 700 leaves out deformable attention
        assert (size.multiply_adds - size.deformable) / 1e9 == pytest.approx(702.8, rel=0.0005)
    else:
        assert size.multiply_adds / 1e9 == pytest.approx(paper, rel=0.01)


def test_the_smallest_baseline_has_the_size_of_the_paper(model_sizes):
    size = model_sizes.count(row_of(model_sizes, "S", removed="nothing"))
    assert size.parameters / 1e6 == pytest.approx(46.56, rel=0.0005)
    assert size.multiply_adds / 1e9 == pytest.approx(164.3, rel=0.0005)
    assert size.multiply_adds / 1e9 == pytest.approx(165, rel=0.01)


@pytest.mark.slow
def test_all_rows_are_within_the_tolerances(model_sizes, capsys):
    """Tables 1 to 6 and D, baseline and EoMT, at every size of backbone and input."""
    assert model_sizes.main([]) == 0
    printed = capsys.readouterr().out
    assert "739.5 /   700  1.056  702.8 without deformable attention: 1.004" in printed
    assert f"{len(model_sizes.ROWS)} of {len(model_sizes.ROWS)} rows within" in printed
