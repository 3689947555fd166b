import shutil

import pytest
import torch
from answer_parts import make_model
from experts_zoo import save_large_experts
from safetensors.torch import load_file
from tower_parts import GRID, DummyExpert, expert_entries, open_output, pixels, save_clip, text_config, tower_config
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tove_llava.checkpoints.clip import read_clip
from tove_llava.core.errors import CheckpointError, ConfigError
from tove_llava.llava import ToveLlavaConfig, ToveLlavaForConditionalGeneration, VisionInputs
from tove_llava.tower import ToveVisionConfig, ToveVisionModel, all_reduce_statistics, balance_loss

IMAGE_TOKEN = 63
BOTH = pytest.mark.parametrize("cls", [LlavaForConditionalGeneration, ToveLlavaForConditionalGeneration])


def make_llava(folder, cls=ToveLlavaForConditionalGeneration, opened=True, vision_config=None, text=None, **keys):
    parts = {"vision_config": vision_config or tower_config(folder, **keys), "text_config": text or text_config()}
    selection = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    config = cls.config_class(**parts, **selection, image_token_index=IMAGE_TOKEN)
    torch.manual_seed(5)
    model = cls(config).eval()
    model.model.vision_tower.load_backbones()
    if opened:
        open_output(model.model.vision_tower)
    return model


def stock_twin(model, folder):
    """Build published LLaVA with the same weights outside the tower.

    Its tower is CLIP, layer -2, without class token.
    """
    clip = CLIPVisionModel.from_pretrained(folder / "clip")
    parts = {"vision_config": clip.config, "text_config": model.config.text_config}
    selection = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    twin = LlavaForConditionalGeneration(LlavaConfig(**parts, **selection, image_token_index=IMAGE_TOKEN)).eval()
    state = {k: v for k, v in model.state_dict().items() if "vision_tower" not in k}
    state |= {f"model.vision_tower.{k}": v for k, v in clip.state_dict().items()}
    twin.load_state_dict(state)
    return twin


def batch(images=2, seed=0, tokens=GRID**2):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (images, 6), generator=g)
    ids = torch.cat([ids[:, :2], torch.full((images, tokens), IMAGE_TOKEN), ids[:, 2:]], dim=1)
    labels = ids.clone()
    labels[:, : 2 + tokens] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(images)}


def text_batch(rows=2):
    ids = torch.randint(3, 60, (rows, 7), generator=torch.Generator().manual_seed(9))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


# -- against LLaVA as it is published ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("detached", [False, True])
def test_untrained_or_detached_tower_gives_llavas_logits(tmp_path, cls, dtype, detached):
    model = make_llava(tmp_path, cls, opened=detached)
    if detached:
        model.model.vision_tower.detach_experts(["depth", "edge", "normal"])
    twin = stock_twin(model, tmp_path).to(dtype)
    model.to(dtype)
    data = {**batch(), "pixel_values": pixels(2).to(dtype)}
    with torch.no_grad():
        assert torch.equal(model(**data).logits, twin(**data).logits)


def test_opened_tower_changes_llavas_logits(tmp_path):
    model = make_llava(tmp_path)
    assert not torch.equal(model(**batch()).logits, stock_twin(model, tmp_path)(**batch()).logits)


@pytest.mark.slow
def test_true_architecture_with_all_default_experts_is_llava(tmp_path):
    """Compare CLIP-L/14-336 with the large preset's experts, attached and untrained.

    The weights of CLIP are random.
    """
    torch.manual_seed(0)
    clip_config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    CLIPVisionModel(clip_config).save_pretrained(tmp_path / "clip")
    config = ToveVisionConfig.from_sources(f"hf:{tmp_path / 'clip'}", save_large_experts(tmp_path))
    text = text_config(max_position_embeddings=1024)
    model = make_llava(tmp_path, opened=False, vision_config=config, text=text)
    assert model.tower.is_loaded and model.tower.active_experts == ["eva", "dinov2", "depth", "edge"]
    twin = stock_twin(model, tmp_path)
    data = {**batch(1, tokens=576), "pixel_values": pixels(1, size=336)}
    with torch.no_grad():
        expected = twin(**data).logits
        assert torch.equal(model(**data).logits, expected)
        open_output(model.tower)
        assert not torch.equal(model(**data).logits, expected)
        model.tower.detach_experts(config.expert_names)
        assert torch.equal(model(**data).logits, expected)
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep


