import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from tower_parts import make_tower, pixels

from tove_llava.tower import BalanceStatistics, GateInputs, all_reduce_statistics, balance_loss
from tove_llava.tower.balance_loss import cv_squared, expected_load


def statistics(importance, load=None, attached=None):
    importance = torch.tensor(importance)
    attached = torch.tensor([True] * len(importance) if attached is None else attached)
    load = None if load is None else torch.tensor(load)
    return BalanceStatistics(importance=importance, load=load, tokens=importance.sum(), attached=attached)


def test_loss_is_the_formula():
    # mean 2, variance 2/3 -> 1/6; mean 3, variance 6 -> 2/3
    loss = balance_loss(statistics([1.0, 2.0, 3.0], [3.0, 0.0, 6.0]))
    torch.testing.assert_close(loss, torch.tensor(1 / 6 + 2 / 3))
    torch.testing.assert_close(balance_loss(statistics([1.0, 2.0, 3.0])), torch.tensor(1 / 6))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.125, 100, width=32), min_size=2, max_size=6), st.floats(0.5, 50, width=32))
def test_cv_is_scale_free_and_zero_only_when_even(values, scale):
    x = torch.tensor(values)
    torch.testing.assert_close(cv_squared(x * scale), cv_squared(x), rtol=1e-3, atol=1e-5)
    assert cv_squared(x) >= 0
    assert cv_squared(torch.full_like(x, values[0])) < 1e-9


def test_one_expert_and_no_tokens_cost_nothing():
    assert balance_loss(statistics([5.0], [7.0])) == 0
    none = torch.zeros(3, requires_grad=True)
    cv_squared(none).backward()
    assert cv_squared(none) == 0 and none.grad.isfinite().all()


def test_detached_experts_have_no_part():
    whole = statistics([1.0, 0.0, 3.0], [2.0, 0.0, 2.0], attached=[True, False, True])
    torch.testing.assert_close(balance_loss(whole), balance_loss(statistics([1.0, 3.0], [2.0, 2.0])))
    assert balance_loss(statistics([1.0, 0.0, 0.0], attached=[True, False, False])) == 0


