"""Run-length encoding against pycocotools, both ways."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco_mask

from hf_segvit.models.mask_encoding import (
    decode_counts,
    decode_counts_together,
    decode_mask,
    encode_counts,
    encode_mask,
)

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=17))


def coco_encode(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(MASKS)
def test_equals_pycocotools_both_ways(mask):
    theirs, ours = coco_encode(mask), encode_mask(mask)
    assert ours == {"size": list(mask.shape), "counts": theirs["counts"].decode()}
    np.testing.assert_array_equal(decode_mask(theirs), mask)
    np.testing.assert_array_equal(coco_mask.decode(ours), mask)


@pytest.mark.parametrize("fill", [0, 1], ids=["empty", "full"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (480, 640)])
def test_uniform_masks(size, fill):
    mask = np.full(size, fill, bool)
    assert encode_mask(mask)["counts"] == coco_encode(mask)["counts"].decode()
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)


def test_runs_that_cross_columns_are_one_run():
    # Columns 1 and 2 are full and column 3 starts inside: a crop must not split that at the bottom of each column.
    mask = np.zeros((6, 5), bool)
    mask[:, 1:3] = True
    mask[:2, 3] = True
    assert decode_counts(encode_mask(mask)["counts"]).tolist() == [6, 14, 10]
    assert encode_mask(mask)["counts"] == coco_encode(mask)["counts"].decode()


def test_large_runs_need_several_characters():
    mask = np.zeros((2000, 3000), bool)
    mask[3:1500, 100:2500] = True
    ours = encode_mask(mask)
    assert ours["counts"] == coco_encode(mask)["counts"].decode()
    np.testing.assert_array_equal(decode_mask(ours), mask)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=9))
def test_counts_survive_a_round_trip(runs):
    assert decode_counts(encode_counts(runs)).tolist() == runs


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 10**7), max_size=9), max_size=6))
def test_many_are_decoded_as_each_is_alone(masks):
    runs, sizes = decode_counts_together([encode_counts(runs).encode() for runs in masks])
    assert sizes.tolist() == [len(mask) for mask in masks]
    assert runs.tolist() == [run for mask in masks for run in mask]


def test_decodes_uncompressed_runs():
    assert decode_mask({"size": [2, 3], "counts": [1, 2, 3]}).tolist() == [[False, True, False], [True, False, False]]


def test_encodes_what_is_not_boolean():
    assert encode_mask(np.array([[0, 7], [0.0, -1]])) == encode_mask(np.array([[False, True], [False, True]]))


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [2, 2], "counts": [1, 2]}, "add up to 3 pixels"),
        ({"size": [2, 2], "counts": [5, -1]}, "shortest -1"),
        ({"size": [2, 2], "counts": " 4"}, "byte 0 is 0x20"),
        ({"size": [2, 2], "counts": "é"}, "byte 0 is 0xc3"),
        ({"size": [2, 2], "counts": b"4P"}, "cut off"),
        ({"size": [2, 2], "counts": b"P" * 13 + b"0"}, "14 digits"),
    ],
)
def test_damaged_runs_are_an_error(rle, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(rle)