# -- saving, loading, generating --------------------------------------------------------------------------------------


@BOTH
def test_saved_equals_loaded_and_generates(tmp_path, cls):
    model = make_llava(tmp_path / "parts", cls)
    model.save_pretrained(tmp_path / "saved")
    loaded = cls.from_pretrained(tmp_path / "saved")
    if cls is LlavaForConditionalGeneration:
        with pytest.raises(CheckpointError, match=r"vision_tower\.load_backbones\(\)"):
            loaded(**batch())
        loaded.model.vision_tower.load_backbones()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    data = batch()
    assert torch.equal(model(**data).logits, loaded(**data).logits)
    prompt = {k: v for k, v in data.items() if k != "labels"}
    first, second = (m.generate(**prompt, max_new_tokens=4, do_sample=False) for m in (model, loaded))
    assert first.shape[1] > prompt["input_ids"].shape[1] and torch.equal(first, second)


def test_saved_keys_are_the_models_own(tmp_path):
    model = make_llava(tmp_path / "parts")
    model.save_pretrained(tmp_path / "saved")
    saved = {name for file in (tmp_path / "saved").glob("*.safetensors") for name in load_file(file)}
    # On disk transformers keeps LLaVA's older prefix of the language model.
    saved = {name.replace(".language_model.model.", ".language_model.") for name in saved}
    assert saved == {name for name, _ in model.named_parameters()}
    assert {k.split(".")[2] for k in saved if k.startswith("model.vision_tower.")} == {"fusion"}


def test_self_contained_checkpoint(tmp_path):
    model = make_llava(tmp_path / "parts")
    expected = model(**batch()).logits
    model.config.vision_config = model.tower.save_backbones(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "parts").rename(tmp_path / "gone")
    (tmp_path / "saved").rename(tmp_path / "moved")
    moved = ToveLlavaForConditionalGeneration.from_pretrained(tmp_path / "moved")
    assert torch.equal(moved(**batch()).logits, expected)


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_generating_from_pixels_and_from_features(tmp_path, options):
    model = make_llava(tmp_path)
    prompt = {k: v for k, v in batch().items() if k not in ("labels", "pixel_values")}
    torch.manual_seed(0)
    expected = model.generate(**prompt, pixel_values=pixels(), max_new_tokens=4, **options)
    vision = model.encode_images(vision_features=model.tower.encode(pixels()))
    torch.manual_seed(0)
    actual = model.generate(**prompt, mm_encoder_outputs={"image": vision}, max_new_tokens=4, **options)
    assert torch.equal(actual, expected)
    DummyExpert.calls = 0
    model.generate(**prompt, pixel_values=pixels(), max_new_tokens=4, do_sample=False)
    assert DummyExpert.calls == 3  # once each, at the prefill


# -- losses and routing -----------------------------------------------------------------------------------------------


def test_loss_terms_and_tuple_output(tmp_path):
    model = make_llava(tmp_path, router_aux_loss_coef=0.5).train()
    out = model(**batch(), vision=VisionInputs(gate_noise=torch.randn(2, 16, 3)))
    assert out.aux_loss > 0
    torch.testing.assert_close(out.loss, out.lm_loss + 0.5 * out.aux_loss)
    torch.testing.assert_close(out.aux_loss, balance_loss(model.tower.fusion.balance_statistics(out.gate_inputs)))
    apart = model(**batch(), add_aux_loss=False)
    assert torch.equal(apart.loss, apart.lm_loss) and apart.aux_loss is None and apart.gate_inputs is not None
    evaluated = model.eval()(**batch())
    assert torch.equal(evaluated.loss, evaluated.lm_loss) and evaluated.aux_loss is evaluated.gate_inputs is None
    loss, logits = model(**batch(), return_dict=False)[:2]
    assert torch.equal(loss, evaluated.loss) and torch.equal(logits, evaluated.logits)