@pytest.mark.parametrize("k, slots", [(1, 4), (2, 4), (3, 4), (4, 4), (1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_load_is_the_frequency_under_fresh_noise(k, slots, masked):
    torch.manual_seed(k)
    clean, eps, std = torch.randn(6, slots), torch.randn(6, slots), torch.rand(6, slots) + 0.3
    allowed = torch.ones(6, slots, dtype=torch.bool)
    if masked and slots > 1:
        allowed[:, 1] = False
    noisy = clean + std * eps
    load = expected_load(clean, noisy, std, allowed, k)
    assert (load[~allowed] == 0).all()
    for i in allowed[0].nonzero().flatten().tolist():
        redrawn = noisy.expand(20_000, -1, -1).clone()
        redrawn[..., i] = clean[:, i] + std[:, i] * torch.randn(20_000, 6)
        top = redrawn.masked_fill(~allowed, float("-inf")).topk(k, dim=-1).indices
        torch.testing.assert_close(load[:, i], (top == i).any(-1).float().mean(0), atol=0.015, rtol=0)


def test_load_has_finite_gradients_where_everything_is_chosen():
    clean, std = torch.randn(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    allowed = torch.tensor([[True, False]]).expand(3, 2)
    load = expected_load(clean, clean + std, std, allowed, k=1)
    assert torch.equal(load.detach(), allowed.float())
    load.sum().backward()
    assert clean.grad.isfinite().all() and std.grad.isfinite().all()


@pytest.mark.parametrize("keys", [{}, {"null_slot": True}, {"top_k": 2}, {"noisy_gating": False}])
def test_statistics_are_those_of_the_forward_pass(tmp_path, keys):
    tower = make_tower(tmp_path, opened=True, **keys).train()
    out = tower(pixels(3))
    stats = tower.fusion.balance_statistics(out.gate_inputs)
    torch.testing.assert_close(stats.importance, out.routing.sum((0, 1))[:3])
    assert stats.tokens == 3 * 16 and (stats.load is None) == (keys == {"noisy_gating": False})
    if keys.get("top_k") == 2:  # two of three are chosen for every token: the load is the count, in expectation
        assert stats.load.sum().item() == pytest.approx(2 * 48, rel=0.2)


def gradients(fusion, loss):
    fusion.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in fusion.gate.parameters()])


def test_an_accumulation_window_is_one_batch(tmp_path):
    tower = make_tower(tmp_path, opened=True).train()
    x, noise = pixels(5), torch.randn(5, 16, 3)
    fused = tower.fusion.balance_statistics
    whole = balance_loss(fused(tower(x, gate_noise=noise).gate_inputs))
    parts = [tower(x[p], gate_noise=noise[p]).gate_inputs for p in (slice(0, 2), slice(2, 3), slice(3, 5))]
    window = balance_loss(sum(fused(part) for part in parts) + fused(None))
    torch.testing.assert_close(window, whole)
    expected = gradients(tower.fusion, whole)
    torch.testing.assert_close(gradients(tower.fusion, window), expected)
    torch.testing.assert_close(gradients(tower.fusion, balance_loss(fused(parts))), expected)
    mean = torch.stack([balance_loss(fused(part)) for part in parts]).mean()
    assert not torch.isclose(mean, whole, rtol=1e-3)  # what averaging would have given instead


def test_a_window_is_one_pass_of_the_gate(tmp_path):
    tower = make_tower(tmp_path).train()
    inputs, calls = tower(pixels()).gate_inputs, []
    tower.fusion.gate.score.register_forward_hook(lambda *_: calls.append(1))
    for window in ([], [inputs], [inputs, inputs, inputs]):
        calls.clear()
        assert tower.fusion.balance_statistics(window).tokens == 32 * len(window) and len(calls) == 1
    with pytest.raises(ValueError, match="noise"):
        tower.fusion.balance_statistics([inputs, inputs._replace(noise=None)])


def test_joining_keeps_dropped_experts_apart(tmp_path):
    tower = make_tower(tmp_path, opened=True).train()
    inputs, fused = tower(pixels()).gate_inputs, tower.fusion.balance_statistics
    dropped = inputs._replace(usable=torch.tensor([[True, False, True], [True, True, True]]))
    joined, apart = fused([inputs, dropped]), fused(inputs) + fused(dropped)
    torch.testing.assert_close((joined.importance, joined.load), (apart.importance, apart.load))
    assert not torch.allclose(joined.importance, 2 * fused(inputs).importance)


def test_no_image_touches_the_same_parameters(tmp_path):
    tower = make_tower(tmp_path).train()
    balance_loss(tower.fusion.balance_statistics(None)).backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in tower.fusion.gate.parameters())


def test_unlike_statistics_do_not_add_and_one_process_reduces_nothing():
    stats = statistics([1.0, 2.0])
    with pytest.raises(ValueError, match="load"):
        stats + statistics([1.0, 2.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="attached"):
        stats + statistics([1.0, 2.0], attached=[True, False])
    assert all_reduce_statistics(stats) is stats


SHARES = [[(0, 2), (2, 4)], [(0, 1), (1, 4)], [(0, 4), None]]  # the last: one rank without an image


def _rank(rank, world_size, folder, fusion, inputs):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    results = []
    for shares in SHARES:
        mine = None
        if shares[rank] is not None:
            part = slice(*shares[rank])
            mine = GateInputs(tokens=inputs.tokens[part], noise=inputs.noise[part])
        loss = balance_loss(all_reduce_statistics(fusion.balance_statistics(mine)))
        grad = gradients(fusion, loss)
        dist.all_reduce(grad)  # what DDP and DeepSpeed do: sum, then divide by the number of ranks
        results.append({"loss": loss.detach(), "grad": grad / world_size})
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_batch(tmp_path):
    tower = make_tower(tmp_path / "parts", opened=True).train()
    inputs = tower(pixels(4)).gate_inputs
    whole = balance_loss(tower.fusion.balance_statistics(inputs))
    expected = gradients(tower.fusion, whole)
    mp.start_processes(_rank, args=(2, str(tmp_path), tower.fusion, inputs), nprocs=2, start_method="fork")
    for rank in range(2):
        for result in torch.load(tmp_path / f"rank{rank}.pt", weights_only=True):
            torch.testing.assert_close(result["loss"], whole.detach())
            torch.testing.assert_close(result["grad"], expected)
