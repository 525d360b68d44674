"""Training for the unknown: pasted objects, the loss that rejects them, LogitNorm; off, nothing changes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hf_segvit.data.augmentation import augmentation
from hf_segvit.data.collation import MaskCollator
from hf_segvit.data.outliers import OutlierObjects, OutlierPasting
from hf_segvit.data.reading import describe, load_segmentation_dataset
from hf_segvit.models.mask_criterion import MaskCriterion, MaskPrediction
from hf_segvit.training.loop import train
from hf_segvit.training.recipe import Recipe
from hf_segvit.training.tasks.eomt import EoMTTask

from .data_folders import halves, mask_folder, write_image
from .tiny_models import tiny_eomt
from .tiny_training import MODEL, assert_equal, saved_tensors, tiny_recipe

NUM_QUERIES, NUM_LABELS, SIZE = 6, 4, (32, 48)


@pytest.fixture
def cut_outs(tmp_path):
    """A red square of 16 pixels a side, and a green triangle."""
    folder = tmp_path / "cut_outs"
    folder.mkdir()
    pixels = np.zeros((20, 24, 4), dtype=np.uint8)
    pixels[2:18, 4:20] = 255, 0, 0, 255
    Image.fromarray(pixels).save(folder / "square.png")
    pixels = np.zeros((30, 30, 4), dtype=np.uint8)
    pixels[np.tril_indices(30)] = 0, 255, 0, 200
    Image.fromarray(pixels).save(folder / "triangle.webp", lossless=True)
    return str(folder)


def inputs(batch_size: int = 2, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(batch_size, NUM_QUERIES, NUM_LABELS + 1, generator=generator).to(dtype).requires_grad_()
    masks = (torch.randn(batch_size, NUM_QUERIES, 8, 12, generator=generator) * 3).to(dtype).requires_grad_()
    mask_labels = [torch.rand(n, *SIZE, generator=generator) > 0.5 for n in (2, 3, 1, 2)[:batch_size]]
    labels = [torch.randint(0, NUM_LABELS, (len(each),), generator=generator) for each in mask_labels]
    return classes, masks, mask_labels, labels


def criterion(**settings) -> MaskCriterion:
    def points(num_sets: int, num_points: int, device) -> Tensor:
        return torch.rand(1, num_points, 2, generator=torch.Generator().manual_seed(num_points)).expand(
            num_sets, -1, -1
        )

    return MaskCriterion(NUM_LABELS, num_points=200, point_sampler=points, **settings)


def outlier_map(batch_size: int = 2) -> Tensor:
    values = torch.zeros(batch_size, *SIZE, dtype=torch.int8)
    values[0, 4:12, 8:20] = 1
    values[:, -6:] = -1
    return values


def test_off_nothing_changes():
    classes, masks, mask_labels, labels = inputs()
    expected, terms = criterion()([MaskPrediction(classes, masks)], mask_labels, labels)
    for given in (None, outlier_map()):
        loss, others = criterion(logit_norm_temperature=None, outlier_weight=0.0)(
            [MaskPrediction(classes, masks)], mask_labels, labels, outlier_map=given
        )
        assert torch.equal(loss, expected)
        assert all(torch.equal(others[name], value) for name, value in terms.items())
        assert others.keys() == terms.keys()
    assert criterion().count_normalizers(labels, NUM_QUERIES).shape == (2,)


def test_logit_norm_is_its_formula():
    classes, masks, mask_labels, labels = inputs()
    scaled = classes / (0.1 * (classes.norm(dim=-1, keepdim=True) + 1e-7))
    expected, terms = criterion()([MaskPrediction(scaled, masks)], mask_labels, labels)
    loss, others = criterion(logit_norm_temperature=0.1)([MaskPrediction(classes, masks)], mask_labels, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(others, terms)
    # The length of the logits no longer matters, so that the loss cannot push them to be longer.
    longer, _ = criterion(logit_norm_temperature=0.1)([MaskPrediction(7 * classes, masks)], mask_labels, labels)
    torch.testing.assert_close(longer, loss)
    (gradient,) = torch.autograd.grad(loss, classes)
    torch.testing.assert_close((gradient * classes).sum(-1), torch.zeros(2, NUM_QUERIES), atol=1e-5, rtol=0)


def plain_outlier_loss(classes: Tensor, masks: Tensor, values: Tensor) -> float:
    """RbA's loss, pixel by pixel, of images of the size of their mask logits."""
    total = 0.0
    for image in range(len(values)):
        known, outlier = [], []
        for row in range(values.shape[1]):
            for column in range(values.shape[2]):
                score = 0.0
                for label in range(NUM_LABELS):
                    sums = 0.0
                    for query in range(NUM_QUERIES):
                        share = classes[image, query].exp()[label] / classes[image, query].exp().sum()
                        sums += share * masks[image, query, row, column].sigmoid()
                    score -= float(torch.tanh(sums))
                if values[image, row, column] == 0:
                    known.append(max(0.0, score + 1.0) ** 2)
                elif values[image, row, column] == 1:
                    outlier.append(max(0.0, -0.1 - score) ** 2)
        total += (sum(known) / max(len(known), 1) + sum(outlier) / max(len(outlier), 1)) / 2
    return total / len(values)


