"""Official EoMT checkpoints: read exactly, changed only as asked, and refused where they are not what they seem."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from transformers import DINOv3ViTConfig, DINOv3ViTModel, EomtDinov3Config, EomtDinov3ForUniversalSegmentation

from hf_segvit.cli import main
from hf_segvit.conversion import official_catalogue
from hf_segvit.conversion.convert import convert
from hf_segvit.conversion.official_catalogue import recognise_released_model, released_model, released_models
from hf_segvit.conversion.official_eomt import read_official_eomt
from hf_segvit.conversion.options import ConversionOptions, parse_fields, read_labels
from hf_segvit.conversion.sources import from_official_eomt
from hf_segvit.data.label_tables import LABEL_TABLES, label_table
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.models.published_labels import published_label_sets

from .official_files import STD, official_state_dict
from .tiny_models import FAMILIES, randomize, tiny_eomt

HEADS = {"num_attention_heads": 2}
PIXELS = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64)


def write(path, state_dict):
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, path)
    return str(path)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("registers", [0, 4])
def test_reading_inverts_writing(tmp_path, family, registers):
    model = tiny_eomt(**FAMILIES[family], num_register_tokens=registers, masked_attention_probabilities=[0.0, 0.5])
    fields = HEADS if family != "dinov3" else {**HEADS, "image_size": 64}
    path = write(tmp_path / "x.safetensors", official_state_dict(model))
    converted = from_official_eomt(path, ConversionOptions(fields=fields, task="panoptic"))
    state_dict = converted.model.state_dict()
    assert state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items())
    ignored = {"architectures", "train_num_points", "layer_scale_init_value", "name_or_path", "dtype"}
    ours, theirs = model.config.to_diff_dict(), converted.model.config.to_diff_dict()
    assert {k: v for k, v in ours.items() if k not in ignored} == {k: v for k, v in theirs.items() if k not in ignored}


@pytest.mark.parametrize("kind", ["network.", "_orig_mod", "ckpt", "bare"])
def test_every_wrapping_is_the_same_file(tmp_path, kind):
    model = tiny_eomt(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    official = official_state_dict(model)
    path = tmp_path / "x.bin"
    if kind == "ckpt":
        torch.save({"state_dict": official, "epoch": 11, "hyper_parameters": {"lr": 1e-4}}, path)
    elif kind == "bare":
        torch.save({name.removeprefix("network."): tensor for name, tensor in official.items()}, path)
    else:
        renamed = {name.replace("network.", "network._orig_mod."): tensor for name, tensor in official.items()}
        torch.save(renamed if kind == "_orig_mod" else official, path)
    result = read_official_eomt(str(path), ConversionOptions(fields=HEADS))
    assert result.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, result.state_dict[name]) for name, tensor in model.state_dict().items())
    assert result.pixel_std == list(STD)
    assert any("criterion.empty_weight" in note for note in result.notes)


@pytest.mark.parametrize("prefix", ["network.", ""])
def test_weights_that_projects_on_anomalies_share(tmp_path, prefix):
    """`eomt_cityscapes.bin`: a plain pickle of tensors, of Cityscapes, from which only the task cannot be read."""
    labels = {label: row.name for label, row in enumerate(label_table("cityscapes").classes)}
    model = tiny_eomt(
        hidden_size=64,
        num_attention_heads=1,
        num_register_tokens=4,
        masked_attention_probabilities=[0.0, 0.0],
        id2label=labels,
        label2id={name: label for label, name in labels.items()},
    )
    official = official_state_dict(model)
    path = tmp_path / "eomt_cityscapes.bin"
    torch.save({name.replace("network.", prefix, 1): tensor for name, tensor in official.items()}, path)
    with pytest.raises(ValueError, match=r"its weights do not show its task; pass --task .* and --labels"):
        from_official_eomt(str(path), ConversionOptions())
    command = ["convert", "official-eomt", str(path), str(tmp_path / "out"), "--task", "semantic"]
    assert main([*command, "--labels", "cityscapes"]) == 0
    loaded = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label == labels
    assert loaded.config.image_size == 64
    assert EoMTImageProcessor.from_pretrained(tmp_path / "out").task == "semantic"
    with torch.no_grad():
        ours, theirs = loaded.eval()(PIXELS), model.eval()(PIXELS)
    assert torch.equal(ours.class_queries_logits, theirs.class_queries_logits)
    assert torch.equal(ours.masks_queries_logits, theirs.masks_queries_logits)


def test_the_pickle_comes_before_safetensors_of_another_format(tmp_path):
    torch.save(official_state_dict(tiny_eomt()), tmp_path / "pytorch_model.bin")
    save_file({"layers.0.norm1.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert read_official_eomt(str(tmp_path), ConversionOptions(fields=HEADS)).num_labels == 5


def test_another_image_size_resamples_positions_as_timm_does(tmp_path):
    official = official_state_dict(tiny_eomt())
    path = write(tmp_path / "x.safetensors", official)
    table = official["network.encoder.backbone.pos_embed"]
    for size, grid in ((96, (6, 6)), ([32, 128], (2, 8)), ([48, 80], (3, 5))):
        fields = {**HEADS, "image_size": size, "native_image_size": 64}
        result = read_official_eomt(path, ConversionOptions(fields=fields))
        expected = resample_abs_pos_embed(table, list(grid), num_prefix_tokens=0)[0]
        # The same interpolation in the same precision; only the order of the axes in memory differs.
        torch.testing.assert_close(
            result.state_dict["eomt.embeddings.position_embeddings.weight"], expected, atol=1e-6, rtol=0
        )
        assert result.fields["image_size"] == size
        assert "resampled" in result.notes[-1]


def test_a_table_that_may_be_of_two_images_must_be_told(tmp_path):
    path = write(tmp_path / "x.safetensors", official_state_dict(tiny_eomt()))
    with pytest.raises(ValueError, match="16 positions may be those of this image or of a square one"):
        read_official_eomt(path, ConversionOptions(fields={**HEADS, "image_size": [32, 128]}))
    with pytest.raises(ValueError, match="3 x 3 patches are not the 16 positions"):
        read_official_eomt(path, ConversionOptions(fields={**HEADS, "native_image_size": 48}))
    wide = {**HEADS, "native_image_size": [32, 128]}
    assert read_official_eomt(path, ConversionOptions(fields=wide)).fields["image_size"] == [32, 128]
    path = write(tmp_path / "y.safetensors", official_state_dict(tiny_eomt(image_size=[32, 64])))
    with pytest.raises(ValueError, match="8 positions, which is not a square"):
        read_official_eomt(path, ConversionOptions(fields=HEADS))
    fields = {**HEADS, "image_size": [32, 64]}
    assert read_official_eomt(path, ConversionOptions(fields=fields)).fields["image_size"] == [32, 64]
    with pytest.raises(ValueError, match="multiples of the patch size 16"):
        read_official_eomt(path, ConversionOptions(fields={**HEADS, "image_size": 50}))


@pytest.fixture
def dinov3(tmp_path):
    """Transformers' eomt_dinov3 with random weights, its official file whole and as a delta, and the base."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    base = randomize(DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=4, layer_norm_eps=1e-5)), seed=1)
    base.save_pretrained(tmp_path / "base")
    config = EomtDinov3Config(
        **sizes, image_size=64, num_blocks=2, num_queries=7, num_labels=5, layer_norm_eps=1e-5, num_register_tokens=4
    )
    theirs = randomize(EomtDinov3ForUniversalSegmentation(config), seed=2).eval()
    theirs.attn_mask_probs.zero_()
    theirs.save_pretrained(tmp_path / "theirs")
    whole = official_state_dict(EoMTForUniversalSegmentation.from_pretrained(tmp_path / "theirs"))
    backbone = load_file(tmp_path / "base" / "model.safetensors")
    delta = dict(whole)
    for name in whole:
        if name.startswith("network.encoder.backbone."):
            inner = name.removeprefix("network.encoder.backbone.").replace("patch_embed.", "embeddings.")
            inner = inner.replace("blocks.", "layer.")
            found = next(tensor for key, tensor in backbone.items() if key.removeprefix("model.") == inner)
            delta[name] = whole[name] - found
    delta["network.encoder.pixel_mean"] = torch.zeros(1, 3, 1, 1)
    delta["network.encoder.pixel_std"] = torch.zeros(1, 3, 1, 1)
    delta["network.attn_mask_probs"] = torch.full((2,), -1.0)
    return theirs, write(tmp_path / "whole.safetensors", whole), write(tmp_path / "delta.safetensors", delta), tmp_path


