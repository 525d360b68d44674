"""Panoptic and instance segments: the tiled computation against the plain rules, and the contracts of the results."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from hf_segvit.models import mask_resampling
from hf_segvit.models.image_post_processing import instance_segments, panoptic_segments, semantic_segments

from .plain_post_processing import Case, cases, plain_instances, plain_panoptic, same_rows, score_tolerance

thresholds = st.sampled_from([0.0, 0.3, 0.5, 0.8])
mask_thresholds = st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])
# Small tiles, so that a small image has many; and the way of accelerators, which compute all masks in every tile.
routes = st.sampled_from([{"TILE_PIXELS": 4}, {"TILE_PIXELS": 11}, {"TILE_PIXELS": 64}, {"prunable": False}])


def on_route(route, function, *arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        if "prunable" in route:
            patch.setattr(mask_resampling.MaskTiles, "prunable", False)
            patch.setattr(mask_resampling, "matmul", torch.matmul)
        else:
            patch.setattr(mask_resampling, "TILE_PIXELS", route["TILE_PIXELS"])
            patch.setattr(mask_resampling, "_SERIAL_VALUES", 60)  # several strips a tile
        return function(*arguments, **options)


def example_image(masks, labels, num_classes=3, score_logit=20.0, scores=None):
    """Logits with the given labels and mask logits (Q, h, w); input and answer have the size of the masks."""
    masks = torch.as_tensor(masks, dtype=torch.float32)
    class_logits = torch.zeros(1, len(labels), num_classes + 1)
    for query, label in enumerate(labels):
        if scores is None:
            class_logits[0, query, label] = score_logit
        else:
            rest = (1 - scores[query]) / num_classes
            class_logits[0, query] = torch.full((num_classes + 1,), rest).log()
            class_logits[0, query, label] = np.log(scores[query])
    return Case(class_logits, masks[None], *[tuple(masks.shape[1:])] * 3)


def panoptic(case, **options):
    return panoptic_segments(case.class_logits, case.mask_logits, [case.target_size], **case.geometry, **options)[0]


def instances(case, **options):
    return instance_segments(case.class_logits, case.mask_logits, [case.target_size], **case.geometry, **options)[0]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cases(), thresholds, mask_thresholds, st.sampled_from([0.0, 0.5, 0.8, 1.0]), st.sets(st.integers(0, 5)), routes)
def test_panoptic_follows_the_plain_rule(case, threshold, mask_threshold, overlap, stuff, route):
    ids, rows, doubtful, fragile = plain_panoptic(case, threshold, mask_threshold, overlap, stuff)
    assume(not fragile)
    result = on_route(
        route,
        panoptic,
        case,
        threshold=threshold,
        mask_threshold=mask_threshold,
        overlap_mask_area_threshold=overlap,
        stuff_classes=stuff,
    )
    assert same_rows(result["segments_info"], rows)
    assert result["segmentation"].dtype == torch.int32
    assert torch.equal(result["segmentation"][~doubtful], ids[~doubtful])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(), thresholds, mask_thresholds, st.sampled_from([1, 3, 100]), routes)
def test_instances_follow_the_plain_rule(case, threshold, mask_threshold, num_instances, route):
    rows, masks, doubtful, fragile = plain_instances(case, num_instances, threshold, mask_threshold)
    assume(not fragile)
    options = {"threshold": threshold, "mask_threshold": mask_threshold, "num_instances": num_instances}
    result = on_route(route, instances, case, **options, return_binary_maps=True)
    doubt_share = doubtful.flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(min=1)
    assert same_rows(result["segments_info"], rows, score_tolerance(case) + float(doubt_share.sum()))
    assert result["segmentation"].dtype == torch.bool
    assert result["segmentation"].shape == masks.shape
    assert torch.equal(result["segmentation"] & ~doubtful, masks & ~doubtful)

    encoded = on_route(route, instances, case, **options, return_coco_annotation=True)
    assert encoded["segments_info"] == result["segments_info"]
    decoded = [coco_mask.decode(rle) for rle in encoded["segmentation"]]
    np.testing.assert_array_equal(np.reshape(decoded, masks.shape), result["segmentation"])

    painted = on_route(route, instances, case, **options)
    order = sorted(result["segments_info"], key=lambda row: row["score"])
    assume(all(b["score"] - a["score"] > 2e-6 for a, b in pairwise(order)))
    expected = torch.full(case.target_size, -1, dtype=torch.int32)
    for row in order:
        expected[result["segmentation"][row["id"]]] = row["id"]
    visible = [row for row in result["segments_info"] if (expected == row["id"]).any()]
    new_ids = {row["id"]: number for number, row in enumerate(visible)}
    assert painted["segments_info"] == [{**row, "id": new_ids[row["id"]]} for row in visible]
    assert painted["segmentation"].dtype == torch.int32
    assert torch.equal(painted["segmentation"], expected.apply_(lambda value: new_ids.get(value, -1)))


def test_realistic_sizes_on_default_tiles():
    """200 queries, 160 x 160 cells, an image that is no multiple of anything."""
    generator = torch.Generator().manual_seed(0)
    case = Case(
        class_logits=3 * torch.randn(1, 200, 21, generator=generator),
        mask_logits=torch.nn.functional.interpolate(
            8 * torch.randn(1, 200, 12, 12, generator=generator) - 4, size=(160, 160), mode="bicubic"
        ),
        input_size=(640, 640),
        content_size=(427, 640),
        target_size=(333, 501),
    )
    ids, rows, doubtful, _ = plain_panoptic(case, 0.5, 0.5, 0.2, {1, 2, 3})
    result = panoptic(case, threshold=0.5, overlap_mask_area_threshold=0.2, stuff_classes=[1, 2, 3])
    assert len(rows) > 5
    assert same_rows(result["segments_info"], rows)
    assert doubtful.float().mean() < 1e-3
    assert torch.equal(result["segmentation"][~doubtful], ids[~doubtful])

    rows, masks, doubtful, _ = plain_instances(case, 60, 0.4, 0.5)
    result = instances(case, num_instances=60, threshold=0.4, return_binary_maps=True)
    assert len(rows) > 20
    assert same_rows(result["segments_info"], rows, 1e-5)
    assert torch.equal(result["segmentation"] & ~doubtful, masks & ~doubtful)


# Hand-made images of a few pixels, where every number is exact.
HIGH, LOW = 30.0, -30.0
LEFT, RIGHT = [[HIGH, HIGH, LOW, LOW]], [[LOW, LOW, HIGH, HIGH]]


def test_fused_stuff_never_takes_the_id_of_something_else():
    """stuff, thing, stuff, thing: upstream Mask2Former answers ids 1, 2, 1, 2 here."""
    columns = [[[HIGH if column == query else LOW for column in range(4)]] for query in range(4)]
    result = panoptic(example_image(columns, [2, 0, 2, 1]), stuff_classes=[2])
    assert result["segmentation"].tolist() == [[0, 1, 0, 2]]
    assert [(row["id"], row["label_id"], row["was_fused"]) for row in result["segments_info"]] == [
        (0, 2, True),
        (1, 0, False),
        (2, 1, False),
    ]


def test_fused_segment_keeps_the_score_of_the_first_query():
    result = panoptic(example_image([LEFT, RIGHT], [2, 2], scores=[0.9, 0.95]), stuff_classes=[2])
    assert result["segmentation"].tolist() == [[0, 0, 0, 0]]
    assert result["segments_info"] == [{"id": 0, "label_id": 2, "was_fused": True, "score": 0.9}]


def test_things_of_one_class_stay_apart():
    result = panoptic(example_image([LEFT, RIGHT], [2, 2]))
    assert result["segmentation"].tolist() == [[0, 0, 1, 1]]
    assert [row["was_fused"] for row in result["segments_info"]] == [False, False]


def test_area_test_is_not_weighted_by_the_score():
    """Score 0.6 x mask 0.8 is below 0.5, the mask is not: upstream Mask2Former drops it."""
    case = example_image(np.full((1, 1, 4), np.log(0.8 / 0.2)), [1], scores=[0.6])
    assert panoptic(case, threshold=0.5)["segmentation"].tolist() == [[0, 0, 0, 0]]


def test_area_where_a_segment_is_largest_counts_below_the_mask_threshold_too():
    """Query 1 wins one pixel of its five, but is largest on four more that nobody's mask reaches: 5/5 stays."""
    first = [[HIGH] * 4 + [LOW] + [-1000.0] * 4]
    second = [[3.0] * 5 + [-2.0] * 4]
    case = example_image([first, second], [0, 1])
    assert panoptic(case)["segmentation"].tolist() == [[0, 0, 0, 0, 1, -1, -1, -1, -1]]
    case.mask_logits[0, 1, 0, 5:] = -1001.0
    case.mask_logits[0, 0, 0, 5:] = -1.0  # now query 0 is largest there
    assert panoptic(case)["segmentation"].tolist() == [[0, 0, 0, 0, -1, -1, -1, -1, -1]]


