"""Semantic maps: tiles and class pruning against the plain formula, and windows against merging whole images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_segvit.models import mask_resampling
from hf_segvit.models.image_geometry import windowed_content_size, windows_of
from hf_segvit.models.image_post_processing import semantic_segments, semantic_segments_from_windows

from .plain_post_processing import cases, plain_semantic_scores

TOLERANCE = 2e-5  # of sums over up to 9 queries of probabilities, whose logits carry float32 rounding


def assert_best_class(segmentation, scores):
    """Every pixel has a class whose score is the largest up to rounding."""
    assert segmentation.dtype == torch.int64
    chosen = scores.gather(0, segmentation[None])[0]
    assert ((scores.amax(0) - chosen) <= TOLERANCE * (1 + scores.amax())).all()


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases(kinds=["noise", "mixed scales", "all low", "all high", "tiny", "constant", "blobs"]), st.integers(3, 70))
def test_follows_the_plain_formula(case, tile_pixels):
    expected = plain_semantic_scores(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_resampling, "TILE_PIXELS", tile_pixels)
        arguments = (case.class_logits, case.mask_logits, [case.target_size])
        pruned = semantic_segments(*arguments, **case.geometry)[0]
        full, scores = semantic_segments(*arguments, **case.geometry, return_segmentation_scores=True)[0]
    slack = TOLERANCE + 1e-6 * float(case.mask_logits.abs().max())
    torch.testing.assert_close(scores, expected, atol=slack, rtol=0)
    assert torch.equal(full, scores.argmax(0))
    assert_best_class(pruned, scores)


def test_ties_go_to_the_first_class():
    class_logits = torch.tensor([[[0.0, 2.0, 2.0, 1.0]]])
    result = semantic_segments(class_logits, torch.randn(1, 1, 4, 4), [(5, 7)])[0]
    assert torch.equal(result, torch.ones(5, 7, dtype=torch.int64))


def plain_windows(class_logits, mask_logits, windows, image_sizes, target_sizes, size):
    """Whole score maps of all windows, summed into whole images, divided by the coverage, resized."""
    masks = F.interpolate(mask_logits, size=size, mode="bilinear").sigmoid()
    scores = torch.einsum("nqc,nqhw->nchw", class_logits.softmax(-1)[..., :-1], masks)
    answers = []
    for image, (image_size, target) in enumerate(zip(image_sizes, target_sizes, strict=True)):
        total, count = torch.zeros(scores.shape[1], *image_size), torch.zeros(image_size)
        for score, (owner, start, end) in zip(scores, windows, strict=True):
            if owner == image:
                place = (
                    (slice(start, end), slice(None))
                    if image_size[0] > image_size[1]
                    else (slice(None), slice(start, end))
                )
                total[:, *place] += score
                count[place] += 1
        answers.append(F.interpolate((total / count)[None], size=target, mode="bilinear")[0])
    return answers


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=3),
    st.integers(2, 20),
    st.integers(3, 70),
    st.integers(0, 2**31),
)
def test_windows_are_averaged(target_sizes, side, tile_pixels, seed):
    generator = torch.Generator().manual_seed(seed)
    image_sizes = [windowed_content_size(size, (side, side)) for size in target_sizes]
    windows = windows_of(image_sizes, (side, side))
    class_logits = 3 * torch.randn(len(windows), 5, 8, generator=generator)
    mask_logits = 5 * torch.randn(len(windows), 5, 6, 6, generator=generator)
    expected = plain_windows(class_logits, mask_logits, windows, image_sizes, target_sizes, (side, side))
    arguments = (class_logits, mask_logits, windows, image_sizes, target_sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_resampling, "TILE_PIXELS", tile_pixels)
        maps = semantic_segments_from_windows(*arguments, window_size=side)
        scored = semantic_segments_from_windows(*arguments, window_size=(side, side), return_segmentation_scores=True)
    for segmentation, (full, scores), reference in zip(maps, scored, expected, strict=True):
        torch.testing.assert_close(scores, reference, atol=TOLERANCE, rtol=0)
        assert torch.equal(full, scores.argmax(0))
        assert_best_class(segmentation, scores)


def test_windows_without_target_sizes_answer_at_the_scaled_size():
    windows, image_sizes = [(0, 0, 8), (0, 5, 13)], [(13, 8)]
    maps = semantic_segments_from_windows(
        torch.randn(2, 3, 4), torch.randn(2, 3, 4, 4), torch.tensor(windows), image_sizes, None, window_size=8
    )
    assert [tuple(segmentation.shape) for segmentation in maps] == [(13, 8)]


def test_without_input_size_scores_are_computed_on_the_cells():
    class_logits, mask_logits = torch.randn(1, 5, 4), 4 * torch.randn(1, 5, 6, 7)
    scores = torch.einsum("bqc,bqhw->bchw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())
    assert torch.equal(semantic_segments(class_logits, mask_logits, None)[0], scores[0].argmax(0))
    resized = F.interpolate(scores, size=(20, 15), mode="bilinear")[0]
    answer, given_scores = semantic_segments(class_logits, mask_logits, [(20, 15)], return_segmentation_scores=True)[0]
    torch.testing.assert_close(given_scores, resized, atol=TOLERANCE, rtol=0)
    assert torch.equal(answer, given_scores.argmax(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_compute_in_float32(dtype):
    class_logits, mask_logits = torch.randn(1, 5, 4).to(dtype), (4 * torch.randn(1, 5, 6, 7)).to(dtype)
    expected = semantic_segments(class_logits.float(), mask_logits.float(), [(20, 15)], input_size=(24, 28))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(semantic_segments(class_logits, mask_logits, [(20, 15)], input_size=(24, 28))[0], expected)


@pytest.mark.parametrize(
    ("windows", "targets", "message"),
    [
        ([(0, 0, 8)], [(13, 8)], "1 windows for 2 predictions"),
        ([(0, 0, 8), (0, 0, 8)], [(13, 8)], "no window covers rows from 8 on"),
        ([(0, 5, 13), (0, 5, 13)], [(13, 8)], "no window covers rows from 0 on"),
        ([(0, 0, 8), (0, 5, 13)], [(13, 8)] * 2, "target_sizes has 2 rows for 1 images"),
    ],
)
def test_windows_that_do_not_fit(windows, targets, message):
    with pytest.raises(ValueError, match=message):
        semantic_segments_from_windows(
            torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 4), windows, [(13, 8)], targets, window_size=8
        )