@pytest.mark.parametrize("kind", ["whole", "delta"])
@torch.no_grad()
def test_dinov3_files_give_the_outputs_of_transformers(dinov3, kind):
    theirs, whole, delta, folder = dinov3
    base = str(folder / "base") if kind == "delta" else None
    options = ConversionOptions(fields={**HEADS, "image_size": 64}, base=base, task="panoptic")
    converted = from_official_eomt(whole if kind == "whole" else delta, options)
    ours, expected = converted.model.eval()(PIXELS), theirs(PIXELS)
    # fp32 sums in another order, and for the delta (a - b) + b, which rounds.
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(ours[name], expected[name], atol=1e-4, rtol=1e-5)
    assert converted.model.config.masked_attention_probabilities == [0.0, 0.0]
    assert converted.model.config.layer_norm_eps == 1e-5
    assert tuple(converted.processor.image_std) == STD


def test_a_delta_is_not_taken_for_whole_weights_nor_the_other_way_round(dinov3):
    _, whole, delta, folder = dinov3
    size = {**HEADS, "image_size": 64}
    with pytest.raises(ValueError, match=r"difference to a backbone, not its weights.*--base facebook/dinov3"):
        read_official_eomt(delta, ConversionOptions(fields=size))
    with pytest.raises(ValueError, match="whole weights, not the difference"):
        read_official_eomt(whole, ConversionOptions(fields=size, base=str(folder / "base")))
    with pytest.raises(ValueError, match="do not show the image size"):
        read_official_eomt(whole, ConversionOptions(fields=HEADS))
    # Without the normalisation constants the negative probabilities, or the final norm, give a delta away.
    state_dict = load_file(delta)
    for name in ("network.encoder.pixel_mean", "network.encoder.pixel_std"):
        del state_dict[name]
    bare = write(folder / "bare.safetensors", state_dict)
    with pytest.raises(ValueError, match="--base"):
        read_official_eomt(bare, ConversionOptions(fields=size))
    del state_dict["network.attn_mask_probs"]
    state_dict["network.encoder.backbone.norm.weight"] *= 0.0
    bare = write(folder / "bare.safetensors", state_dict)
    with pytest.raises(ValueError, match="--base"):
        read_official_eomt(bare, ConversionOptions(fields=size))