def test_area_includes_what_a_rival_covers():
    """Query 1 wins 4 pixels and reaches two more, in a tile where it cannot win: 4 / 6 < 0.7 <= 4 / 5."""
    for weak, survives in ((0.1, False), (-0.1, True)):
        first = [[LOW] * 4 + [5.0] * 4]
        second = [[HIGH] * 4 + [0.1, weak, -1.0, -1.0]]
        result = on_route(
            {"TILE_PIXELS": 4}, panoptic, example_image([first, second], [0, 1]), overlap_mask_area_threshold=0.7
        )
        assert result["segmentation"].tolist() == [([1] * 4 if survives else [-1] * 4) + [0] * 4]


def test_a_probability_at_the_mask_threshold_is_inside_for_panoptic_only():
    case = example_image([[[0.0, 1.0]]], [1])
    assert panoptic(case)["segmentation"].tolist() == [[0, 0]]
    assert instances(case)["segmentation"].tolist() == [[-1, 0]]


@pytest.mark.parametrize(("overlap", "survives"), [(0.75, True), (0.76, False), (0.0, True)])
def test_overlap_threshold_is_the_smallest_share_that_stays(overlap, survives):
    case = example_image([[[5.0, 5.0, 5.0, 5.0]], [[LOW, LOW, LOW, HIGH]]], [0, 1])
    ids = panoptic(case, overlap_mask_area_threshold=overlap)["segmentation"].tolist()
    assert ids == ([[0, 0, 0, 1]] if survives else [[-1, -1, -1, 0]])