def gradients(model, noise, **options):
    model.zero_grad()
    model(**batch(), vision=VisionInputs(gate_noise=noise), **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_aux_loss_reaches_only_the_gate(tmp_path):
    model, noise = make_llava(tmp_path).train(), torch.randn(2, 16, 3)
    with_aux, without = (gradients(model, noise, add_aux_loss=add) for add in (True, False))
    differing = {name for name in without if not torch.equal(with_aux[name], without[name])}
    assert differing == {name for name in without if ".fusion.gate." in name}


def test_routing_on_request(tmp_path):
    model = make_llava(tmp_path)
    assert model(**batch()).routing is None
    routing = model(**batch(), output_routing=True).routing
    assert routing.shape == (2, 16, 3) and torch.equal(routing, model.get_routing(pixels()))
    torch.testing.assert_close(routing.sum(-1), torch.ones(2, 16))
    assert make_llava(tmp_path / "none", fusion="none", opened=False).get_routing(pixels()) is None


def test_precomputed_features_give_the_same_logits(tmp_path):
    model, data = make_llava(tmp_path), batch()
    expected, images = model(**data).logits, data.pop("pixel_values")
    features = model.tower.encode(images)
    assert torch.equal(model(**data, vision=VisionInputs(features)).logits, expected)
    vision = model.encode_images(images)
    assert torch.equal(model(**data, mm_encoder_outputs={"image": vision}).logits, expected)
    with pytest.raises(ConfigError, match="exactly one"):
        model(**data, vision=VisionInputs(features), pixel_values=images)


def test_fusion_none_trains_the_projector(tmp_path):
    model = make_llava(tmp_path, fusion="none", opened=False).train()
    out = model(**batch())
    assert out.aux_loss is None and out.gate_inputs is None
    out.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


@BOTH
def test_gate_and_transfer_learn_through_llava(tmp_path, cls):
    model = make_llava(tmp_path, cls).train()
    model(**batch()).loss.backward()
    for name, p in model.model.vision_tower.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_gradient_checkpointing_changes_nothing(tmp_path):
    model, noise = make_llava(tmp_path).train(), torch.randn(2, 16, 3)
    expected = gradients(model, noise)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(model, noise), expected)


# -- batches without images -------------------------------------------------------------------------------------------


def test_text_does_not_run_the_tower_and_dummy_images_need_an_image(tmp_path):
    model = make_llava(tmp_path).train()
    DummyExpert.calls = 0
    out = model(**text_batch())
    assert out.loss.isfinite() and out.aux_loss is None and out.gate_inputs is None and DummyExpert.calls == 0
    with pytest.raises(ConfigError, match="dummy images"):
        model(**text_batch(), vision=VisionInputs(dummy=True))


@pytest.mark.parametrize("keys", [{}, {"top_k": 1}, {"fusion": "none"}])
def test_dummy_images_touch_everything_and_change_nothing(tmp_path, keys):
    model = make_llava(tmp_path, opened=keys.get("fusion") != "none", **keys).train()
    model(**text_batch()).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    out = model(**text_batch(), pixel_values=torch.zeros(1, 3, 32, 32), vision=VisionInputs(dummy=True))
    assert out.aux_loss is None and out.gate_inputs is None
    out.loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if expected[name] is None else expected[name])


def test_dummy_images_keep_the_order_of_modules(tmp_path):
    """All ranks gather ZeRO-3's weights in one order.

    Ranks in different orders wait for each other forever.
    """
    model, visited = make_llava(tmp_path).train(), []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: visited.append(name))
    dummy = {"pixel_values": torch.zeros(1, 3, 32, 32), "vision": VisionInputs(dummy=True)}
    for data in (batch(), {**text_batch(), **dummy}):
        model(**data, add_aux_loss=False).loss.backward()
    half = len(visited) // 2
    assert half > 10 and visited[:half] == visited[half:]