def test_a_delta_needs_the_backbone_it_was_made_from(dinov3):
    _, _, delta, folder = dinov3
    options = {"fields": {**HEADS, "image_size": 64}}
    tiny_eomt().save_pretrained(folder / "eomt")
    with pytest.raises(ValueError, match="of type 'segvit_eomt', but deltas are made for"):
        read_official_eomt(delta, ConversionOptions(**options, base=str(folder / "eomt")))
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=4)).save_pretrained(folder / "other")
    with pytest.raises(ValueError, match="the delta is for another backbone than --base"):
        read_official_eomt(delta, ConversionOptions(**options, base=str(folder / "other")))
    broken = load_file(folder / "base" / "model.safetensors")
    broken["norm.weight"][0] = float("nan")
    save_file(broken, folder / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm\.weight holds NaN"):
        read_official_eomt(delta, ConversionOptions(**options, base=str(folder / "base")))


def test_other_labels_reset_the_class_head_only(tmp_path):
    model = tiny_eomt()
    path = write(tmp_path / "x.safetensors", official_state_dict(model))
    (tmp_path / "labels.txt").write_text("cat\ndog\n\n")
    asked = {"fields": HEADS, "task": "instance", "labels": str(tmp_path / "labels.txt")}
    with pytest.raises(ValueError, match=r"knows 5 classes, not 2; .*--reset-class-head"):
        from_official_eomt(path, ConversionOptions(**asked))
    converted = from_official_eomt(path, ConversionOptions(**asked, reset_class_head=True))
    again = from_official_eomt(path, ConversionOptions(**asked, reset_class_head=True))
    assert converted.model.config.id2label == {0: "cat", 1: "dog"}
    assert converted.model.class_predictor.weight.shape == (3, 32)
    assert converted.model.class_predictor.weight.abs().max() <= 32**-0.5  # PyTorch's initial weights
    for name, tensor in converted.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])  # one file and one command, one model
        if not name.startswith("class_predictor."):
            assert torch.equal(tensor, model.state_dict()[name])
    numbered = ConversionOptions(fields={**HEADS, "num_labels": 3}, task="semantic", reset_class_head=True)
    assert from_official_eomt(path, numbered).model.config.id2label == {i: f"LABEL_{i}" for i in range(3)}
    with pytest.raises(ValueError, match="name the classes"):
        from_official_eomt(path, ConversionOptions(fields=HEADS, task="semantic", reset_class_head=True))


