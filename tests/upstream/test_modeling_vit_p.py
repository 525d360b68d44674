"""The part of Transformers' common model tests that applies to ViT-P (`make test-upstream`)."""

import unittest

import pytest
import torch

from hf_segvit import ViTPConfig, ViTPForPointClassification, ViTPModel

from .common_tests import folder, import_common

if folder() is None:
    pytest.skip("needs HF_SEGVIT_TRANSFORMERS_TESTS; run `make test-upstream`", allow_module_level=True)

pytestmark = pytest.mark.slow
common = import_common("test_modeling_common")


class BodyTester:
    """What the mixin asks of a model's tester: a config and inputs that fit it."""

    is_training = False  # it has no loss
    prompt_attention = "joint"
    batch_size = 3
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 32
    num_prompts = 4
    seq_length = encoder_seq_length = 4 + 16
    num_channels = 3

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> ViTPConfig:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        return ViTPConfig(**sizes, image_size=56, prompt_attention=self.prompt_attention, num_labels=5)

    def prepare_config_and_inputs_for_common(self):
        pixels = torch.randn(self.batch_size, self.num_channels, 56, 56)
        return self.get_config(), {"pixel_values": pixels, "prompts": torch.rand(self.batch_size, 4, 4)}


class HeadTester(BodyTester):
    is_training = True


class IsolatedTester(HeadTester):
    prompt_attention = "isolated"


class Shared:
    test_resize_embeddings = False
    test_torch_exportable = False
    is_encoder_decoder = False
    additional_model_inputs = ("prompts",)
    has_attentions = True
    inputs_class: type[BodyTester]

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = self.inputs_class(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is ViTPForPointClassification:
            inputs["labels"] = torch.zeros(3, 4, dtype=torch.int64)
        return inputs

    def skip_embeddings(self) -> None:
        self.skipTest("an image model has no token embeddings")

    test_model_get_set_embeddings = test_inputs_embeds = skip_embeddings


class ViTPBodyCommonTest(Shared, common.ModelTesterMixin, unittest.TestCase):
    inputs_class = BodyTester
    all_model_classes = (ViTPModel,)


class Headed(Shared):
    def test_torch_save_load(self) -> None:
        self.skipTest("it takes the maximum of the table of CLS tokens, which is empty")


class ViTPCommonTest(Headed, common.ModelTesterMixin, unittest.TestCase):
    inputs_class = HeadTester
    all_model_classes = (ViTPForPointClassification,)


class ViTPIsolatedCommonTest(Headed, common.ModelTesterMixin, unittest.TestCase):
    inputs_class = IsolatedTester
    all_model_classes = (ViTPForPointClassification,)

    def test_retain_grad_hidden_states_attentions(self) -> None:
        self.skipTest("weights of prompts and image are two tensors, put side by side only to be returned")
