"""Fine-tuning calls of Transformers' guides: new classes through every class and Auto class that loads our models."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    EomtConfig,
    EomtForUniversalSegmentation,
)

from hf_segvit import (
    EoMTConfig,
    EoMTForUniversalSegmentation,
    EoMTModel,
    PlainViTConfig,
    PlainViTModel,
    ViTPConfig,
    ViTPForPointClassification,
    ViTPFusionConfig,
    ViTPFusionForUniversalSegmentation,
    ViTPModel,
)

from ..tiny_generators import LABELS, tiny_classifier
from ..tiny_models import tiny_eomt

NAMES = {0: "sky", 1: "cat", 2: "dog"}
UNNAMED = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
ASKED = [
    ({"num_labels": 3}, UNNAMED),
    ({"id2label": NAMES}, NAMES),
    ({"id2label": {str(label): name for label, name in NAMES.items()}}, NAMES),
    ({"num_labels": 3, "id2label": NAMES}, NAMES),
    ({"id2label": NAMES, "label2id": {name: label for label, name in NAMES.items()}}, NAMES),
    ({"label2id": {name: label for label, name in NAMES.items()}}, NAMES),
    ({"id2label": ["sky", "cat", "dog"]}, NAMES),
]
LOADERS = {
    "eomt": (EoMTConfig, EoMTForUniversalSegmentation, EoMTModel, AutoModelForUniversalSegmentation, AutoModel),
    "vit_p": (ViTPConfig, ViTPForPointClassification, ViTPModel, AutoModel),
    "fusion": (
        ViTPFusionConfig,
        ViTPFusionForUniversalSegmentation,
        AutoModelForUniversalSegmentation,
        AutoModelForSemanticSegmentation,
    ),
    "plain_vit": (PlainViTConfig, PlainViTModel, AutoModel),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of five classes of each type."""
    folder = tmp_path_factory.mktemp("checkpoints")
    eomt = tiny_eomt(id2label=LABELS)
    fused = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        tiny_eomt(id2label=LABELS), tiny_classifier(dict(enumerate(reversed(LABELS.values())))), stuff_classes=[4]
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    plain = PlainViTModel(PlainViTConfig(**sizes, image_size=64, id2label=LABELS))
    for name, model in {"eomt": eomt, "vit_p": tiny_classifier(), "fusion": fused, "plain_vit": plain}.items():
        model.save_pretrained(folder / name)
    return folder


def check_labels(config, names):
    assert config.id2label == names
    assert config.label2id == {name: label for label, name in names.items()}
    assert config.num_labels == len(names)


def head_sizes(model):
    """Outputs of every layer that classifies."""
    sizes = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("class_predictor", "classifier") and isinstance(module, torch.nn.Linear):
            sizes[name] = module.out_features
    return sizes


@pytest.mark.parametrize(("settings", "names"), ASKED, ids=[" ".join(settings) for settings, _ in ASKED])
@pytest.mark.parametrize("kind", LOADERS)
def test_new_classes_through_every_loader(folders, kind, settings, names):
    config_class, *model_classes = LOADERS[kind]
    for loader in (config_class, AutoConfig):
        check_labels(loader.from_pretrained(folders / kind, **settings), names)
        config, unused = loader.from_pretrained(folders / kind, return_unused_kwargs=True, odd=1, **settings)
        check_labels(config, names)
        assert unused == {"odd": 1}
    for loader in model_classes:
        model = loader.from_pretrained(folders / kind, ignore_mismatched_sizes=True, **settings)
        check_labels(model.config, names)
        if kind == "fusion":
            check_labels(model.generator.config, names)
            check_labels(model.classifier.config, names)
            assert head_sizes(model) == {"generator.class_predictor": 4, "classifier.classifier": 3}
            assert model.config.stuff_classes == [], "those of the old classes mean nothing now"
            assert model.label_match.class_matches == (0, 1, 2)
        else:
            assert set(head_sizes(model).values()) <= {4 if kind == "eomt" else 3}
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_rest_of_the_weights_stays_and_a_step_can_be_made(folders):
    before = EoMTForUniversalSegmentation.from_pretrained(folders / "eomt")
    model = EoMTForUniversalSegmentation.from_pretrained(folders / "eomt", num_labels=3, ignore_mismatched_sizes=True)
    for name, value in before.state_dict().items():
        if not name.startswith(("class_predictor", "criterion")):
            assert torch.equal(value, model.state_dict()[name]), name
    masks, labels = torch.zeros(1, 1, 64, 64), torch.tensor([2])
    masks[..., :32] = 1
    loss = model(torch.rand(1, 3, 64, 64), mask_labels=[masks[0]], class_labels=[labels]).loss
    loss.backward()
    assert torch.isfinite(loss)
    with pytest.raises(ValueError, match="3"):
        model(torch.rand(1, 3, 64, 64), mask_labels=[masks[0]], class_labels=[labels + 1])


@pytest.mark.parametrize("kind", ["eomt", "vit_p", "fusion"])
def test_without_the_flag_the_error_names_it(folders, kind):
    with pytest.raises(ValueError, match=rf"{kind} do not fit .*ignore_mismatched_sizes=True"):
        LOADERS[kind][1].from_pretrained(folders / kind, num_labels=3)


def test_as_many_classes_as_before_keep_their_weights(folders):
    renamed = {label: name.upper() + "S" for label, name in LABELS.items()}
    model = ViTPFusionForUniversalSegmentation.from_pretrained(folders / "fusion", id2label=renamed)
    before = ViTPFusionForUniversalSegmentation.from_pretrained(folders / "fusion")
    check_labels(model.config, renamed)
    assert model.config.stuff_classes == [4]
    # The classifier numbers the classes the other way round.
    assert model.label_match.class_matches == before.label_match.class_matches == (4, 3, 2, 1, 0)
    for name, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    same = EoMTForUniversalSegmentation.from_pretrained(folders / "eomt", num_labels=5)
    check_labels(same.config, LABELS)


def test_a_checkpoint_of_transformers_gets_new_classes_too(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "num_blocks": 2}
    config = EomtConfig(**sizes, image_size=64, patch_size=16, num_queries=7, num_upscale_blocks=2, id2label=LABELS)
    EomtForUniversalSegmentation(config).save_pretrained(tmp_path)
    for settings, names in ASKED[:4]:
        for cls in (EoMTForUniversalSegmentation, EomtForUniversalSegmentation):
            model = cls.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **settings)
            assert {int(label): name for label, name in model.config.id2label.items()} == names
            assert model.class_predictor.out_features == 4


def test_contradictions_are_still_refused(folders):
    load = EoMTForUniversalSegmentation.from_pretrained
    with pytest.raises(ValueError, match="num_labels=2, but id2label names 3 classes"):
        load(folders / "eomt", num_labels=2, id2label=NAMES, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="id2label='sky' must map label ids to names"):
        load(folders / "eomt", id2label="sky", ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="num_labels=0 must be a whole number"):
        load(folders / "eomt", num_labels=0, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match=r"not 0 to 1"):
        load(folders / "eomt", id2label={1: "sky", 2: "cat"}, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="disagrees with id2label"):
        EoMTConfig(num_labels=2, id2label=NAMES)
