"""Official ViT-P checkpoints: read exactly, completed by the catalogue, refused where they are not what they seem."""

import pytest
import torch
from safetensors.torch import save_file

from hf_segvit.cli import main
from hf_segvit.conversion import official_catalogue as catalogue
from hf_segvit.conversion.official_vit_p import read_official_vit_p
from hf_segvit.conversion.options import ConversionOptions
from hf_segvit.conversion.sources import from_official_vit_p
from hf_segvit.hub.push import plan_push
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification

HEADS = {"num_attention_heads": 2}
SIZE, DEPTH, GRID, NUM_LABELS = 32, 2, 3, 5


def official_state_dict(num_columns: int = 2) -> dict[str, torch.Tensor]:
    """What the official code saves, of a tiny model with random weights."""
    shapes = {
        "pos_embed": (1, 1 + GRID * GRID, SIZE),
        "mask_token": (1, SIZE),
        "patch_embed.proj.weight": (SIZE, 3, 14, 14),
        "patch_embed.proj.bias": (SIZE,),
        "cls_embeddings.weight": (SIZE, num_columns),
        "norm.weight": (SIZE,),
        "norm.bias": (SIZE,),
        "head.weight": (NUM_LABELS, SIZE),
        "head.bias": (NUM_LABELS,),
    }
    for index in range(DEPTH):
        for name, shape in {
            "norm1.weight": (SIZE,),
            "norm1.bias": (SIZE,),
            "attn.qkv.weight": (3 * SIZE, SIZE),
            "attn.qkv.bias": (3 * SIZE,),
            "attn.proj.weight": (SIZE, SIZE),
            "attn.proj.bias": (SIZE,),
            "ls1.gamma": (SIZE,),
            "norm2.weight": (SIZE,),
            "norm2.bias": (SIZE,),
            "mlp.fc1.weight": (4 * SIZE, SIZE),
            "mlp.fc1.bias": (4 * SIZE,),
            "mlp.fc2.weight": (SIZE, 4 * SIZE),
            "mlp.fc2.bias": (SIZE,),
            "ls2.gamma": (SIZE,),
        }.items():
            shapes[f"blocks.{index}.{name}"] = shape
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(path, state_dict) -> str:
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, path)
    return str(path)


def read(path, **fields):
    return read_official_vit_p(str(path), ConversionOptions(fields={**HEADS, **fields}))


def test_every_weight_finds_its_place(tmp_path):
    official = official_state_dict()
    result = read(write(tmp_path / "x.safetensors", official))
    ours = result.state_dict
    encoder = ours["vit_p.prompt_encoder.weight"]
    assert torch.equal(encoder[:, 0], official["cls_embeddings.weight"][:, 1])  # x was the second column
    assert torch.equal(encoder[:, 1], official["cls_embeddings.weight"][:, 0])
    assert not encoder[:, 2:].any()
    assert torch.equal(ours["vit_p.prompt_position_embedding"], official["pos_embed"][0, :1])
    assert torch.equal(ours["vit_p.embeddings.position_embeddings.weight"], official["pos_embed"][0, 1:])
    assert torch.equal(ours["classifier.weight"], official["head.weight"])
    packed = official["blocks.1.attn.qkv.weight"]
    assert torch.equal(ours["vit_p.layers.1.attention.k_proj.weight"], packed[SIZE : 2 * SIZE])
    total = sum(tensor.numel() for name, tensor in official.items() if name != "mask_token")
    assert sum(tensor.numel() for tensor in ours.values()) == total + 2 * SIZE
    assert result.fields["image_size"] == GRID * 14
    assert result.num_labels == NUM_LABELS
    assert any("left out mask_token" in note for note in result.notes)


@pytest.mark.parametrize("kind", ["flat", "module", "teacher", "backbone", "lightning"])
def test_every_wrapping_is_the_same_file(tmp_path, kind):
    official = official_state_dict()
    content = {
        "flat": official,
        "module": {f"module.{name}": tensor for name, tensor in official.items()},
        "teacher": {"teacher": {f"backbone.{name}": tensor for name, tensor in official.items()}},
        "backbone": {f"teacher.backbone.{name}": tensor for name, tensor in official.items()},
        "lightning": {"state_dict": official, "epoch": 3},
    }[kind]
    torch.save(content, tmp_path / "x.pth")
    result = read(tmp_path / "x.pth")
    expected = read(write(tmp_path / "flat.safetensors", official))
    assert result.state_dict.keys() == expected.state_dict.keys()
    assert all(torch.equal(result.state_dict[name], tensor) for name, tensor in expected.state_dict.items())


def test_a_cls_token_left_from_pretraining_is_ignored_and_named(tmp_path):
    official = {**official_state_dict(), "cls_token": torch.ones(1, 1, SIZE)}
    result = read(write(tmp_path / "x.safetensors", official))
    assert any("left out cls_token" in note for note in result.notes)
    assert result.state_dict["vit_p.embeddings.cls_token"].shape == (1, 0, SIZE)


def test_four_columns_need_their_order(tmp_path):
    official = official_state_dict(num_columns=4)
    path = write(tmp_path / "x.safetensors", official)
    with pytest.raises(ValueError, match=r"four columns.*prompt_columns=x,y,w,h"):
        read(path)
    encoder = read(path, prompt_columns=["y", "x", "h", "w"]).state_dict["vit_p.prompt_encoder.weight"]
    assert torch.equal(encoder, official["cls_embeddings.weight"][:, [1, 0, 3, 2]])
    with pytest.raises(ValueError, match="name each of x, y, w, h once"):
        read(path, prompt_columns=["x", "x", "h", "w"])
    two = write(tmp_path / "y.safetensors", official_state_dict())
    swapped = read(two, prompt_columns=["x", "y"]).state_dict["vit_p.prompt_encoder.weight"]
    assert torch.equal(swapped[:, :2], official_state_dict()["cls_embeddings.weight"])


