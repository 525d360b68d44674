"""The part of Transformers' common model tests that applies to EoMT and the plain ViT (`make test-upstream`)."""

import unittest

import pytest
import torch

from hf_segvit import EoMTForUniversalSegmentation, EoMTModel, PlainViTConfig, PlainViTModel

from ..tiny_models import tiny_config
from .common_tests import folder, import_common

if folder() is None:
    pytest.skip("needs HF_SEGVIT_TRANSFORMERS_TESTS; run `make test-upstream`", allow_module_level=True)

pytestmark = pytest.mark.slow
common = import_common("test_modeling_common")


class Tester:
    """What the mixin asks of a model's tester: a config and inputs that fit it."""

    is_training = True
    batch_size = 3
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 32
    seq_length = encoder_seq_length = 21
    num_channels = 3

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self):
        return tiny_config(num_hidden_layers=2, num_query_layers=1)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.randn(self.batch_size, self.num_channels, 64, 64)}


class PlainViTTester(Tester):
    is_training = False  # it has no loss

    def get_config(self) -> PlainViTConfig:
        return PlainViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=64
        )


class Shared:
    test_resize_embeddings = False
    test_torch_exportable = False
    is_encoder_decoder = False
    has_attentions = True
    inputs_class: type[Tester]

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = self.inputs_class(self)

    def skip_embeddings(self) -> None:
        self.skipTest("an image model has no token embeddings")

    test_model_get_set_embeddings = test_inputs_embeds = skip_embeddings


class PlainViTCommonTest(Shared, common.ModelTesterMixin, unittest.TestCase):
    inputs_class = PlainViTTester
    all_model_classes = (PlainViTModel,)


class EoMTBodyTester(Tester):
    is_training = False  # it has no loss


class EoMT(Shared):
    def test_attention_outputs(self) -> None:
        self.skipTest("sequence length changes where the queries join; tests/test_modeling_eomt.py has the values")

    def test_hidden_states_output(self) -> None:
        self.skipTest("sequence length changes where the queries join; tests/test_modeling_eomt.py has the values")


class EoMTBodyCommonTest(EoMT, common.ModelTesterMixin, unittest.TestCase):
    inputs_class = EoMTBodyTester
    all_model_classes = (EoMTModel,)


class EoMTCommonTest(EoMT, common.ModelTesterMixin, unittest.TestCase):
    inputs_class = Tester
    all_model_classes = (EoMTForUniversalSegmentation,)
    with_labels = True

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and self.with_labels:
            inputs["mask_labels"] = [torch.rand(2, 64, 64) > 0.5 for _ in range(3)]
            inputs["class_labels"] = [torch.tensor([0, 1]) for _ in range(3)]
        return inputs

    def test_model_outputs_equivalence(self) -> None:
        self.with_labels = False  # the loss draws points at random, so two calls differ
        super().test_model_outputs_equivalence()