def test_equal_queries_go_to_the_first():
    for low in (-5.0, -1000.0):  # -1000: probabilities underflow, so that the background is a tie too
        mask = [[low, 4.0, 4.0, low]]
        result = panoptic(example_image([mask, mask], [0, 1]))
        assert result["segmentation"].tolist() == [[-1, 0, 0, -1]]
        assert [row["label_id"] for row in result["segments_info"]] == [0]


def test_no_object_is_the_last_class_and_threshold_is_exclusive():
    assert panoptic(example_image([LEFT, RIGHT], [3, 1]))["segmentation"].tolist() == [[-1, -1, 0, 0]]
    case = example_image([LEFT], [1])
    score = float(case.class_logits[0].softmax(-1).max())
    assert panoptic(case, threshold=score)["segments_info"] == []
    assert len(panoptic(case, threshold=score - 1e-6)["segments_info"]) == 1


def test_one_query_gives_two_instances_and_the_hidden_one_has_no_id():
    case = example_image([LEFT], [1])
    case.class_logits[0, 0] = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()
    maps = instances(case, threshold=0.2, return_binary_maps=True)
    assert [(row["id"], row["label_id"], row["score"]) for row in maps["segments_info"]] == [(0, 0, 0.5), (1, 2, 0.3)]
    assert maps["segmentation"].tolist() == [[[True, True, False, False]]] * 2
    painted = instances(case, threshold=0.2)
    assert painted["segments_info"] == [{"id": 0, "label_id": 0, "was_fused": False, "score": 0.5}]
    assert painted["segmentation"].tolist() == [[0, 0, -1, -1]]


def test_better_instances_are_painted_over_worse_ones():
    wide, left = [[HIGH, HIGH, HIGH, LOW]], [[HIGH, HIGH, LOW, LOW]]
    for scores, expected in (([0.8, 0.9], [1, 1, 0, -1]), ([0.9, 0.8], [0, 0, 0, -1])):
        result = instances(example_image([wide, left], [0, 1], scores=scores))
        assert result["segmentation"].tolist() == [expected]
        assert len(result["segments_info"]) == len({value for value in expected if value >= 0})


def test_instance_score_is_class_times_mean_mask_probability():
    logits = torch.tensor([[[2.0, 1.0, -3.0, 0.5]]])
    row = instances(example_image(logits, [1], scores=[0.9]), threshold=0.1)["segments_info"][0]
    inside = torch.tensor([2.0, 1.0, 0.5]).sigmoid()
    assert row["score"] == pytest.approx(0.9 * float(inside.mean()), abs=1e-6)


@pytest.mark.parametrize("function", [panoptic_segments, instance_segments])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_empty_and_full_results_have_one_type(function, dtype):
    empty, full = example_image([LEFT], [3]), example_image([LEFT], [1])
    class_logits = torch.cat([empty.class_logits, full.class_logits]).to(dtype)
    mask_logits = torch.cat([empty.mask_logits, full.mask_logits]).to(dtype)
    results = function(class_logits, mask_logits, [(1, 4), (2, 8)], input_size=(1, 4))
    assert [result["segmentation"].dtype for result in results] == [torch.int32] * 2
    assert results[0]["segmentation"].tolist() == [[-1] * 4]
    assert results[0]["segments_info"] == []
    assert results[1]["segmentation"].tolist() == [[0] * 4 + [-1] * 4] * 2


def test_empty_masks():
    case = example_image([[[LOW] * 4]], [1])
    assert panoptic(case)["segments_info"] == []
    assert instances(case)["segments_info"] == []
    maps = instances(case, return_binary_maps=True)["segmentation"]
    assert maps.dtype == torch.bool
    assert maps.shape == (0, 1, 4)
    assert instances(case, return_coco_annotation=True)["segmentation"] == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(kinds=["infinite"]))
