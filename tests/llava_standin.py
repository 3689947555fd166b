"""Stand in for the part of haotian-liu/LLaVA that a vision tower meets.

Written for these tests from what that repository's code asks of a tower; test_llava_original.py runs the real one.
"""

import sys
import types

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

BUILDER, ARCH = "llava.model.multimodal_encoder.builder", "llava.model.llava_arch"
IMAGE_ID = -200


class OwnTower(nn.Module):
    """The tower that the original function returns."""


def install(monkeypatch):
    """Put the package into ``sys.modules``; return its modules and model class."""
    names = ["llava", "llava.model", "llava.model.multimodal_encoder", BUILDER, ARCH]
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, attribute = name.rpartition(".")
        if parent:
            setattr(modules[parent], attribute, module)
    builder, arch = modules[BUILDER], modules[ARCH]

    def build_vision_tower(vision_tower_cfg, **kwargs):
        """Builds LLaVA's own."""
        return OwnTower()

    builder.build_vision_tower = arch.build_vision_tower = build_vision_tower
    return builder, arch, make_model_class(arch)


def make_model_class(arch):
    def projector(config):
        if config.mm_projector_type == "identity":
            return nn.Identity()
        first = nn.Linear(config.mm_hidden_size, config.hidden_size)
        if config.mm_projector_type == "linear":
            return first
        return nn.Sequential(first, nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size))

    class LlavaMetaModel:
        def __init__(self, config):
            super().__init__(config)
            if hasattr(config, "mm_vision_tower"):
                self.vision_tower = arch.build_vision_tower(config, delay_load=True)
                self.mm_projector = projector(config)

        def get_vision_tower(self):
            tower = getattr(self, "vision_tower", None)
            return tower[0] if isinstance(tower, list) else tower

        def initialize_vision_modules(self, args, in_list=False):
            self.config.mm_vision_tower = args.vision_tower
            if self.get_vision_tower() is None:
                tower = arch.build_vision_tower(args)
                self.vision_tower = [tower] if in_list else tower
            else:
                self.get_vision_tower().load_model()
            self.config.mm_hidden_size = self.get_vision_tower().hidden_size
            self.config.mm_projector_type = args.mm_projector_type
            self.config.mm_vision_select_layer = args.mm_vision_select_layer
            if getattr(self, "mm_projector", None) is None:
                self.mm_projector = projector(self.config)
            if args.pretrain_mm_mlp_adapter is not None:
                saved = torch.load(args.pretrain_mm_mlp_adapter, weights_only=True)
                marker = "mm_projector."
                self.mm_projector.load_state_dict({k.split(marker)[1]: v for k, v in saved.items() if marker in k})

    class LlavaMetaForCausalLM:
        def get_vision_tower(self):
            return self.model.get_vision_tower()

    class Model(LlavaMetaModel, LlamaModel):
        pass

    class ForCausalLM(LlamaForCausalLM, LlavaMetaForCausalLM):
        def __init__(self, config):
            super(LlamaForCausalLM, self).__init__(config)
            self.model = Model(config)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids=None, attention_mask=None, labels=None, images=None, return_dict=None):
            """Put one image before each row's text."""
            embeddings = self.model.embed_tokens(input_ids)
            if images is not None:
                seen = self.model.mm_projector(self.get_vision_tower()(images)).to(embeddings.dtype)
                embeddings = torch.cat([seen, embeddings], dim=1)
                if labels is not None:
                    labels = torch.cat([torch.full(seen.shape[:2], -100), labels], dim=1)
            return super().forward(inputs_embeds=embeddings, labels=labels)

    arch.LlavaMetaModel, arch.LlavaMetaForCausalLM = LlavaMetaModel, LlavaMetaForCausalLM
    return ForCausalLM


def model_config(**keys):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=64, max_position_embeddings=128, **{**sizes, **keys})


def model_args(vision_tower, **keys):
    """LLaVA's ModelArguments."""
    defaults = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu"}
    defaults |= {"pretrain_mm_mlp_adapter": None, "mm_patch_merge_type": "flat"}
    return types.SimpleNamespace(vision_tower=vision_tower, **{**defaults, **keys})
