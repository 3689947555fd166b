"""transformers' own common model tests of the vision tower and the LLaVA.

They are not in its wheel; give a source tree of the installed version:
``TRANSFORMERS_SRC=/path/to/transformers pytest tests/test_transformers_common.py``.
"""

import importlib
import os
import sys
import tempfile
import unittest
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tower_parts import GRID, IMAGE, expert_entries, save_clip, text_config

from tove_llava.llava import ToveLlavaConfig, ToveLlavaForConditionalGeneration
from tove_llava.tower import ToveVisionConfig, ToveVisionModel

TREE = os.environ.get("TRANSFORMERS_SRC")
if not TREE:
    pytest.skip("TRANSFORMERS_SRC names no source tree of transformers", allow_module_level=True)
pytest.importorskip("parameterized", reason="transformers' tests need the package 'parameterized'")


def theirs(module):
    """Import a module of the tree's ``tests`` package, and no other's."""
    package = sys.modules.get("tests")
    if package is None or not str(getattr(package, "__file__", "")).startswith(TREE):
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]
        sys.path.insert(0, TREE)
        importlib.invalidate_caches()
    return importlib.import_module(f"tests.{module}")


common = theirs("test_modeling_common")
generation = theirs("generation.test_utils")
configuration = theirs("test_configuration_common")

BATCH, TEXT = 3, 7
IMAGE_TOKEN = 3


@lru_cache(maxsize=1)
def parts():
    """Make a folder with CLIP and two experts for the process's lifetime."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    return folder, save_clip(root / "clip", layers=2), expert_entries(root, ("depth", "edge"))


def vision_config():
    _, clip, experts = parts()
    return ToveVisionConfig.from_sources(clip, experts, projection_dim=10)


class ReadyTower(ToveVisionModel):
    """A tower that loads its backbones off ``meta``, like ``from_pretrained``."""

    def init_weights(self):
        super().init_weights()
        if self.device.type != "meta":
            self.load_backbones()


class ReadyLlava(ToveLlavaForConditionalGeneration):
    def init_weights(self):
        super().init_weights()
        if self.tower.device.type != "meta":
            self.tower.load_backbones()


class VisionTester:
    is_training = True
    batch_size, seq_length, hidden_size = BATCH, GRID**2, 16
    num_hidden_layers, num_attention_heads, image_size, patch_size = 2, 2, IMAGE, IMAGE // GRID

    def get_config(self):
        return vision_config()

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": common.floats_tensor([BATCH, 3, IMAGE, IMAGE])}


class LlavaTester:
    is_training = True
    batch_size, seq_length, hidden_size = BATCH, TEXT + GRID**2, 24
    num_hidden_layers, num_attention_heads, vocab_size, pad_token_id = 2, 2, 64, 0

    def get_config(self):
        text = text_config(num_attention_heads=2)
        return ToveLlavaConfig(vision_config=vision_config(), text_config=text, image_token_index=IMAGE_TOKEN)

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([BATCH, self.seq_length], self.vocab_size - 4) + 4
        ids[:, : GRID**2] = IMAGE_TOKEN
        pixels = common.floats_tensor([BATCH, 3, IMAGE, IMAGE])
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def skipped(reason):
    return unittest.skip(reason)(lambda self: None)


ONE_STATE = "the tower returns one hidden state, T', and keeps no list of its encoders' states"


class TestVisionTower(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ReadyTower,)
    has_attentions = False
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = VisionTester()
        properties = ["hidden_size", "image_size", "patch_size", "num_channels", "clip_source"]
        self.config_tester = configuration.ConfigTester(
            self, config_class=ToveVisionConfig, has_text_modality=False, common_properties=properties
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    test_hidden_states_output = skipped(ONE_STATE)
    test_model_get_set_embeddings = skipped("the patch embedding is CLIP's, which is frozen and not a submodule")
    test_training = skipped("a vision tower has no loss of its own; these tests train it within the LLaVA")


class TestLlava(common.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (ReadyLlava,)
    _is_composite = True

    def setUp(self):
        self.model_tester = LlavaTester()
        properties = ["image_token_index", "vision_feature_layer", "image_seq_length"]
        self.config_tester = configuration.ConfigTester(
            self, config_class=ToveLlavaConfig, has_text_modality=False, common_properties=properties
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:  # which transformers does for models that it lists by name
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    test_get_image_features_attentions = skipped("the tower's frozen encoders return tokens, not attentions")
    test_get_image_features_hidden_states = skipped(ONE_STATE)
    test_inherits_generation_mixin = skipped("GenerationMixin comes from LlavaForConditionalGeneration, its base class")
