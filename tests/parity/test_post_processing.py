"""Post-processing against transformers' EoMT image processor, pixel for pixel where its rule is the official one.

It is not: where the won share of a mask equals the threshold (it drops, the official code keeps), in overlapping
instances (it paints in query order, we in score order) and in the number of instances (it takes one class of every
query, we the best 100 pairs). Its empty results have another dtype.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.eomt.image_processing_eomt import EomtImageProcessor

from hf_segvit.models.image_post_processing import (
    instance_segments,
    panoptic_segments,
    semantic_segments,
    semantic_segments_from_windows,
)

from ..plain_post_processing import (
    KINDS,
    Case,
    cases,
    mask_family,
    near,
    plain_panoptic,
    rounding,
    same_rows,
    score_tolerance,
    upsample,
)


def in_upstreams_geometry(case: Case) -> Case:
    """Upstream derives the content's size from the target's."""
    side = case.input_size[0]
    content = tuple(get_size_with_aspect_ratio(case.target_size, side, side))
    assume(min(content) >= 1 and max(content) <= side)
    return Case(case.class_logits, case.mask_logits, case.input_size, content, case.target_size)


def upstream_answer(task: str, case: Case, **options):
    processor = EomtImageProcessor(size={"shortest_edge": case.input_size[0], "longest_edge": case.input_size[1]})
    outputs = SimpleNamespace(
        class_queries_logits=case.class_logits, masks_queries_logits=case.mask_logits, patch_offsets=[]
    )
    return getattr(processor, f"post_process_{task}_segmentation")(outputs, [case.target_size], **options)[0]


def assert_panoptic_equal(case: Case, threshold: float, overlap: float, stuff: list[int]) -> None:
    # The plain rule only tells which pixels, and whether a whole segment, depend on rounding.
    _, _, doubtful, fragile = plain_panoptic(case, threshold, 0.5, overlap, set(stuff))
    assume(not fragile)
    options = {"threshold": threshold, "overlap_mask_area_threshold": overlap, "stuff_classes": stuff}
    theirs = upstream_answer("panoptic", case, **options)
    ours = panoptic_segments(case.class_logits, case.mask_logits, [case.target_size], **case.geometry, **options)[0]
    assert same_rows(ours["segments_info"], theirs["segments_info"])
    assert torch.equal(ours["segmentation"][~doubtful], theirs["segmentation"].int()[~doubtful])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    cases(square_input=True),
    st.sampled_from([0.0, 0.3, 0.8]),
    # No fraction of small areas equals these, so that "<" and "<=" agree.
    st.sampled_from([0.0123, 0.5123, 0.8123]),
    st.lists(st.integers(0, 5), unique=True),
)
def test_panoptic(case, threshold, overlap, stuff):
    assert_panoptic_equal(in_upstreams_geometry(case), threshold, overlap, stuff)


def assert_instances_equal(case: Case, threshold: float, allowed_doubts: float = 0.0) -> None:
    """Rows are equal; so are pixels that exactly one mask covers."""
    theirs = upstream_answer("instance", case, threshold=threshold)
    ours = instance_segments(
        case.class_logits,
        case.mask_logits,
        [case.target_size],
        **case.geometry,
        threshold=threshold,
        return_binary_maps=True,
    )[0]
    doubtful = near(upsample(case.mask_logits[0], case), 0.5, rounding(case)).any(0)
    assume(all(abs(row["score"] - threshold) > 1e-5 for row in theirs["segments_info"]))
    assume(float(doubtful.float().mean()) <= allowed_doubts)
    # A pixel more or less in a mask shows in its mean probability, above all in that of a small mask.
    assert same_rows(ours["segments_info"], theirs["segments_info"], 1e-3 if doubtful.any() else score_tolerance(case))
    masks = ours["segmentation"]
    alone = masks.sum(0) == 1
    ids = torch.where(alone, masks.int().argmax(0), -1) if len(masks) else torch.full(case.target_size, -1)
    sure = (alone | ~masks.any(0)) & ~doubtful
    assert torch.equal(ids[sure], theirs["segmentation"].long()[sure])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases(square_input=True), st.sampled_from([0.5001, 0.8]))
def test_instances_where_no_query_gives_two(case, threshold):
    assert_instances_equal(in_upstreams_geometry(case), threshold)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 7.0, 1e4]), st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_id_maps_of_instances_that_do_not_overlap(seed, scale, target):
    """Each cell belongs to one query, and interpolation makes at most one of them positive."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, 6, (8, 8), generator=generator)
    masks = torch.where(owner == torch.arange(6)[:, None, None], scale, -1.03 * scale)
    class_logits = torch.zeros(6, 5)
    class_logits[torch.arange(6), torch.randint(0, 5, (6,), generator=generator)] = 6.0
    case = in_upstreams_geometry(Case(class_logits[None], masks[None], (32, 32), (32, 32), target))
    doubtful = near(upsample(case.mask_logits[0], case), 0.5, rounding(case)).any(0)
    assume(not doubtful.any())
    theirs = upstream_answer("instance", case, threshold=0.51)
    ours = instance_segments(case.class_logits, case.mask_logits, [case.target_size], **case.geometry, threshold=0.51)[
        0
    ]
    assert torch.equal(ours["segmentation"], theirs["segmentation"].int())
    assert same_rows(ours["segments_info"], theirs["segments_info"], score_tolerance(case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [(48, 64), (67, 113), (300, 225)])
def test_many_queries_of_every_kind(kind, target):
    generator = torch.Generator().manual_seed(0)
    class_logits = 4 * torch.randn(1, 60, 20, generator=generator)
    masks = mask_family(kind, 60, (40, 40), generator)
    content = tuple(get_size_with_aspect_ratio(target, 160, 160))
    case = Case(class_logits, masks[None], (160, 160), content, target)
    _, _, doubtful, fragile = plain_panoptic(case, 0.5, 0.5, 0.0123, {1, 2})
    if not fragile:
        options = {"threshold": 0.5, "overlap_mask_area_threshold": 0.0123, "stuff_classes": [1, 2]}
        theirs = upstream_answer("panoptic", case, **options)
        ours = panoptic_segments(class_logits, masks[None], [target], **case.geometry, **options)[0]
        assert same_rows(ours["segments_info"], theirs["segments_info"])
        assert torch.equal(ours["segmentation"][~doubtful], theirs["segmentation"].int()[~doubtful])
    assert_instances_equal(case, 0.5001, allowed_doubts=0.02)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(kinds=["noise", "tiny", "blobs"], square_input=True))
