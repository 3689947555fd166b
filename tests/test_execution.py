"""Every execution of the frozen encoders gives the eager one's features."""

import copy
import json
import shutil
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tower_parts import make_tower, pixels, save_clip
from train_parts import flags, write_parts, write_records

from tove_llava.cli import main as cli
from tove_llava.core.errors import ConfigError, NonFiniteError
from tove_llava.tower import execution
from tove_llava.tower.balance_loss import balance_loss
from tove_llava.tower.frozen import CLIP
from tove_llava.train.arguments import parse
from tove_llava.train.run import main

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # whatever was done to other threads
    torch.set_num_threads(before)


@pytest.fixture
def compiled(monkeypatch):
    """Count compilations; functions stay as they are."""
    made = []

    def stand_in(function, **options):
        assert options["dynamic"] is False

        def run(x):
            made[position].add(tuple(x.shape))
            return function(x)

        position = len(made)
        made.append(set())
        return run

    monkeypatch.setattr(torch, "compile", stand_in)
    return made


def assert_same(actual, expected, dtype=torch.float32):
    tolerance = TOLERANCE[dtype]
    assert list(actual.experts) == list(expected.experts) and len(actual) == len(expected)
    for a, b in zip((actual.base, *actual.experts.values()), (expected.base, *expected.experts.values()), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("keys", [{}, {"image_size": 64}, {"fusion": "none"}])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_side_by_side_is_one_after_another(tmp_path, compiled, dtype, keys):
    tower = make_tower(tmp_path, opened=not keys.get("fusion"), **keys).to(dtype)
    x = pixels(3, size=keys.get("image_size", 32)).to(dtype)
    expected, whole = tower.encode(x), tower(x).last_hidden_state
    assert tower.set_execution("compiled") is tower and tower.execution == "compiled"
    assert_same(tower.encode(x), expected, dtype)
    torch.testing.assert_close(tower(x).last_hidden_state, whole, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if dtype == torch.float32 and not keys:
        with torch.autocast("cpu", torch.bfloat16):
            actual = tower.encode(x)
            assert_same(actual, tower.set_execution("eager").encode(x), torch.bfloat16)
        assert actual.experts["depth"].dtype == torch.bfloat16


def test_without_a_gpu_concurrent_is_eager(tmp_path, compiled):
    tower = make_tower(tmp_path, opened=True)
    expected = tower(pixels()).last_hidden_state
    assert torch.equal(tower.set_execution("concurrent")(pixels()).last_hidden_state, expected)
    assert not compiled


@pytest.mark.parametrize("threads, each", [(1, 1), (2, 1), (8, 2)])
def test_encoders_run_on_threads_of_their_own(tmp_path, compiled, threads, each):
    torch.set_num_threads(threads)
    tower = make_tower(tmp_path).set_execution("compiled")
    tower.encode(pixels())
    seen = []
    for network in (tower.frozen.clip, *(tower.frozen.hub[name].backbone for name in tower.active_experts)):
        network.register_forward_hook(lambda *_: seen.append((threading.get_ident(), torch.get_num_threads())))
    tower.encode(pixels())
    assert len(seen) == 4 and threading.get_ident() not in {thread for thread, _ in seen}
    assert {count for _, count in seen} == {each}  # the cores, shared by four
    assert torch.get_num_threads() == threads
    torch.set_num_threads(2)


@pytest.mark.parametrize("batch", [4, 5, 7])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_images_shared_out_among_threads(tmp_path, compiled, monkeypatch, dtype, batch):
    monkeypatch.setattr(execution, "MIN_SHARE", 2)
    monkeypatch.setattr(execution, "to_share", lambda costs, threads: ["", "edge"])
    tower, x = make_tower(tmp_path, opened=True).to(dtype), pixels(batch).to(dtype)
    expected = tower.encode(x)
    assert_same(tower.set_execution("compiled").encode(x), expected, dtype)
    shapes = {shape[0] for shapes in compiled for shape in shapes}
    assert shapes == {-(-batch // 2), batch}, "some run whole, some for half of the images"
    assert_same(tower.encode(x[: batch - 1]), expected.map(lambda value: value[: batch - 1]), dtype)


def test_clip_is_shared_out_where_four_equal_experts_come_out_even():
    costs = {"": 18, "a": 7, "b": 7, "c": 7, "d": 7}
    assert execution.to_share(costs, 2) == [""] and execution.to_share(costs, 1) == []
    assert execution.to_share({"a": 7, "b": 7}, 2) == []


@given(costs=st.lists(st.integers(0, 1000), min_size=1, max_size=8), threads=st.integers(1, 8))
def test_sharing_out_never_ends_later_and_takes_the_dearest(costs, threads):
    named = {str(i): cost for i, cost in enumerate(costs)}
    shared = execution.to_share(named, threads)
    rest = sorted((cost for name, cost in named.items() if name not in shared), reverse=True)
    assert not shared or min(named[name] for name in shared) >= max(rest, default=0)

    def end(shared, whole):
        loads = [0.0] * threads
        for cost in [*whole, *[sum(shared) * 1.05 / threads] * threads]:
            loads[loads.index(min(loads))] += cost
        return max(loads)

    best = end([named[name] for name in shared], rest)
    assert best <= end([], sorted(costs, reverse=True)) and (threads > 1 or not shared)


def assert_trains_the_same(tower, x, name, autocast=False):
    """Compare output, balance loss and gradients with the eager encoders' training.

    In 16 bits they may instead be as near to exact numbers.

    Exact is the CPU's float32; no farther from it than the eager tower times 1.1.
    """
    gate = tower.fusion.gate
    with torch.no_grad():  # the gate has a favourite: the balance loss is not the small difference of rounded numbers
        gate.norm.bias.copy_(gate.score.weight[0] / 3)
    shape = (len(x), tower.config.num_patches, len(tower.config.expert_names))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(4))

    def step(tower, x, autocast):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            outs = [tower(y, gate_noise=noise.to(x.device)) for y in (x, -x)]  # two calls before a backward pass
        balance = balance_loss(tower.fusion.balance_statistics([out.gate_inputs for out in outs]))
        terms, tensors = (sum(out.last_hidden_state.float().square().mean() for out in outs), balance), []
        for term in terms:
            grads = torch.autograd.grad(term, list(tower.parameters()), retain_graph=True, materialize_grads=True)
            tensors.append(torch.cat([grad.flatten().float() for grad in grads]))
        return [x.detach().float().cpu() for x in (balance, *(out.last_hidden_state for out in outs), *tensors)]

    exact = step(copy.deepcopy(tower).float().cpu(), x.float().cpu(), False)
    eager = step(tower, x, autocast)
    tower.set_execution(name)
    tolerance = TOLERANCE[torch.bfloat16 if autocast else x.dtype]
    assert exact[0] > 0.1 and all(value.any() for value in eager)
    for other in (step(tower, x, autocast), step(tower, x, autocast)):  # recorded or compiled, and used
        for got, plain, true in zip(other, eager, exact, strict=True):
            near = (got - plain).norm() <= tolerance * plain.norm()
            assert near or (got - true).norm() <= 1.1 * (plain - true).norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gradients_and_balance_loss_are_the_same(tmp_path, compiled, dtype):
    assert_trains_the_same(make_tower(tmp_path, opened=True).train().to(dtype), pixels(3).to(dtype), "compiled")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gradients_and_balance_loss_are_the_same_when_compiled(tmp_path, dtype):
    tower = make_tower(tmp_path, names=("depth", "edge"), opened=True).train().to(dtype)
    assert_trains_the_same(tower, pixels(3).to(dtype), "compiled")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_compiled_is_eager(tmp_path, dtype):
    tower = make_tower(tmp_path, names=("depth", "edge"), opened=True).to(dtype)
    x = pixels(4).to(dtype)
    expected, part = tower.encode(x), tower.encode(x[:3])
    whole = tower(x).last_hidden_state
    tower.set_execution("compiled")
    assert_same(tower.encode(x), expected, dtype)
    assert_same(tower.encode(x[:3]), part, dtype)  # a part of the batch that was compiled for
    assert (tower(x).last_hidden_state - whole).norm() <= TOLERANCE[dtype] * whole.norm()
    with torch.inference_mode():
        assert_same(tower.encode(x * 1), expected, dtype)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_true_architectures_compile_to_the_same(tmp_path, dtype):
    """Small EVA-02, DINOv2, Depth-Anything and DexiNed at their real widths.

    They have few layers and a third of their input size.
    """
    from experts_zoo import save_large_experts

    from tove_llava.tower import ToveVisionConfig, ToveVisionModel

    entries = [{**entry, "image_size": 112} for entry in save_large_experts(tmp_path)]
    config = ToveVisionConfig.from_sources(save_clip(tmp_path / "clip"), entries, projection_dim=10)
    tower = ToveVisionModel(config).load_backbones().eval()
    x = pixels(2)
    exact = tower.encode(x)
    x = x.to(dtype)
    expected = tower.to(dtype).encode(x)
    actual = tower.set_execution("compiled").encode(x)
    for name in (CLIP, *config.expert_names):
        got, plain, true = ((f.base if name == CLIP else f.experts[name]).float() for f in (actual, expected, exact))
        near = (got - plain).norm() <= TOLERANCE[dtype] * plain.norm()
        assert near or (got - true).norm() <= 1.1 * (plain - true).norm(), name


@needs_compiler
@pytest.mark.slow
def test_a_run_with_compiled_encoders_learns_the_same(tmp_path):
    write_parts(tmp_path)
    write_records(tmp_path)
    histories = []
    for name in ("eager", "compiled"):
        assert main(flags(tmp_path, "pretrain", tmp_path / name, "--max_steps", "3", "--tower_execution", name)) == 0
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        histories.append([[entry[key] for key in ("lm_loss", "aux_loss")] for entry in history if "lm_loss" in entry])
    torch.testing.assert_close(torch.tensor(histories[1]), torch.tensor(histories[0]), rtol=1e-5, atol=1e-6)
    assert len(histories[0]) == 3 and histories[0][0] != histories[0][1]


def test_sizes_are_padded_up_and_few(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(execution, "MIN_SHARE", 100)
    tower = make_tower(tmp_path, names=("depth",), opened=True)
    expected = {batch: tower.encode(pixels(batch)) for batch in (6, 5, 3, 2, 7)}
    tower.set_execution("compiled")
    for batch, want in expected.items():
        assert_same(tower.encode(pixels(batch)), want)
    # Six is the first; five and three are padded to it, two would be less than half; seven becomes eight.
    assert [{shape[0] for shape in shapes} for shapes in compiled] == [{6}, {6}, {2}, {2}, {8}, {8}]
    monkeypatch.setattr(execution, "MAX_SIZES", 3)  # beyond that many it is eager
    assert_same(tower.encode(pixels(30)), tower.set_execution("eager").encode(pixels(30)))
    assert len(compiled) == 6


def test_what_was_compiled_is_kept_and_forgotten(tmp_path, compiled):
    tower, x = make_tower(tmp_path).set_execution("compiled"), pixels()

    def new(count):
        before = len(compiled)
        tower.encode(x.to(tower.dtype))
        tower.encode(x.to(tower.dtype))
        assert len(compiled) - before == count, "encoders compiled"

    new(4)
    for change, count in (
        (lambda: tower.detach_experts("edge"), 0),
        (lambda: tower.attach_experts("edge"), 0),
        (tower.train, 0),
        (lambda: tower.detach_experts("edge", free=True), 3),
        (lambda: tower.load_backbones(["edge"]).attach_experts("edge"), 4),
        (lambda: tower.to(torch.bfloat16), 4),
        (lambda: tower.to(torch.float32), 4),  # rounded by now
        (lambda: tower.set_attn_implementation("eager"), 4),
        (lambda: setattr(tower.frozen, "clip", copy.deepcopy(tower.frozen.clip)), 4),  # another network
    ):
        change()
        new(count)
    with torch.autocast("cpu", torch.bfloat16):
        new(4)
    tower.set_execution("eager")
    new(0)


def test_new_weights_are_used(tmp_path, compiled):
    tower, x = make_tower(tmp_path).set_execution("compiled"), pixels()
    before = tower.encode(x)
    other = copy.deepcopy(tower)
    assert other.execution == "compiled"
    with torch.no_grad():
        for parameter in other.frozen.clip.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(other.encode(x).base, before.base)
    assert torch.equal(tower.encode(x).base, before.base)


def test_features_of_inference_mode_are_usable_in_training(tmp_path, compiled):
    tower = make_tower(tmp_path, opened=True).set_execution("compiled")
    with torch.inference_mode():
        features = tower.encode(pixels() * 1)
    tower.fuse(features).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in tower.fusion.embeddings.parameters())


def test_an_expert_that_fails_is_named_and_leaves_the_tower_usable(tmp_path, compiled):
    tower = make_tower(tmp_path, expert_options={"edge": {"nan_above": -9.0}}).set_execution("compiled")
    with pytest.warns(RuntimeWarning, match="'edge' returned non-finite values"):
        expected = tower.encode(pixels())
    assert expected.usable["edge"].tolist() == [False, False]
    with pytest.raises(NonFiniteError, match="'edge' returned non-finite values"):
        tower.train().encode(pixels())
    with pytest.raises(ConfigError, match="pixel_values has shape"):
        tower.encode(pixels(size=16))
    broken = tower.frozen.hub["depth"].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tower.eval().encode(pixels())
    broken.remove()
    tower.detach_experts("edge")
    del expected.experts["edge"]
    assert_same(tower.encode(pixels()), expected)


def test_an_execution_that_cannot_be_used_says_so(tmp_path, monkeypatch):
    def refuse(function, **_):
        def run(x):
            raise RuntimeError("no compiler\nhere")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    tower = make_tower(tmp_path).set_execution("compiled")
    with pytest.raises(ConfigError, match="unknown execution 'fast' of the tower; known: eager, concurrent, compiled"):
        tower.set_execution("fast")
    with pytest.raises(ConfigError, match=r"cannot be compiled here \(no compiler\); use the execution 'eager'"):
        tower.encode(pixels())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_lack_of_memory_stays_one(tmp_path, monkeypatch, wrapped):
    """Evaluation and serving wait for it to take smaller batches."""

    def exhausted(function, **_):
        def run(x):
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError as error:
                raise (RuntimeError("backend failed") if wrapped else error) from error

        return run

    monkeypatch.setattr(torch, "compile", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        make_tower(tmp_path).set_execution("compiled").encode(pixels())


def test_compiled_functions_of_one_class_do_not_exhaust_torchs_limit(monkeypatch):
    """As with a torch.compile that cannot isolate functions, and a compiler that is quick."""

    class Network:
        def __init__(self, factor):
            self.factor = factor

        def features(self, x):
            return x * self.factor

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, *, dynamic: compile_(function, dynamic=dynamic, backend="eager")
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for factor in range(5):
            assert execution._compiled(Network(factor).features)(torch.ones(2)).tolist() == [factor] * 2


def test_training_takes_it_from_preset_and_flag(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    data = ["--data_path", str(tmp_path / "data.json"), "--image_folder", str(tmp_path), "--output_dir", str(tmp_path)]
    preset, flag = ["--set", "stages.pretrain.tower_execution=compiled"], ["--tower_execution", "concurrent"]
    runs = [parse([*data, *more]) for more in ([], preset, flag)]
    assert [run.stage.tower_execution for run in runs] == ["eager", "compiled", "concurrent"]
    assert runs[0].record() == runs[1].record() == runs[2].record()  # an interrupted run may go on with another
    with pytest.raises(ConfigError, match="unknown execution 'fast'"):
        parse([*data, "--tower_execution", "fast"])


@pytest.mark.parametrize("verb", ["eval", "chat", "demo", "contributions", "detach", "routing"])
def test_verbs_that_load_a_model_have_the_flag(verb, capsys):
    with pytest.raises(SystemExit):
        cli([verb, "--help"])
    assert "--tower-execution NAME" in capsys.readouterr().out