def test_the_outlier_loss_is_its_formula():
    classes, masks, mask_labels, labels = inputs()
    values = torch.zeros(2, 8, 12, dtype=torch.int8)
    values[0, 2:5, 3:9], values[1, 0] = 1, -1
    with torch.no_grad():
        expected = plain_outlier_loss(classes, masks, values)
    plain, terms = criterion()([MaskPrediction(classes, masks)], mask_labels, labels)
    loss, others = criterion(outlier_weight=3.0)(
        [MaskPrediction(classes, masks)], mask_labels, labels, outlier_map=values
    )
    assert float(others.pop("loss_outlier_layer_0")) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.05
    assert others.keys() == terms.keys()
    assert loss.item() == pytest.approx(plain.item() + 3 * expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"outlier_map is \(8, 12\); give integers \(2, H, W\)"):
        criterion(outlier_weight=1.0)([MaskPrediction(classes, masks)], mask_labels, labels, outlier_map=values[0])


def test_accumulated_batches_equal_the_joint_one():
    classes, masks, mask_labels, labels = inputs(4)
    values, whole = outlier_map(4), criterion(outlier_weight=1.0)
    joint, _ = whole([MaskPrediction(classes, masks)], mask_labels, labels, outlier_map=values)
    normalizers = whole.count_normalizers(labels, NUM_QUERIES)
    assert normalizers[2] == 4
    parts = torch.zeros(())
    for part in (slice(0, 1), slice(1, 4)):
        loss, _ = whole(
            [MaskPrediction(classes[part], masks[part])],
            mask_labels[part],
            labels[part],
            normalizers=normalizers,
            outlier_map=values[part],
        )
        parts = parts + loss
    torch.testing.assert_close(parts, joint)
    own = criterion(outlier_weight=1.0, loss_normalization="per_rank").count_normalizers(labels, NUM_QUERIES)
    assert own.tolist() == normalizers.tolist()


def test_the_model_learns_to_reject_what_is_pasted():
    """Gradients reach masks and classes of all queries, and a few steps reject an object."""
    torch.manual_seed(0)
    model = tiny_eomt(train_num_points=64).train()
    model.criterion.outlier_weight = 5.0
    pixels = torch.randn(1, 3, 64, 64)
    pixels[:, :, 16:48, 16:48] = 3
    values = torch.zeros(1, 64, 64, dtype=torch.int8)
    values[:, 16:48, 16:48] = 1
    batch = {
        "pixel_values": pixels,
        "mask_labels": [values == 0],
        "class_labels": [torch.tensor([1])],
        "outlier_map": values,
    }
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    terms = []
    for _ in range(30):
        output = model(**batch)
        optimizer.zero_grad()
        output.loss.backward()
        assert model.eomt.mask_head.fc1.weight.grad.abs().sum() > 0
        optimizer.step()
        terms.append(sum(float(value) for name, value in output.loss_dict.items() if "outlier" in name))
    assert terms[-1] < 0.6 * terms[0]
    names = {name.rpartition("_layer_")[0] for name in output.loss_dict}
    assert names == {"loss_mask", "loss_dice", "loss_class", "loss_outlier"}