def test_semantic(case):
    """Upstream does not crop padding here, so the image fills the input."""
    whole = {"input_size": case.input_size}
    theirs = upstream_answer("semantic", case, return_segmentation_scores=True)
    [(ours, scores)] = semantic_segments(
        case.class_logits, case.mask_logits, [case.target_size], **whole, return_segmentation_scores=True
    )
    torch.testing.assert_close(scores, theirs["segmentation_scores"], atol=2e-5, rtol=0)
    best = scores.topk(min(2, len(scores)), 0).values
    clear = best[0] - best[-1] > 1e-4 if len(best) == 2 else torch.ones_like(ours, dtype=torch.bool)
    assert torch.equal(ours[clear], theirs["segmentation"][clear])


@pytest.mark.parametrize("sizes", [[(40, 97)], [(97, 40)], [(64, 64)], [(33, 90), (81, 37), (50, 50)]])
def test_semantic_windows(sizes):
    processor = EomtImageProcessor(size={"shortest_edge": 32, "longest_edge": None}, do_split_image=True, do_pad=False)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    inputs = processor(images, return_tensors="pt")
    windows = inputs["patch_offsets"]
    class_logits, masks = 3 * torch.randn(len(windows), 10, 8), 5 * torch.randn(len(windows), 10, 8, 8)
    outputs = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=masks, patch_offsets=windows)
    theirs = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    scaled = [get_size_with_aspect_ratio(size, 32, None) for size in sizes]
    arguments = (class_logits, masks, windows, scaled, sizes)
    with_scores = semantic_segments_from_windows(*arguments, window_size=32, return_segmentation_scores=True)
    for (_, scores), segmentation, other in zip(
        with_scores, semantic_segments_from_windows(*arguments, window_size=32), theirs, strict=True
    ):
        torch.testing.assert_close(scores, other["segmentation_scores"], atol=2e-5, rtol=0)
        best = scores.topk(2, 0).values
        clear = best[0] - best[1] > 1e-4
        assert torch.equal(segmentation[clear], other["segmentation"][clear])
        assert clear.float().mean() > 0.9