def test_window_of_image_and_text_batches(tmp_path):
    """The design page's recipe on one rank, three micro-batches, one text-only."""
    model = make_llava(tmp_path).train()
    window = []
    for data in (batch(seed=1), text_batch(), batch(seed=2)):
        out = model(**data, add_aux_loss=False)
        window += [out.gate_inputs] if out.gate_inputs is not None else []
    assert len(window) == 2
    statistics = all_reduce_statistics(model.tower.fusion.balance_statistics(window))
    assert statistics.tokens == 4 * 16
    balance_loss(statistics).backward()
    assert model.tower.fusion.gate.score.weight.grad.abs().sum() > 0


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer=-1"),
        ({"vision_feature_layer": [-1, -1]}, "vision_feature_layer=-1"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_layer=-1"),
        ({"vision_config": CLIPVisionConfig()}, "CLIPVisionConfig"),
    ],
)
def test_selections_and_vision_configurations_of_others_are_refused(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        ToveLlavaConfig(**{"vision_config": tower_config(tmp_path), "text_config": text_config(), **keys})


def test_stock_llava_with_another_layer_is_refused(tmp_path):
    model = make_llava(tmp_path, LlavaForConditionalGeneration)
    model.config.vision_feature_layer = -2
    # transformers before 5.23 does not tell a tower which layer it will index.
    with pytest.raises((ConfigError, IndexError), match="clip_layer|out of range"):
        model(**batch())


def test_configuration_follows_the_tower_and_builds_on_the_meta_device(tmp_path):
    config = ToveLlavaConfig(vision_config=tower_config(tmp_path).to_dict(), text_config=text_config())
    assert config.image_seq_length == 16
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")
    with torch.device("meta"):
        model = ToveLlavaForConditionalGeneration(config)
    assert all(p.is_meta for p in model.parameters())
    assert not model.tower.is_loaded and isinstance(model.tower, ToveVisionModel)


def test_default_configurations_exist():
    """transformers compares a configuration with its class's default when it saves."""
    assert ToveLlavaConfig().vision_config.to_dict() == ToveVisionConfig().to_dict()


def test_experts_of_a_saved_clip_keep_their_order(tmp_path):
    entries = expert_entries(tmp_path)
    config = ToveVisionConfig.from_sources(save_clip(tmp_path / "clip"), entries[::-1])
    assert config.expert_names == ["normal", "edge", "depth"]
    assert list(ToveVisionModel(config).fusion.embeddings) == ["normal", "edge", "depth"]


@BOTH
def test_detached_experts_are_saved_with_the_whole_model(tmp_path, cls):
    model = make_llava(tmp_path / "parts", cls)
    model.model.vision_tower.detach_experts("edge")
    model.save_pretrained(tmp_path / "saved")
    loaded = cls.from_pretrained(tmp_path / "saved")
    loaded.model.vision_tower.load_backbones()
    assert loaded.model.vision_tower.active_experts == ["depth", "normal"]
    assert torch.equal(model(**batch()).logits, loaded(**batch()).logits)
    loaded.model.vision_tower.load_backbones(["edge"]).attach_experts("edge")
    loaded.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").vision_config.detached_experts == []


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_taken_under_both_names(tmp_path, name):
    """transformers 5.24 renamed it."""
    model, ids = make_llava(tmp_path), text_batch(1)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :4], use_cache=True, **{name: cache})
        assert cache.get_seq_length() == 4
        logits = model(input_ids=ids[:, 4:], **{name: cache}).logits
        torch.testing.assert_close(logits, model(input_ids=ids).logits[:, 4:])


def test_images_are_given_once(tmp_path):
    model = make_llava(tmp_path).eval()
    encoded = {"image": model.encode_images(pixels(1))}
    with pytest.raises(ConfigError, match="give images once"):
        model(input_ids=torch.tensor([[1, 5]]), pixel_values=pixels(1), mm_encoder_outputs=encoded)


def test_a_saved_processor_still_pads_on_the_left(tmp_path):
    _, processor = make_model(tmp_path / "parts")
    processor.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").padding_side == "left"


@pytest.mark.parametrize(("blocks", "layer"), [(2, -1), (3, -2), (4, -3)])
def test_the_layer_of_a_folders_clip_counts_from_its_last_block(tmp_path, blocks, layer):
    save_clip(tmp_path / "clip", layers=blocks)
    assert read_clip(tmp_path / "clip", 2).layer == layer