def test_cut_outs_are_pasted(tmp_path, cut_outs):
    entry = load_segmentation_dataset(mask_folder(tmp_path / "data"))[0]
    plain = augmentation("eomt_semantic", (40, 60), color_jitter=False)
    objects = OutlierObjects(cut_outs)
    pasting = OutlierPasting(plain, objects, probability=1.0, max_objects=3)
    shares = []
    for seed in range(20):
        sample = pasting(entry, np.random.default_rng(seed))
        before = plain(entry, np.random.default_rng(seed))
        outliers = sample.outliers
        assert torch.equal(sample.pixels[:, ~outliers], before.pixels[:, ~outliers])
        assert (sample.segment_map[outliers] == -1).all()
        kept = ~outliers & (before.segment_map >= 0)
        assert torch.equal(
            sample.labels[sample.segment_map[kept].long()], before.labels[before.segment_map[kept].long()]
        )
        # Red or green, but for the edges that scaling has mixed.
        colors = sample.pixels[:, outliers].int()
        pure = (colors[2] == 0) & ((colors[0] == 0) | (colors[1] == 0))
        assert pure.float().mean() > 0.8
        rows = torch.nonzero((before.segment_map >= 0).any(1))[:, 0]
        if outliers.any():
            inside = torch.nonzero(outliers.any(1))[:, 0]
            assert rows[0] <= inside[0]
            assert inside[-1] <= rows[-1]
        shares.append(float(outliers.float().mean()))
        again = pasting(entry, np.random.default_rng(seed))
        assert torch.equal(again.pixels, sample.pixels)
        batch = MaskCollator(with_loss_mask=True)([sample, again])
        assert torch.equal(batch["outlier_map"][0] == 1, outliers)
        assert torch.equal(batch["outlier_map"][0] == 0, sample.segment_map >= 0)
        assert not batch["loss_mask"][0][outliers].any()
        assert "outlier_map" not in MaskCollator()([before])
    assert min(shares) > 0
    assert 0.01 < np.mean(shares) < 0.3


def test_some_images_stay_as_they_are(tmp_path, cut_outs):
    entry = load_segmentation_dataset(mask_folder(tmp_path / "data"))[0]
    plain = augmentation("eomt_semantic", (40, 60), color_jitter=False)
    pasting = OutlierPasting(plain, OutlierObjects(cut_outs), probability=0.3)
    pasted = 0
    for seed in range(100):
        sample = pasting(entry, np.random.default_rng(seed))
        pasted += bool(sample.outliers.any())
    assert 18 <= pasted <= 42  # 30, give or take 2.6 standard deviations


def test_segments_that_are_covered_are_left_out(tmp_path):
    folder = tmp_path / "cut_outs"
    folder.mkdir()
    Image.fromarray(np.full((50, 50, 4), 255, dtype=np.uint8)).save(folder / "all.png")
    data = load_segmentation_dataset("generated:easy?num_scenes=6&size=64", split="train", task="instance")
    plain = augmentation("eomt_coco_instance", (64, 64))
    pasting = OutlierPasting(plain, OutlierObjects(str(folder)), probability=1.0, max_objects=8, scale_range=(0.9, 1.0))
    fewer = 0
    for index in range(len(data)):
        sample, before = (each(data[index], np.random.default_rng(index)) for each in (pasting, plain))
        count = len(sample.labels)
        if sample.masks is not None:
            assert len(sample.masks) == count
            assert sample.masks.flatten(1).any(1).all()
            assert not (sample.masks & sample.outliers).any()
        else:
            assert set(sample.segment_map.unique().tolist()) <= {-1, *range(count)}
            assert set(range(count)) <= set(sample.segment_map.unique().tolist())
        assert not sample.counted[sample.outliers].any()
        fewer += count < len(before.labels)
    assert fewer > 0


def test_objects_of_a_data_set(tmp_path):
    spec = "generated:easy?num_scenes=8&size=64"
    names = list(describe(load_segmentation_dataset(spec, task="instance")).id2label.values())
    objects = OutlierObjects(spec, split="train", known=[names[0].upper()])
    data = load_segmentation_dataset(spec, split="train", task="instance")
    for seed in range(5):
        pixels, mask = objects.draw(np.random.default_rng(seed))
        assert pixels.shape[1:] == mask.shape
        assert mask.any(0).all() or mask.any(1).all()
        assert mask.sum() >= 64
    assert objects.labels == frozenset(range(1, len(names)))
    with pytest.raises(ValueError, match="all of its things are classes that are learnt"):
        OutlierObjects(spec, known=names)
    assert len(data) == 8


