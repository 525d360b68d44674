"""Backbone families of other packages: found by their entry points or given, and refused where something is missing."""

import json
import sys

import pytest
import torch
from torch import nn

from hf_segvit.cli import main
from hf_segvit.conversion.backbones import convert_backbone
from hf_segvit.conversion.families import FAMILIES, offered_families
from hf_segvit.conversion.families.source import BackboneFamily, SourceBackbone, checked_family
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.models.modeling_plain_vit import PlainViTModel

from .tiny_models import randomize

# A model of a stranger's, with names of its own, and the family that converts it.
PACKAGE = """
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_segvit.conversion.families.source import SourceBackbone, last_hidden_state
from hf_segvit.conversion.key_maps import POSITION_TABLE, fill_absent, fold_prefix_positions, rename, unpack


class StrangeConfig(PreTrainedConfig):
    model_type = "segvit_strange"
    width: int = 32
    heads: int = 2
    image_size: int = 64


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, tokens):
        packed = self.qkv(self.before_attention(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(attended)
        return tokens + self.second(nn.functional.gelu(self.first(self.before_mlp(tokens))))


class StrangeModel(PreTrainedModel):
    config_class = StrangeConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.width, 16, 16)
        self.where = nn.Parameter(torch.zeros(1, (config.image_size // 16) ** 2 + 1, config.width))
        self.summary = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(2))
        self.last = nn.LayerNorm(config.width, 1e-6)
        self.post_init()

    def forward(self, pixel_values):
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.summary.expand(len(patches), -1, -1), patches), 1) + self.where
        for block in self.blocks:
            tokens = block(tokens)
        return BaseModelOutput(last_hidden_state=self.last(tokens))


AutoConfig.register("segvit_strange", StrangeConfig, exist_ok=True)
AutoModel.register(StrangeConfig, StrangeModel, exist_ok=True)

FAMILY = "strange ViT"
MODELS = ("segvit_strange",)
features = last_hidden_state
KEY_MAP = (
    (r"where", POSITION_TABLE),
    (r"summary", r"embeddings.cls_token"),
    (r"patches\\.(.+)", r"embeddings.patch_embeddings.projection.\\1"),
    (r"last\\.(.+)", r"layernorm.\\1"),
    (r"blocks\\.(\\d+)\\.before_attention\\.(.+)", r"layers.\\1.norm1.\\2"),
    (r"blocks\\.(\\d+)\\.before_mlp\\.(.+)", r"layers.\\1.norm2.\\2"),
    (r"blocks\\.(\\d+)\\.qkv\\.(.+)", r"layers.\\1.attention.qkv.\\2"),
    (r"blocks\\.(\\d+)\\.out\\.(.+)", r"layers.\\1.attention.out_proj.\\2"),
    (r"blocks\\.(\\d+)\\.first\\.(.+)", r"layers.\\1.mlp.fc1.\\2"),
    (r"blocks\\.(\\d+)\\.second\\.(.+)", r"layers.\\1.mlp.fc2.\\2"),
)


def convert(model, state_dict):
    weights = fold_prefix_positions(unpack(rename(state_dict, KEY_MAP, (), FAMILY)), 1)
    side = model.config.image_size // 16
    settings = {"num_attention_heads": model.config.heads, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    return SourceBackbone(fill_absent(weights), (side, side), settings)
"""


@pytest.fixture
def installed(tmp_path_factory, monkeypatch):
    """A function that installs a package of one module, with its entry points, for the duration of a test."""
    modules = []

    def install(name: str, source: str, **entry_points: str) -> None:
        site = tmp_path_factory.mktemp("site")
        (site / f"{name}.py").write_text(source)
        metadata = site / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{key} = {value}\n" for key, value in entry_points.items())
        (metadata / "entry_points.txt").write_text(f"[hf_segvit.backbones]\n{lines}")
        monkeypatch.syspath_prepend(site)
        modules.append(name)

    yield install
    for name in modules:
        sys.modules.pop(name, None)


@pytest.fixture
def strange(installed, tmp_path):
    """A folder of a stranger's model that was written in another process, as it were: its package is not imported."""
    installed("segvit_strange_vit", PACKAGE, strange="segvit_strange_vit")
    import segvit_strange_vit

    model = randomize(segvit_strange_vit.StrangeModel(segvit_strange_vit.StrangeConfig())).eval()
    model.save_pretrained(tmp_path / "strange")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "strange" / "preprocessor_config.json").write_text(json.dumps(settings))
    del sys.modules["segvit_strange_vit"]
    return tmp_path / "strange", model


def test_a_folder_of_a_strangers_family_is_found(strange):
    folder, theirs = strange
    pixel_values = torch.randn(2, 3, 64, 64)
    ours = PlainViTModel.from_backbone(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixel_values).last_hidden_state, theirs(pixel_values).last_hidden_state)
    model = EoMTForUniversalSegmentation.from_backbone(folder, image_size=96, num_queries=5, num_query_layers=1)
    assert model.eomt.embeddings.position_embeddings.weight.shape == (36, 32)
    assert torch.equal(model.eomt.layers[1].mlp.fc2.weight, theirs.blocks[1].second.weight)


