"""The fusion formulas against their closed forms in float64, at the edges too."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_segvit.models.class_fusion import fuse_class_logits

INF = math.inf


def closed_form(m, q, alpha, normalization, matches=None):
    """Probabilities by the published formulas, one query at a time, in float64."""
    rows = []
    for query, prompt in zip(m.double(), q.double(), strict=True):
        s = query.softmax(0)
        matches = range(len(query) - 1) if matches is None else matches
        shared = [c for c, match in enumerate(matches) if match >= 0]
        p = query[shared].softmax(0)
        k = prompt[[matches[c] for c in shared]].softmax(0)
        g = p ** (1 - alpha) * k**alpha
        mass = s[shared].sum()
        out = s.clone()
        out[shared] = mass * g / g.sum() if normalization == "oneformer" else mass * g
        rows.append(out / out.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("normalization", ["oneformer", "internimage"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.4, 1.0])
def test_closed_forms(normalization, alpha):
    m, q = 3 * torch.randn(50, 12), 3 * torch.randn(50, 11)
    fused = fuse_class_logits(m, q, alpha, normalization).softmax(-1)
    torch.testing.assert_close(fused.double(), closed_form(m, q, alpha, normalization), atol=2e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_closed_forms_of_any_logits_and_matches(data):
    count, others = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    numbers = st.floats(-12, 12, width=32)
    m = torch.tensor(data.draw(st.lists(st.lists(numbers, min_size=count + 1, max_size=count + 1), min_size=1)))
    q = torch.tensor([data.draw(st.lists(numbers, min_size=others, max_size=others)) for _ in m])
    ids = data.draw(st.permutations(range(others)))[:count]
    matches = data.draw(st.permutations([*ids, *[-1] * (count - len(ids))]))
    alpha = data.draw(st.floats(0, 1))
    for normalization in ("oneformer", "internimage"):
        fused = fuse_class_logits(m, q, alpha, normalization, matches).softmax(-1)
        torch.testing.assert_close(fused.double(), closed_form(m, q, alpha, normalization, matches), atol=2e-6, rtol=0)


def test_alpha_0_is_the_generators_answer_bit_for_bit():
    m, q = torch.randn(2, 5, 4), torch.full((2, 5, 3), -INF)
    m[0, 0, 1] = -INF
    for normalization in ("oneformer", "internimage"):
        assert torch.equal(fuse_class_logits(m, q, 0, normalization), m)


def test_alpha_1_is_the_classifiers_answer_with_the_generators_no_object():
    m, q = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    m[..., 1] = -INF  # 0 ** 0 is 1: what the generator excludes does not count at alpha 1
    fused = fuse_class_logits(m, q, 1.0).softmax(-1)
    no_object = m.softmax(-1)[..., -1:]
    torch.testing.assert_close(fused[..., -1:], no_object, atol=2e-6, rtol=0)
    torch.testing.assert_close(fused[..., :-1], (1 - no_object) * q.softmax(-1), atol=2e-6, rtol=0)


def test_the_no_object_probability_grows_with_disagreement_only_by_the_internimage_form():
    m, q = torch.tensor([[4.0, 0.0, 1.0]]), torch.tensor([[0.0, 4.0]])
    before = m.softmax(-1)[0, -1]
    assert fuse_class_logits(m, q, 0.4).softmax(-1)[0, -1] == pytest.approx(before.item(), abs=2e-6)
    assert fuse_class_logits(m, q, 0.4, "internimage").softmax(-1)[0, -1] > before + 0.02


@pytest.mark.parametrize("normalization", ["oneformer", "internimage"])
def test_excluded_classes_stay_excluded_and_nothing_becomes_nan(normalization):
    m = torch.tensor([[0.0, -INF, 1.0, 0.5], [-INF, -INF, -INF, 0.0], [1.0, 2.0, 0.0, -INF]])
    q = torch.tensor([[0.0, 3.0, -INF], [1.0, 2.0, 3.0], [1.0, 0.0, 0.0]])
    fused = fuse_class_logits(m, q, 0.4, normalization).softmax(-1)
    assert fused.isfinite().all()
    assert fused[0, 1] == 0
    assert fused[0, 2] == 0
    assert fused[1].tolist() == [0, 0, 0, 1]
    assert fused[2, 3] == 0
    torch.testing.assert_close(fused.sum(-1), torch.ones(3))


def test_where_the_two_exclude_each_other_the_generator_decides():
    m, q = torch.tensor([[1.0, -INF, 0.0]]), torch.tensor([[-INF, 0.0]])
    torch.testing.assert_close(fuse_class_logits(m, q, 0.4).softmax(-1), m.softmax(-1))
    # Here the formula has an answer: all goes to no-object, if there is such a probability.
    assert fuse_class_logits(m, q, 0.4, "internimage").softmax(-1).tolist() == [[0, 0, 1]]
    m[..., -1] = -INF
    torch.testing.assert_close(fuse_class_logits(m, q, 0.4, "internimage").softmax(-1), m.softmax(-1))


def test_a_query_that_is_almost_surely_no_object_keeps_its_relative_answer():
    """1 - v has no digits left in float32 here, its logarithm has."""
    m, q = torch.tensor([[0.0, 1.0, 60.0]]), torch.tensor([[0.0, 1.0]])
    fused = fuse_class_logits(m, q, 0.4)
    torch.testing.assert_close(fused[0, 1] - fused[0, 0], torch.tensor(1.0))
    torch.testing.assert_close(fused[0, :2].logsumexp(0), m[0, :2].logsumexp(0) - 60, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_as_precise_as_it_went_in(dtype):
    m, q = (8 * torch.randn(30, 6)).to(dtype), (8 * torch.randn(30, 5)).to(dtype)
    fused = fuse_class_logits(m, q)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.softmax(-1).double(), closed_form(m, q, 0.4, "oneformer"), atol=2e-6, rtol=0)
    assert fuse_class_logits(m.double(), q.double()).dtype == torch.float64


def test_shared_classes_keep_their_mass_and_the_others_their_probability():
    m, q = torch.randn(20, 6), torch.randn(20, 3)
    matches = [-1, 2, -1, 0, -1]
    before, after = m.softmax(-1), fuse_class_logits(m, q, 0.7, class_matches=matches).softmax(-1)
    torch.testing.assert_close(after[:, [0, 2, 4, 5]], before[:, [0, 2, 4, 5]], atol=2e-6, rtol=0)
    torch.testing.assert_close(after[:, [1, 3]].sum(-1), before[:, [1, 3]].sum(-1), atol=2e-6, rtol=0)
    assert (after[:, 1] - before[:, 1]).abs().max() > 0.01


def test_another_order_of_classes_gives_the_same_answer_as_sorting_them():
    m, q = torch.randn(2, 9, 6), torch.randn(2, 9, 5)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(
        fuse_class_logits(m, q, class_matches=order), fuse_class_logits(m, q[..., order]), atol=0, rtol=0
    )


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.4", None, True])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha=.* is no number in \[0, 1\]"):
        fuse_class_logits(torch.zeros(1, 3), torch.zeros(1, 2), alpha)


@pytest.mark.parametrize(
    ("shapes", "arguments", "message"),
    [
        (((1, 3), (1, 2)), {"normalization": "none"}, "'none' is not one of 'oneformer', 'internimage'"),
        (((2, 4, 3), (2, 5, 2)), {}, "give one row of prompt logits for each query"),
        (((1, 134), (1, 80)), {}, "133 classes besides no-object and the classifier 80"),
        (((1, 3), (1, 2)), {"class_matches": [0]}, "one number for each of the generator's 2 classes"),
        (((1, 3), (1, 2)), {"class_matches": [0, 2]}, r"in \[0, 2\)"),
        (((1, 3), (1, 2)), {"class_matches": [-1, -1]}, "nothing to fuse"),
        (((1, 3), (1, 2)), {"class_matches": [1, 1]}, "to two of the generator's"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, arguments, message):
    with pytest.raises(ValueError, match=message):
        fuse_class_logits(*map(torch.zeros, shapes), **arguments)