def test_sources_that_do_not_fit(tmp_path, cut_outs):
    with pytest.raises(ValueError, match="no such file or folder"):
        OutlierObjects(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no cut-outs"):
        OutlierObjects(str(tmp_path / "empty"))
    write_image(tmp_path / "opaque" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: has no transparency"):
        OutlierObjects(str(tmp_path / "opaque")).draw(np.random.default_rng(0))
    (tmp_path / "opaque" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(ValueError, match=r"a\.png"):
        OutlierObjects(str(tmp_path / "opaque")).draw(np.random.default_rng(0))
    write_image(tmp_path / "maps" / "train2017" / "a.jpg")
    with pytest.raises(ValueError, match="semantic maps tell no objects apart"):
        OutlierObjects(f"coco_stuff:{tmp_path / 'maps'}")
    Image.fromarray(np.zeros((5, 5, 4), np.uint8)).save(tmp_path / "empty" / "clear.png")
    assert OutlierObjects(str(tmp_path / "empty")).draw(np.random.default_rng(0)) is None
    for scale_range in ((0, 0.5), (0.6, 0.5), (0.1, 1.5)):
        with pytest.raises(ValueError, match="scale_range is"):
            OutlierPasting(None, OutlierObjects(cut_outs), scale_range=scale_range)
    later = augmentation("eomt_semantic", (40, 60), scale_later=True)
    entry = load_segmentation_dataset(mask_folder(tmp_path / "data"))[0]
    with pytest.raises(ValueError, match="pasted into finished images of 3 channels"):
        OutlierPasting(later, OutlierObjects(cut_outs))(entry, np.random.default_rng(0))
    assert halves().shape == (20, 30)


def test_recipes_turn_both_on(tmp_path, cut_outs):
    off = tiny_recipe(tmp_path / "off", steps=2)
    task = EoMTTask(off)
    model, _ = task.build_model()
    assert (model.criterion.logit_norm_temperature, model.criterion.outlier_weight) == (None, 0.0)
    assert task.train_samples()[0, 0].outliers is None
    outliers = {"data": cut_outs, "probability": 1.0, "weight": 2.0}
    recipe = tiny_recipe(tmp_path / "on", steps=2, logit_norm=0.04, outliers=outliers)
    task = EoMTTask(recipe)
    model, _ = task.build_model()
    assert (model.criterion.logit_norm_temperature, model.criterion.outlier_weight) == (0.04, 2.0)
    assert task.train_samples()[0, 0].outliers.any()
    task.device = torch.device("meta")  # where images are scaled later, but not if something is pasted into them
    assert task.train_samples()[0, 0].outliers.any()
    train(recipe)
    lines = (tmp_path / "on" / "history.jsonl").read_text()
    assert "outlier loss/prediction 1" in lines
    train(off)
    again = tiny_recipe(tmp_path / "again", steps=2, logit_norm=None, outliers=None)
    train(again)
    assert_equal(saved_tensors(tmp_path / "off"), saved_tensors(tmp_path / "again"))


def test_recipes_that_cannot_be(tmp_path):
    for changes, message in (
        ({"outliers": {"probability": 0.5}}, "outliers has no data"),
        ({"outliers": {"data": "a", "share": 0.5}}, "outliers has no key 'share'"),
        ({"outliers": {"data": "a", "probability": 2}}, r"outliers\.probability=2 must be"),
        ({"logit_norm": 0}, "logit_norm=0 must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_recipe(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"logit_norm=0\.1 is for model=eomt, not for vit_p"):
        Recipe(model="vit_p", task="points", logit_norm=0.1)
    with pytest.raises(ValueError, match=r"outliers\.data: .*absent: no such file or folder"):
        EoMTTask(tiny_recipe(tmp_path, outliers={"data": str(tmp_path / "absent")})).train_samples()
    recipe = tiny_recipe(tmp_path, logit_norm=0.1, criterion=f"{__name__}:OtherCriterion", model_config=MODEL)
    with pytest.raises(ValueError, match="losses of MaskCriterion, not of criterion="):
        EoMTTask(recipe).build_model()


class OtherCriterion(torch.nn.Module):
    """A criterion that is derived from nothing of ours."""

    @classmethod
    def from_config(cls, config):
        return cls()

    def forward(self, *arguments, **others): ...

    def count_normalizers(self, *arguments): ...

    def curve_name(self, term): ...
