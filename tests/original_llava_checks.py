"""Check our tower in haotian-liu/LLaVA itself, unmodified.

test_llava_original.py runs this program in a separate process.
A tiny random LLaMA, a random CLIP and two random experts of true architectures; LLaVA's own code does the rest.
"""

import types

import pytest
import torch
import transformers.trainer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from train_parts import IMAGE, write_parts
from transformers import CLIPImageProcessor, Trainer, TrainingArguments

from tove_llava.core.errors import CheckpointError
from tove_llava.integrations.llava import ToveVisionTower, register

register()
transformers.trainer.ALL_LAYERNORM_LAYERS = [nn.LayerNorm]  # which llava.train imports; transformers 5 has it no more

from llava.mm_utils import process_images, tokenizer_image_token  # noqa: E402
from llava.model import LlavaLlamaForCausalLM, llava_arch  # noqa: E402
from llava.model.builder import load_pretrained_model  # noqa: E402
from llava.model.multimodal_encoder import builder, clip_encoder  # noqa: E402
from llava.train import llava_trainer, train  # noqa: E402
from PIL import Image  # noqa: E402

TOKENS = 16


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    write_parts(root)
    size = {"height": IMAGE, "width": IMAGE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=size).save_pretrained(root / "clip")
    return root


def model_args(tower, **keys):
    keys |= {"mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}
    return train.ModelArguments(vision_tower=str(tower), **keys)


def make_model(parts, tower=None, *, seed=0, base=None, **keys):
    """Make the model as LLaVA's ``train`` does."""
    model = base or LlavaLlamaForCausalLM.from_pretrained(parts / "llm")
    torch.manual_seed(seed)
    model.get_model().initialize_vision_modules(model_args(tower or f"tove:{parts}/preset.yaml", **keys), fsdp="")
    model.config.mm_use_im_start_end = model.config.mm_use_im_patch_token = False
    return model


def open_tower(model, seed=1):
    torch.manual_seed(seed)
    tower = model.get_vision_tower().tower
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return tower


def batch(rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (rows, 9), generator=generator)
    labels = ids.clone()
    ids[:, 2] = labels[:, 2] = -200
    labels[:, :4] = -100
    images = torch.randn(rows, 3, IMAGE, IMAGE, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids).bool(), "images": images}


def with_lora(model):
    targets = train.find_all_linear_names(model)
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))


def align(model):
    """Freeze as ``train`` does for --tune_mm_mlp_adapter."""
    model.requires_grad_(False)
    for parameter in model.get_model().mm_projector.parameters():
        parameter.requires_grad = True


def first_stage_state(model):
    return train.get_mm_adapter_state_maybe_zero_3(model.named_parameters(), ["mm_projector"])


def tower_state(model):
    return {name: value.float().clone() for name, value in model.get_vision_tower().tower.state_dict().items()}


def assert_same_tower(first, second, dtype=torch.float32):
    old, new = tower_state(first), tower_state(second)
    assert old.keys() == new.keys() and len(old) > 5
    assert all(value.abs().sum() > 0 for value in old.values()), "a parameter of zeros would prove nothing"
    assert all(torch.equal(old[name].to(dtype).float(), new[name]) for name in old)


def test_its_own_builder_builds_our_tower_and_its_own(parts):
    for module in (builder, llava_arch):
        tower = module.build_vision_tower(model_args(f"tove:{parts}/preset.yaml"), delay_load=True)
        assert isinstance(tower, ToveVisionTower) and not tower.is_loaded
        assert isinstance(module.build_vision_tower(model_args(parts / "clip")), clip_encoder.CLIPVisionTower)
        with pytest.raises(ValueError, match="Unknown vision tower"):
            module.build_vision_tower(model_args("nothing"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_tower_gives_the_logits_of_its_own_clip_tower(parts, dtype):
    ours, theirs = (make_model(parts, tower).eval() for tower in (None, parts / "clip"))
    for model in (ours, theirs):
        model.get_vision_tower().to(dtype=dtype, device="cpu")
    assert torch.equal(ours.encode_images(batch()["images"]), theirs.encode_images(batch()["images"]))
    with torch.no_grad():
        assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)
        open_tower(ours)
        assert not torch.equal(ours(**batch()).logits, theirs(**batch()).logits)


def test_stage_1_trains_only_the_trained_parts_and_the_projector(parts):
    model = make_model(parts).train()
    tower = open_tower(model)
    align(model)
    assert model.encode_images(batch()["images"]).shape == (2, TOKENS, 32)
    output = model(**batch())
    assert output.logits.shape == (2, 9 - 1 + TOKENS, model.vocab_size)
    output.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {name for name, _ in model.named_parameters() if "mm_projector" in name}
    assert sum(1 for _ in tower.parameters()) == sum(".tove." in name for name in trained)
    assert all(p.grad is None for module in tower.frozen.modules() for p in module.parameters())


def test_its_optimiser_groups_hold_the_trained_parts_at_the_projectors_rate(parts, tmp_path):
    model = make_model(parts)
    args = TrainingArguments(tmp_path, use_cpu=True, report_to=[], weight_decay=0.1, learning_rate=1e-3)
    args.mm_projector_lr = 0.5
    optimizer = llava_trainer.LLaVATrainer(model=model, args=args).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in model.get_vision_tower().tower.parameters()} == {0.5}
    assert rates[id(model.lm_head.weight)] == 1e-3