def test_infinite_logits_do_not_spread(case):
    """A cell at -inf without weight in a pixel must not touch it."""
    finite = Case(case.class_logits, case.mask_logits.clamp(min=-3e38), *list(vars(case).values())[2:])
    for function in (panoptic, instances):
        one, other = function(case, threshold=0.1), function(finite, threshold=0.1)
        assert torch.equal(one["segmentation"], other["segmentation"])
        assert one["segments_info"] == other["segments_info"]


@pytest.mark.parametrize("function", [panoptic_segments, instance_segments])
def test_batch_equals_single_images(function):
    class_logits, mask_logits = 4 * torch.randn(3, 7, 5), 5 * torch.randn(3, 7, 8, 8)
    sizes, contents = [(30, 20), (9, 50), (32, 32)], [(32, 21), (6, 32), (32, 32)]
    together = function(
        class_logits,
        mask_logits,
        torch.tensor(sizes),
        input_size=(32, 32),
        content_sizes=torch.tensor(contents),
        threshold=0.3,
    )
    for index, result in enumerate(together):
        part = slice(index, index + 1)
        alone = function(
            class_logits[part],
            mask_logits[part],
            sizes[part],
            input_size=(32, 32),
            content_sizes=contents[part],
            threshold=0.3,
        )[0]
        assert result["segmentation"].shape == sizes[index]
        assert torch.equal(result["segmentation"], alone["segmentation"])
        assert result["segments_info"] == alone["segments_info"]


@pytest.mark.parametrize("function", [panoptic_segments, instance_segments])
def test_without_target_sizes_the_answer_is_the_whole_input(function):
    class_logits, mask_logits = 4 * torch.randn(1, 7, 5), 5 * torch.randn(1, 7, 8, 8)
    options = {"input_size": (32, 24), "threshold": 0.3}
    untold = function(class_logits, mask_logits, None, content_sizes=[(10, 24)], **options)[0]
    told = function(class_logits, mask_logits, [(32, 24)], **options)[0]
    assert torch.equal(untold["segmentation"], told["segmentation"])


@pytest.mark.parametrize("function", [panoptic_segments, instance_segments])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"target_sizes": [(4, 4)]}, "target_sizes has 1 rows for 2 images"),
        ({"target_sizes": [(4, 4)] * 2, "content_sizes": [(4, 4)] * 3}, "content_sizes has 3 rows for 2 images"),
        ({"target_sizes": [(4, 4)] * 2, "content_sizes": [(4, 4), (9, 4)]}, r"\(9, 4\) does not fit into the input"),
        ({"target_sizes": [(4, 4), (0, 4)]}, r"target_sizes: \(0, 4\)"),
    ],
)
def test_sizes_that_do_not_fit(function, sizes, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 4), input_size=(8, 8), **sizes)


def test_logits_may_require_gradients():
    """Outputs of a model that was called without `no_grad`; nothing of them stays alive in the answer."""
    class_logits, mask_logits = 4 * torch.randn(1, 7, 5), 5 * torch.randn(1, 7, 8, 8)
    for function in (panoptic_segments, instance_segments, semantic_segments):
        plain = function(class_logits, mask_logits, [(30, 20)], input_size=(32, 32))[0]
        tracked = function(
            class_logits.clone().requires_grad_(), mask_logits.clone().requires_grad_(), [(30, 20)], input_size=(32, 32)
        )[0]
        if isinstance(plain, dict):
            assert plain["segments_info"] == tracked["segments_info"]
            plain, tracked = plain["segmentation"], tracked["segmentation"]
        assert torch.equal(plain, tracked)
        assert not tracked.requires_grad


def test_two_kinds_of_masks_at_once():
    with pytest.raises(ValueError, match="ask for one of them"):
        instances(example_image([LEFT], [1]), return_binary_maps=True, return_coco_annotation=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases(), thresholds)
def test_cuda_equals_cpu(case, threshold):
    """Everything happens on the device, in at most one copy to the host per image."""
    options = {"threshold": threshold, "input_size": case.input_size, "content_sizes": [case.content_size]}
    ids, rows, doubtful, fragile = plain_panoptic(case, threshold, 0.5, 0.8, set())
    assume(not fragile)
    result = panoptic_segments(case.class_logits.cuda(), case.mask_logits.cuda(), [case.target_size], **options)[0]
    assert result["segmentation"].is_cuda
    assert same_rows(result["segments_info"], rows)
    assert torch.equal(result["segmentation"].cpu()[~doubtful], ids[~doubtful])
    found = instance_segments(case.class_logits.cuda(), case.mask_logits.cuda(), [case.target_size], **options)[0]
    assert found["segmentation"].is_cuda