def test_the_command_writes_a_folder_that_classifies(tmp_path, capsys):
    path = write(tmp_path / "x.safetensors", official_state_dict())
    (tmp_path / "labels.txt").write_text("sky\nroad\ncar\ntree\nsign\n")
    words = [path, str(tmp_path / "out"), "--labels", str(tmp_path / "labels.txt")]
    assert main(["convert", "official-vit-p", *words, "--set", "num_attention_heads=2", "image_size=28,56"]) == 0
    printed = capsys.readouterr().out
    assert "answers depend on how many points are asked" in printed
    model = ViTPForPointClassification.from_pretrained(tmp_path / "out").eval()
    processor = ViTPImageProcessor.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        outputs = model(**processor(torch.rand(3, 20, 30), input_points=[[3, 4], [29, 19]]))
    answer = processor.post_process_point_classification(outputs)[0]
    assert outputs.logits.shape == (1, 2, NUM_LABELS)
    assert [row[0] in model.config.id2label.values() for row in answer["labels"]] == [True, True]
    assert model.config.id2label[4] == "sign"
    assert "point classifier (ViT-P" in (tmp_path / "out" / "README.md").read_text()
    plan = plan_push(tmp_path / "out", "tester/points")
    assert "Prompts see one another" in plan.files["README.md"]
    assert "modeling_vit_p.py" in plan.files
    assert '"AutoModel": "modeling_vit_p.ViTPModel"' in plan.files["config.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("cls_embeddings.weight"), "lacks cls_embeddings.weight; it looks like a backbone of timm"),
        (lambda w: w.pop("head.bias"), "lacks head.bias"),
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), "are missing, such as 'vit_p.layers.1.mlp.fc2.bias'"),
        (lambda w: w.update({"blocks.0.attn.extra": torch.ones(2)}), "the plain ViT lacks: blocks.0.attn.extra"),
        (lambda w: w.update({"norm.bias": torch.full((SIZE,), torch.nan)}), "norm.bias holds NaN"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 9, SIZE)}), "8 positions are not a square grid"),
    ],
)
def test_files_that_are_not_what_they_seem_are_refused(tmp_path, change, message):
    official = official_state_dict()
    change(official)
    path = write(tmp_path / "x.safetensors", official)
    with pytest.raises(ValueError, match=message):
        from_official_vit_p(path, ConversionOptions(fields=HEADS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": {}}, "width 32 is not a multiple of 64.*num_attention_heads"),
        ({"fields": {**HEADS, "num_queries": 4}}, "--set num_queries: for official ViT-P weights only"),
        ({"fields": {**HEADS, "image_size": 30}}, "image_size=30.*multiples of the patch size 14"),
        ({"fields": {**HEADS, "num_labels": 6}}, "the file's head knows 5 classes"),
        ({"fields": HEADS, "labels": "ade20k"}, "names 150 classes, but the file's head knows 5"),
        ({"fields": HEADS, "model": "model_ADE20k_base_250"}, "no released model.*model_ADE20k_base774"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    path = write(tmp_path / "x.safetensors", official_state_dict())
    with pytest.raises(ValueError, match=message):
        from_official_vit_p(path, ConversionOptions(**options))


def test_a_file_that_is_not_the_released_model_of_its_name_is_refused(tmp_path):
    path = write(tmp_path / "model_COCOStuff_711_200point.safetensors", official_state_dict())
    options = ConversionOptions(fields=HEADS)
    with pytest.raises(ValueError, match=r"model_COCOStuff_711_200point.*is 32 in the file and 1024"):
        from_official_vit_p(path, options)


def test_the_name_of_a_released_file_brings_labels_and_size(tmp_path, monkeypatch):
    """A tiny stand-in for the released Cityscapes model: its 19 classes, squashed to 1:2."""
    monkeypatch.setitem(catalogue._BACKBONES, "large", (SIZE, DEPTH))
    official = official_state_dict()
    official |= {"head.weight": torch.randn(19, SIZE), "head.bias": torch.randn(19)}
    torch.save(official, tmp_path / "model_Cityscapes871_100point_cocopretrain.pth")
    result = from_official_vit_p(
        str(tmp_path / "model_Cityscapes871_100point_cocopretrain.pth"), ConversionOptions(fields=HEADS)
    )
    assert result.model.config.id2label[18] == "bicycle"
    assert dict(result.processor.size) == {"height": 518, "width": 1036}
    assert any("asks 100" in line for line in result.lines)
    assert any("Mask2Former InternImage-H" in line for line in result.lines)


def test_the_catalogue_is_sound():
    models = catalogue.released_models("vit_p")
    assert len(models) == 6
    for name, model in models.items():
        assert model is catalogue.released_model("vit_p", f"{name}.pth")
        assert model is catalogue.recognise_released_model("vit_p", f"a/{name}.pth")
        assert model.repository == "Sajjad-Sh33/ViT-P"
        assert f"{model.num_prompts}point" in name
        assert model.backbone in ("dinov2_base", "dinov2_large")
        assert all(side % 14 == 0 for side in model.image_size)
        assert len(model.label_table.classes) == {"ade20k": 150, "coco_panoptic": 133, "cityscapes": 19}.get(
            model.labels, 171
        )