def test_the_loss_holds_the_balance_loss(parts):
    model = make_model(parts).train()
    open_tower(model)
    tower = model.get_vision_tower()
    tower.config.router_aux_loss_coef = 50.0
    torch.manual_seed(0)
    loss = model(**batch()).loss
    torch.manual_seed(0)
    expected = tower.tower.balance_loss(tower.tower(batch()["images"]).gate_inputs)
    tower.config.router_aux_loss_coef = 0.0
    torch.manual_seed(0)
    language = model(**batch()).loss
    assert expected > 1e-4 and (loss - language).item() == pytest.approx(50 * expected.item(), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_accumulating_gradients_scales_both_terms_alike(parts, tmp_path, lora):
    """Compare a micro-batch's step with the same one run twice.

    transformers' trainer must not multiply the term.
    """
    rows = [{key: value[0] for key, value in batch(1).items()}]
    moved = []
    for steps in (1, 2):
        model = make_model(parts)
        whole = with_lora(model) if lora else model
        align(model)
        tower = open_tower(model)
        tower.fusion.gate.noise = None  # its draw would differ
        before = tower_state(model)
        args = TrainingArguments(
            tmp_path, use_cpu=True, report_to=[], max_steps=1, per_device_train_batch_size=1, save_strategy="no",
            gradient_accumulation_steps=steps, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
            max_grad_norm=0.0, remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=whole, args=args, train_dataset=rows * steps).train()
        moved.append({name: value - before[name] for name, value in tower_state(model).items()})
    for name in moved[0]:
        torch.testing.assert_close(moved[0][name], moved[1][name], rtol=1e-3, atol=1e-6)
    assert moved[0]["fusion.gate.score.weight"].abs().sum() > 0


def save_first_stage(model, folder):
    """Save by LLaVA's ``safe_save_model_for_hf_trainer`` with --tune_mm_mlp_adapter."""
    arguments = types.SimpleNamespace(tune_mm_mlp_adapter=True, local_rank=-1)
    train.safe_save_model_for_hf_trainer(types.SimpleNamespace(args=arguments, model=model), str(folder))


def test_what_stage_1_saves_stage_2_loads(parts, tmp_path):
    first = make_model(parts)
    open_tower(first)
    save_first_stage(first, tmp_path)
    second = make_model(parts, seed=7, pretrain_mm_mlp_adapter=str(tmp_path / "mm_projector.bin"))
    assert_same_tower(first, second)
    with torch.no_grad():
        assert torch.equal(first.eval()(**batch()).logits, second.eval()(**batch()).logits)


def test_what_its_trainer_saves_in_stage_1_is_the_same(parts, tmp_path):
    model = make_model(parts)
    open_tower(model)
    args = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    args.tune_mm_mlp_adapter = True
    trainer = llava_trainer.LLaVATrainer(model=model, args=args)
    trainer._save_checkpoint(model, None)
    saved = torch.load(tmp_path / "checkpoint-0" / "mm_projector.bin", weights_only=True)
    assert saved.keys() == first_stage_state(model).keys() and sum(".tove." in name for name in saved) > 5


def test_a_stage_1_file_without_the_trained_parts_is_refused(parts, tmp_path):
    """Load by stage 2, and by LLaVA's loader, which loads with strict=False."""
    theirs = make_model(parts, parts / "clip")
    save_first_stage(theirs, tmp_path)
    adapter = tmp_path / "mm_projector.bin"
    with pytest.raises(CheckpointError, match="does not hold the trained parts"):
        make_model(parts, pretrain_mm_mlp_adapter=str(adapter))
    ours = make_model(parts)
    save_first_stage(ours, tmp_path)
    torch.save(first_stage_state(theirs), adapter)
    with pytest.raises(CheckpointError, match="does not hold the trained parts"):
        load_pretrained_model(str(tmp_path), str(parts / "llm"), "llava-x", device="cpu")


def test_its_loader_loads_a_first_stage_a_whole_model_and_lora(parts, tmp_path):
    first = make_model(parts)
    open_tower(first)
    save_first_stage(first, tmp_path / "stage1")
    first.save_pretrained(tmp_path / "full")
    for file in (parts / "llm").glob("token*"):
        (tmp_path / "full" / file.name).write_bytes(file.read_bytes())
    lora = save_lora(parts, tmp_path / "lora")
    base = str(parts / "llm")
    for folder, base_model, name, trained in (
        ("stage1", base, "llava-x", first),
        ("full", None, "llava-x", first),
        ("lora", base, "llava-lora", lora),
    ):
        tokenizer, model, processor, _ = load_pretrained_model(str(tmp_path / folder), base_model, name, device="cpu")
        assert_same_tower(trained, model, torch.float16)
        assert model.get_vision_tower().is_loaded and model.get_vision_tower().image_processor is processor
        prompt = tokenizer_image_token("<image>\nwhat is it ?", tokenizer, return_tensors="pt")[None]
        image = Image.new("RGB", (40, 30), (200, 30, 90))
        seen = process_images([image], processor, model.config).half()
        # As its evaluators call it; float16 logits of a random model may tie, so only that it speaks.
        said = model.generate(prompt, images=seen, image_sizes=[image.size], do_sample=False, max_new_tokens=4)
        assert 1 <= said.shape[1] <= 4


def save_lora(parts, folder):
    """Build and save stage 2 with LoRA as ``train`` does.

    The adapters come first, then the vision modules.
    """
    base = LlavaLlamaForCausalLM.from_pretrained(parts / "llm")
    peft = with_lora(base)
    model = make_model(parts, base=peft.get_base_model())
    assert set(train.find_all_linear_names(base)) == {"base_layer", "default"}  # nothing of the tower
    open_tower(model)
    state = train.get_peft_state_maybe_zero_3(peft.named_parameters(), "none")
    rest = train.get_peft_state_non_lora_maybe_zero_3(peft.named_parameters())
    peft.config.save_pretrained(folder)
    peft.save_pretrained(folder, state_dict=state)
    torch.save(rest, folder / "non_lora_trainables.bin")
    assert not any("tove" in name for name in load_file(folder / "adapter_model.safetensors"))
    return model


def test_a_tower_loaded_with_lora_around_it_trains_again(parts, tmp_path):
    """Tune a whole model further.

    peft freezes all of it, and LLaVA frees the projector.
    """
    first = make_model(parts)
    open_tower(first)
    first.save_pretrained(tmp_path)
    peft = with_lora(LlavaLlamaForCausalLM.from_pretrained(tmp_path))
    assert not any(".tove." in name and "lora" in name for name, _ in peft.named_parameters())
    model = make_model(parts, base=peft.get_base_model())
    assert_same_tower(first, model)
    peft.train()(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.get_vision_tower().tower.parameters())


def test_any_resolution_runs(parts):
    """Check --image_aspect_ratio anyres.

    The tower's own grid joins several crops an image.
    """
    model = make_model(parts).eval()
    model.config.image_aspect_ratio, model.config.mm_patch_merge_type = "anyres", "spatial"
    model.config.image_grid_pinpoints = [[IMAGE, 2 * IMAGE], [2 * IMAGE, 2 * IMAGE]]
    sizes = [(30, 70), (90, 80)]
    images = [Image.new("RGB", size, (200, 30, 90)) for size in sizes]
    seen = process_images(images, model.get_vision_tower().image_processor, model.config)
    assert [len(x) for x in seen] == [3, 5]
    with torch.no_grad():
        output = model(**(batch() | {"images": seen}), image_sizes=sizes)
    assert output.logits.shape[1] == 9 - 1 + 5 * TOKENS