def test_the_command_converts_and_compares_it(strange, tmp_path, capsys):
    folder, theirs = strange
    assert main(["convert", "backbone", str(folder), str(tmp_path / "out")]) == 0
    assert "checked: outputs equal those of strange ViT" in capsys.readouterr().out
    ours = PlainViTModel.from_pretrained(tmp_path / "out")
    assert torch.equal(ours.layernorm.bias, theirs.last.bias)
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.5] * 3, [0.25] * 3)
    assert main(["convert", "backbone", str(folder), str(tmp_path / "out"), "--set", "num_queries=3"]) == 2


def test_a_key_map_that_mixes_up_weights_is_noticed(strange, installed, tmp_path, capsys):
    folder, _ = strange
    mixed_up = PACKAGE.replace("norm1", "norm?").replace("norm2", "norm1").replace("norm?", "norm2")
    installed("segvit_strange_vit", mixed_up, strange="segvit_strange_vit")
    assert main(["convert", "backbone", str(folder), str(tmp_path / "out")]) == 2
    assert "does not compute what strange ViT does: last_hidden_state differs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Wrapped(nn.Module):
    """A model of no library, around one that is known."""

    def __init__(self, inner: PlainViTModel) -> None:
        super().__init__()
        self.inner = inner


class WrappedFamily:
    """A family as an object."""

    FAMILY = "wrapped"
    MODELS = (f"{__name__}.Wrapped",)

    def convert(self, model, state_dict):
        """See `BackboneFamily`."""
        weights = {name.removeprefix("inner."): tensor for name, tensor in state_dict.items()}
        return SourceBackbone(weights, model.inner.config.grid_size, {"num_attention_heads": 2})


def wrapped() -> Wrapped:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    return Wrapped(PlainViTModel(PlainViTModel.config_class(**sizes)))


def test_a_family_can_be_given():
    source = wrapped()
    with pytest.raises(ValueError, match="Wrapped is of no family that becomes a plain ViT; known are timm"):
        EoMTForUniversalSegmentation.from_backbone(source)
    model = EoMTForUniversalSegmentation.from_backbone(source, family=WrappedFamily(), num_query_layers=1)
    assert torch.equal(model.eomt.layers[1].norm2.weight, source.inner.layers[1].norm2.weight)
    fields, _ = convert_backbone(source, family=WrappedFamily())
    assert (fields["hidden_size"], fields["num_hidden_layers"]) == (32, 2)


def test_a_model_in_memory_is_found_by_its_class(installed):
    module = f"from {__name__} import WrappedFamily\nfamily = WrappedFamily()\n"
    installed("segvit_wrapping_object", module, wrapped="segvit_wrapping_object:family")
    source = wrapped()
    ours = PlainViTModel.from_backbone(source)
    assert torch.equal(ours.layers[0].mlp.fc1.weight, source.inner.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import segvit_absent_library", r"'bad' \(segvit_bad_family\).*No module named 'segvit_absent_library'.*fix"),
        ("FAMILY = 'x'", r"'bad' \(segvit_bad_family\).* lacks MODELS, convert\(model, state_dict\); see docs"),
        ("FAMILY, MODELS, convert = 'x', ('y',), 3", r"lacks convert\(model, state_dict\)"),
        ("FAMILY, MODELS = 'x', 'vit'\ndef convert(m, s): ...", r"MODELS is 'vit'; give a tuple"),
    ],
)
def test_what_a_family_lacks_is_named(installed, source, message):
    installed("segvit_bad_family", source, bad="segvit_bad_family")
    with pytest.raises(ValueError, match=message):
        offered_families()
    # Models of this package's own families do not ask it.
    assert PlainViTModel.from_backbone(wrapped().inner).config.hidden_size == 32


def test_two_packages_that_claim_a_model_are_refused(installed):
    module = f"from {__name__} import WrappedFamily\nfamily = WrappedFamily()\n"
    installed("segvit_wrapping_one", module, one="segvit_wrapping_one:family")
    installed("segvit_wrapping_two", module, two="segvit_wrapping_two:family")
    with pytest.raises(ValueError, match=r"families (one and two|two and one) both convert .*Wrapped; say which with"):
        PlainViTModel.from_backbone(wrapped())
    assert PlainViTModel.from_backbone(wrapped(), family=WrappedFamily()).config.hidden_size == 32


def test_what_a_given_family_hands_over_is_checked():
    class Wrong(WrappedFamily):
        def convert(self, model, state_dict):
            return dict(state_dict)

    with pytest.raises(ValueError, match="convert of the wrapped family gives a dict, no SourceBackbone"):
        PlainViTModel.from_backbone(wrapped(), family=Wrong())
    with pytest.raises(ValueError, match=r"WrappedFamily'> is a class; give an object of it"):
        PlainViTModel.from_backbone(wrapped(), family=WrappedFamily)
    with pytest.raises(ValueError, match=r"family=3 lacks FAMILY, MODELS, convert\(model, state_dict\)"):
        PlainViTModel.from_backbone(wrapped(), family=3)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.FAMILY)
def test_our_own_families_keep_to_the_interface(family: BackboneFamily):
    assert checked_family(family, "") is family
    assert callable(family.features)
    claims = [model for other in FAMILIES for model in other.MODELS]
    assert all(claims.count(model) == 1 for model in family.MODELS)