def test_a_file_without_class_head_or_probabilities(tmp_path):
    official = official_state_dict(tiny_eomt())
    del official["network.class_head.weight"], official["network.class_head.bias"]
    path = write(tmp_path / "x.safetensors", official)
    with pytest.raises(ValueError, match="no class head; pass --reset-class-head"):
        read_official_eomt(path, ConversionOptions(fields=HEADS))
    assert (
        read_official_eomt(path, ConversionOptions(fields=HEADS, reset_class_head=True), num_labels=2).num_labels == 2
    )

    official = official_state_dict(tiny_eomt())
    del official["network.attn_mask_probs"]
    path = write(tmp_path / "y.safetensors", official)
    with pytest.raises(ValueError, match=r"no attn_mask_probs.*--set num_query_layers"):
        read_official_eomt(path, ConversionOptions(fields=HEADS))
    result = read_official_eomt(path, ConversionOptions(fields={**HEADS, "num_query_layers": 2}))
    assert result.fields["masked_attention_probabilities"] == [0.0, 0.0]


def broken(change):
    """A checkpoint with one thing wrong."""
    official = official_state_dict(tiny_eomt())
    change(official)
    return official


E = "network.encoder."
B = f"{E}backbone."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[f"{B}norm.weight"].fill_(float("nan")), r"encoder\.backbone\.norm\.weight holds NaN"),
        (lambda s: s.update({"network.q.weight": torch.zeros(7, 32, dtype=torch.int8)}), r"q\.weight has the dtype"),
        (lambda s: s.pop("network.q.weight"), "not of the official EoMT code"),
        (lambda s: s.update({"network.extra": torch.zeros(1)}), "'extra' is not a weight of the official EoMT code"),
        (lambda s: s.update({f"{B}blocks.0.extra": torch.zeros(1)}), r"blocks\.0\.extra"),
        (lambda s: s.pop(f"{B}blocks.1.norm1.weight"), "missing, such as 'eomt.layers.1.norm1.weight'"),
        (lambda s: s.pop("network.mask_head.2.bias"), "missing, such as 'eomt.mask_head.fc2.bias'"),
        (lambda s: s.update({"network.mask_head.2.bias": torch.zeros(3)}), "has shape"),
        (lambda s: s.update({"network.attn_mask_probs": torch.tensor([0.0, 1.5])}), "are not probabilities"),
        (lambda s: s.update({"network.attn_mask_probs": torch.zeros(5)}), r"attn_mask_probs has the shape \[5\]"),
        (lambda s: s.update({"network.attn_mask_probs": torch.zeros(2, 1)}), r"attn_mask_probs has the shape \[2, 1\]"),
        (lambda s: s.update({"network.attn_mask_probs": torch.tensor(0.0)}), r"attn_mask_probs has the shape \[\]"),
        (lambda s: s.update({f"{E}pixel_mean": torch.ones(1, 4, 1, 1)}), r"pixel_mean has the shape \[1, 4, 1, 1\]"),
        (lambda s: s.update({f"{E}pixel_mean": torch.ones(3, 3)}), r"pixel_mean has the shape \[3, 3\]"),
        (lambda s: s.update({f"{E}pixel_std": torch.tensor(0.2)}), r"pixel_std has the shape \[\]"),
        (lambda s: s.update({f"{E}pixel_std": torch.tensor([0.2, -0.2, 0.2])}), "pixel_std .* must be positive"),
        (lambda s: s.update({f"{E}pixel_std": torch.tensor([1, 1, 1])}), r"encoder\.pixel_std has the dtype"),
        (lambda s: s.update({f"{E}pixel_mean": torch.full((3,), torch.inf)}), r"encoder\.pixel_mean holds"),
        (lambda s: s.update({f"{B}blocks.0.attn.q_bias": torch.zeros(32)}), "EVA family"),
        (lambda s: s.pop(f"{B}pos_embed"), "neither position embeddings nor the names of DINOv3"),
    ],
)
def test_broken_files_are_refused_before_anything_is_written(tmp_path, change, message):
    path = write(tmp_path / "x.safetensors", broken(change))
    with pytest.raises(ValueError, match=message):
        convert("official-eomt", path, tmp_path / "out", ConversionOptions(fields=HEADS, task="panoptic"))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("layers.0.norm1.weight", None),
        ("upscale_block.block.0.conv1.weight", "convert transformers-eomt"),
        ("blocks.0.attn.qkv.weight", "convert timm"),
        ("eomt.layers.0.norm1.weight", "needs no conversion"),
        ("sem_seg_head.predictor.query_feat.weight", "Mask2Former"),
        ("layer1.0.conv1.weight", "ResNet"),
    ],
)
def test_files_of_other_formats_are_recognised(tmp_path, name, hint):
    path = write(tmp_path / "x.safetensors", {name: torch.zeros(2)})
    with pytest.raises(ValueError, match=f"not of the official EoMT code.*{hint or ''}"):
        read_official_eomt(path, ConversionOptions())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "num_attention_heads"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 does not divide"),
        ({**HEADS, "num_queries": 8}, "--set num_queries=8: the weights of .* say 7"),
        ({**HEADS, "mlp_type": "swiglu"}, "say mlp"),
        ({**HEADS, "num_query_layers": 3}, "say 2"),
        ({**HEADS, "image_size": "large"}, "expected pixels"),
        ({**HEADS, "drop_path_rate": "much"}, "drop_path_rate"),
    ],
)
def test_settings_that_contradict_the_file_are_refused(tmp_path, fields, message):
    path = write(tmp_path / "x.safetensors", official_state_dict(tiny_eomt()))
    with pytest.raises(ValueError, match=message):
        from_official_eomt(path, ConversionOptions(fields=fields, task="panoptic"))


