"""Models to measure.

Where a preset's sources are on this machine their weights are loaded; else, or on request, every part is built at its
true size with the initial values of its library. Speed does not depend on the values, and the results say which it was.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from measuring import GB
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from tove_llava.core.errors import ConfigError
from tove_llava.core.sources import Source
from tove_llava.experts import Expert, ExpertHub
from tove_llava.llava import ToveLlavaForConditionalGeneration
from tove_llava.llava.build import assemble, build_model, grow_vocabulary, vision_config
from tove_llava.presets import Preset
from tove_llava.tower import ToveVisionModel

if TYPE_CHECKING:
    from common import Bench


def is_local(source: str) -> bool:
    """Tell if a source's weights are in a local folder or file."""
    path = Source.parse(source).path
    return path is not None and path.exists()


def vision_sources(preset: Preset) -> list[str]:
    """List the sources of CLIP and the experts."""
    config = vision_config(preset.vision, offline=True)
    return [config.clip_source, *(spec.source for spec in config.expert_specs)]


def build_tower(bench: "Bench", weights: str) -> ToveVisionModel:
    """Build the preset's tower with its backbones, in eval mode."""
    torch.manual_seed(bench.args.seed)
    tower = ToveVisionModel(vision_config(bench.preset.vision, offline=weights == "random"))
    tower.to(device=bench.device, dtype=bench.dtype)
    if weights == "random":
        random_backbones(tower)
    else:
        tower.load_backbones()
    return tower.eval()


def build_llava(bench: "Bench", weights: str) -> ToveLlavaForConditionalGeneration:
    """Build the preset's model with its backbones and its image token."""
    preset, device, dtype = bench.preset, bench.device, bench.dtype
    if weights == "source":
        return build_model(preset, dtype=dtype, device=device, seed=bench.args.seed)[0]
    torch.manual_seed(bench.args.seed)
    if preset.language.config is not None:
        config = AutoConfig.for_model(**preset.language.config)
    else:
        config = AutoConfig.from_pretrained(**Source.parse(preset.language.source).pretrained())
    with torch.device("meta"):
        need = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, dtype=dtype).parameters())
    require_memory(need * dtype.itemsize, device, "the language model")
    with device:
        language = AutoModelForCausalLM.from_config(config, dtype=dtype)
    vision = vision_config(preset.vision, offline=True)
    model = assemble(language, vision, preset.projector, seed=bench.args.seed).to(device)
    model.config.image_token_index = config.vocab_size  # one more token, as the processor of a real model adds
    grow_vocabulary(model, config.vocab_size + 1)
    random_backbones(model.tower)
    return model


def random_backbones(tower: ToveVisionModel) -> None:
    """Give a tower true-size CLIP and experts with initial values.

    In the library a backbone without weights is an error. Networks are built on the tower's device, not on the meta
    device: some compute buffers (such as rotary tables) when they are built.

    Raises:
        ConfigError: the weights do not fit into the device's free memory.
    """
    hub = ExpertHub(tower.config.experts)
    need = sum(count_parameters(hub[name].meta_twin()) for name in hub.names)
    require_memory(need * 4, tower.device, "the experts")  # libraries build in float32
    tower.frozen.clip = whole_clip(tower, layers=tower.config.num_clip_layers)
    tower.frozen.clip.post_layernorm = nn.Identity()
    for name in hub.names:
        fill_randomly(hub[name], tower.device)
    tower.frozen.hub = hub
    tower.frozen.apply(lambda t: t.to(tower.device, tower.dtype if t.is_floating_point() else None))


def fill_randomly(expert: Expert, device: torch.device) -> None:
    """Build an expert's network on the device with initial values."""
    expert.describe()  # reads the configuration that build() needs
    with device:
        network = expert.build(pretrained=False)
    expert.backbone = network.eval().requires_grad_(False)


def whole_clip(tower: ToveVisionModel, layers: int | None = None) -> CLIPVisionModel:
    """Build a random CLIP of the tower's configuration."""
    config = tower.config.clip_config
    layers = config.num_hidden_layers if layers is None else layers
    config = CLIPVisionConfig(**{**config.to_dict(), "num_hidden_layers": layers})
    config._attn_implementation = tower.config._attn_implementation
    with tower.device:
        return CLIPVisionModel(config).to(tower.dtype).eval().requires_grad_(False)


def count_parameters(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def weight_bytes(*modules: nn.Module | None) -> int:
    """Count the bytes of parameters and buffers, each tensor once."""
    tensors = {id(t): t for m in modules if m is not None for t in (*m.parameters(), *m.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """Raise ConfigError where the device has less free memory than ``needed`` bytes."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
    if needed > free:
        raise ConfigError(
            f"{what} of this preset needs {needed / GB:.1f} GB and {device.type} has {free / GB:.1f} GB free; "
            "run it with --device cuda on a larger GPU, or with a smaller preset"
        )


def _available_memory() -> int:
    """Return the bytes that programs can still get, caches included."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
