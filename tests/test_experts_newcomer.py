"""A new expert is one class: run those of docs/guides/extend.md."""

import pytest
import torch
from docs_pages import DOCS, read_page
from safetensors.torch import save_file
from torch import nn

from tove_llava.core.errors import ConfigError
from tove_llava.experts import EXPERTS, ExpertHub, base, complete_specs, register_expert
from tove_llava.experts.cost import expert_cost


@pytest.fixture
def examples():
    """Run the page's experts; forget afterwards what they registered."""
    before = EXPERTS.names()
    names = {}
    for block in read_page(DOCS / "guides" / "extend.md").blocks:
        if block.file == "parts/texture.py":
            exec(compile(block.text, block.where, "exec"), names)
    yield names
    for name in set(EXPERTS.names()) - set(before):
        del EXPERTS._entries[name], base._families[name]


def test_the_page_s_expert_works(examples, tmp_path):
    assert "texture" in EXPERTS.names()
    weights = nn.Conv2d(3, 64, 16, stride=16)
    (tmp_path / "texture").mkdir()
    save_file(weights.state_dict(), tmp_path / "texture" / "model.safetensors")
    entry = {"name": "texture", "source": f"hf:{tmp_path / 'texture'}", "image_size": 224}
    [spec] = complete_specs([entry])
    assert (spec.width, spec.grid) == (64, (14, 14))
    hub = ExpertHub([spec])
    assert expert_cost(hub["texture"]).flops == 2 * 14 * 14 * 64 * 3 * 16 * 16
    hub.load()
    pixels = torch.rand(2, 3, 224, 224)
    out = hub.run(pixels).features["texture"]
    assert torch.allclose(out, weights((pixels - 0.5) / 0.5), atol=1e-5)
    again = ExpertHub(hub.save(tmp_path / "checkpoint"), base_dir=tmp_path / "checkpoint")
    again.load()
    assert torch.equal(again.run(pixels).features["texture"], out)


def test_a_second_class_for_one_scheme_is_refused():
    present = EXPERTS.get("dinov2")["timm"]
    with pytest.raises(ConfigError, match="'dinov2' is registered twice for timm: sources, in .*dinov2.py and in "):
        register_expert("dinov2")(type("Other", (present,), {}))
    register_expert("dinov2")(present)  # a notebook's cell that is run again