def test_the_task_must_be_known(tmp_path):
    path = write(tmp_path / "x.safetensors", official_state_dict(tiny_eomt()))
    with pytest.raises(ValueError, match=r"--task panoptic\|instance\|semantic"):
        from_official_eomt(path, ConversionOptions(fields=HEADS))


def test_settings_are_parsed():
    known = ["num_attention_heads", "image_size", "hidden_act", "layer_norm_eps", "masked_attention"]
    words = [
        "num_attention_heads=4",
        "image_size=64,96",
        "hidden_act=gelu",
        "layer_norm_eps=1e-5",
        "masked_attention=False",
    ]
    assert parse_fields(words, known) == {
        "num_attention_heads": 4,
        "image_size": [64, 96],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "masked_attention": False,
    }
    for word, message in (
        ("num_heads=4", "no such field; did you mean num_attention_heads"),
        ("image_size", "expected field=value"),
        ("image_size=", "expected field=value"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_fields([word], known)
    with pytest.raises(ValueError, match="given twice"):
        parse_fields(["image_size=1", "image_size=2"], known)


def test_labels_are_read(tmp_path):
    assert read_labels("cityscapes").id2label[18] == "bicycle"
    path = tmp_path / "labels.json"
    for content, stuff in (
        (["a", "b"], None),
        ({"1": "b", "0": "a"}, None),
        ({"id2label": {"0": "a", "1": "b"}, "stuff_classes": [1]}, [1]),
    ):
        path.write_text(json.dumps(content))
        labels = read_labels(str(path))
        assert (labels.id2label, labels.stuff_classes) == ({0: "a", 1: "b"}, stuff)
    for content, message in (
        ("{", "no valid JSON at line 1"),
        ("[]", "lists no class"),
        ("3", "a list of names"),
        ('{"1": "a", "2": "b"}', "not 0 to 1 without a gap"),
        ('{"x": "a"}', "a list of names"),
        ('["a", ""]', "the class of value 1 has no name"),
        ('["a", 3]', "a list of names"),
        ('["a", "a"]', "two classes are called 'a'"),
        ('{"id2label": {"0": "a"}, "stuff_classes": [1]}', "stuff_classes"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_labels(str(path))
    with pytest.raises(ValueError, match="neither a file nor a published table"):
        read_labels("cocoa")


def test_label_tables_agree_with_the_sets_that_models_are_recognised_by():
    published = {labels.name: labels for labels in published_label_sets()}
    for table, name in (("coco_panoptic", "COCO panoptic"), ("ade20k", "ADE20K"), ("cityscapes", "Cityscapes")):
        assert tuple(label_table(table).id2label.values()) == published[name].labels
        assert tuple(label_table(table).stuff_classes) == published[name].stuff_classes
    things = published["COCO panoptic, things only"]
    assert tuple(label_table("coco_instance").id2label.values()) == things.labels
    assert [len(label_table(name).classes) for name in LABEL_TABLES] == [133, 80, 171, 150, 19]
    for name in LABEL_TABLES:
        for label in label_table(name).classes:
            assert len(label.color) == 3
            assert all(0 <= value <= 255 for value in label.color)
    with pytest.raises(ValueError, match="coco_panoptic, coco_instance, coco_stuff, ade20k, cityscapes"):
        label_table("coco")


def test_label_tables_agree_with_the_data_sets_own_files(sample_data):
    annotations = json.loads((sample_data / "coco_train100/annotations/panoptic_train2017.json").read_text())
    rows = [(row["id"], row["name"], bool(row["isthing"])) for row in annotations["categories"]]
    table = label_table("coco_panoptic")
    assert rows == [(label.source_id, label.name, label.is_thing) for label in table.classes]
    assert table.source_id_to_label[200] == 132
    lines = (sample_data / "ADEChallengeData2016/objectInfo150.csv").read_text().splitlines()[1:]
    for line, label in zip(lines, label_table("ade20k").classes, strict=True):
        number, words = line.split(",")[0], line.split(",")[-1].split(";")
        assert int(number) == label.source_id
        assert words[0] == label.name.split()[0]


def test_the_catalogue_is_the_published_one():
    models = released_models("eomt")
    assert len(models) == 22
    by_metric = {name: model.metrics for name, model in models.items()}
    assert by_metric["coco_panoptic_eomt_large_1280"] == {"PQ": 58.3}
    assert by_metric["ade20k_semantic_eomt_large_512"] == {"mIoU": 58.4}
    assert by_metric["coco_instance_eomt_large_1280_dinov3"] == {"AP": 49.9}
    for model in models.values():
        assert model.num_queries == (100 if model.task == "semantic" else 200)
        assert model.repository == f"tue-mps/{model.id}"
        assert (model.base is not None) == model.id.endswith("dinov3")
        assert f"_{model.image_size}" in model.id
        assert model.task in model.id
        expected = {"coco": {80, 133}, "ade20k": {150}, "ade": {150}, "cityscapes": {19}}[model.id.split("_")[0]]
        assert len(model.label_table.classes) in expected
    assert released_model("eomt", "tue-mps/coco_panoptic_eomt_large_640").id == "coco_panoptic_eomt_large_640"
    with pytest.raises(ValueError, match="did you mean coco_panoptic_eomt_large_640 or"):
        released_model("eomt", "coco_panoptic_eomt_large_64")


@pytest.mark.parametrize(
    ("source", "model_id"),
    [
        ("tue-mps/coco_instance_eomt_large_640", "coco_instance_eomt_large_640"),
        ("weights/coco_instance_eomt_large_640/pytorch_model.bin", "coco_instance_eomt_large_640"),
        ("weights/coco_instance_eomt_large_640.bin", "coco_instance_eomt_large_640"),
        ("/c/models--tue-mps--coco_instance_eomt_large_640/snapshots/1/x.bin", "coco_instance_eomt_large_640"),
        ("tue-mps/coco_instance_eomt_large_640_dinov3", "coco_instance_eomt_large_640_dinov3"),
        ("weights/my_coco_instance_eomt_large_640/x.bin", None),
        ("coco_instance_eomt_large_640/run3/x.bin", None),
        ("coco_instance_eomt_large_640/last.ckpt", None),
    ],
)
def test_released_models_are_recognised_by_their_whole_name(source, model_id):
    found = recognise_released_model("eomt", source)
    assert (found.id if found else None) == model_id


def test_a_released_model_comes_with_everything(tmp_path, monkeypatch):
    """The whole way for a model of the catalogue, but for the width of its backbone."""
    monkeypatch.setitem(official_catalogue._BACKBONES, "large", (32, 4))
    sizes = {"num_query_layers": 4, "num_queries": 200, "image_size": 640, "num_labels": 133}
    model = tiny_eomt(**sizes, masked_attention_probabilities=[0.0] * 4)
    source = tmp_path / "coco_panoptic_eomt_large_640"
    source.mkdir()
    torch.save(official_state_dict(model), source / "pytorch_model.bin")
    convert("official-eomt", str(source), tmp_path / "out", ConversionOptions(fields=HEADS))
    loaded = EoMTForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label[132] == "rug-merged"
    assert loaded.config.masked_attention_probabilities == [0.0] * 4
    processor = EoMTImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.task, processor.stuff_classes) == ("panoptic", list(range(80, 133)))
    assert (processor.threshold, processor.overlap_mask_area_threshold) == (0.8, 0.8)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "license: mit",
        "base_model: tue-mps/coco_panoptic_eomt_large_640",
        "value: 56.0",
        "| 132 | rug-merged",
    ):
        assert text in card
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == [{"task": "panoptic", "dataset": "COCO panoptic", "split": "val2017", "metrics": {"PQ": 56.0}}]

    # Changed in size it is another model, whose figures nobody measured.
    fields = {**HEADS, "image_size": 64}
    convert("official-eomt", str(source), tmp_path / "small", ConversionOptions(fields=fields))
    assert not (tmp_path / "small" / "results.json").exists()
    assert "the image size was changed" in (tmp_path / "small" / "README.md").read_text()

    with pytest.raises(ValueError, match=r"this is not ade20k_panoptic_eomt_large_640.*num_labels is 133 in the file"):
        convert(
            "official-eomt",
            str(source),
            tmp_path / "wrong",
            ConversionOptions(fields=HEADS, model="ade20k_panoptic_eomt_large_640"),
        )
    with pytest.raises(ValueError, match="cannot be converted: its backbone"):
        convert("official-eomt", "tue-mps/coco_panoptic_eomt_7b_640", tmp_path / "wrong", ConversionOptions())
