"""Tier two: models that FSDP2 has sharded, on real gloo ranks: 4 processes are 2 machines of 2 devices."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from reference import Reference
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from lightning_powersgd import PowerSGDConfig
from lightning_powersgd.compressor.basis import random_factor

if torch.__version__ < (2, 6):
    pytest.skip("sharded models need torch 2.6", allow_module_level=True)

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from lightning_powersgd.exchange import sharded as sharded_module
from lightning_powersgd.exchange.sharded import ShardedGradients, attach_powersgd_to_shards

TOKENS, WIDTH = 20, 16


class Block(nn.Module):
    """Odd sizes, so that shards are padded; and a scalar, of which the second device has nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, 33), nn.Linear(33, WIDTH)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.gain * self.narrow(torch.tanh(self.wide(h)))


class Net(nn.Module):
    """Blocks between an embedding and a head, which belong to the root.

    Args:
        checkpointed: how to recompute the blocks in the backward pass, if at all.
    """

    def __init__(self, checkpointed: str = "") -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.spare = nn.Linear(WIDTH, WIDTH)
        self.checkpointed = checkpointed
        self.uses_spare = True
        self.times = 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            for _ in range(self.times):
                h = (
                    checkpoint(block, h, use_reentrant="reentrant" in self.checkpointed)
                    if self.checkpointed
                    else block(h)
                )
        if self.uses_spare:
            h = h + self.spare(h)
        return self.head(h)


def mesh_of() -> DeviceMesh:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


def sharded(mesh: DeviceMesh, net: Net | None = None, **options: Any) -> Net:
    """Make the same model on every rank, and shard it over a mesh."""
    if net is None:
        torch.manual_seed(0)
        net = Net()
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            # gloo has no average.
            module.set_force_sum_reduction_for_comms(True)
    return net


def attach(net: Net, mesh: DeviceMesh, group_bytes: int = 4000, **config: Any) -> ShardedGradients:
    settings = PowerSGDConfig(**{"rank": 2, "min_compression_ratio": 1.0, **config})
    return attach_powersgd_to_shards(net, settings, mesh["replicate"], group_bytes=group_bytes)


def backward(net: Net, step: int, size: int = 8) -> None:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    x, y = (torch.randint(0, TOKENS, (size,), generator=generator) for _ in range(2))
    nn.functional.cross_entropy(net(x).float(), y).backward()


def train(net: Net, steps: int = 5, passes: int = 1, before: Callable[[int, int], Any] = lambda *_: None) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(steps):
        for number in range(passes):
            before(step, number)
            backward(net, passes * step + number)
        optimizer.step()
        optimizer.zero_grad()


def full(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.full_tensor().detach().clone() for name, parameter in net.named_parameters()}


def replicas_agree(net: nn.Module, mesh: DeviceMesh) -> bool:
    """Whether the shards of this rank are equal on all machines, bit for bit."""
    mine = torch.cat([parameter.to_local().detach().float().flatten() for parameter in net.parameters()])
    others = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(others, mine, group=mesh["replicate"].get_group())
    return torch.equal(others[0], others[1])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Exact steps


@pytest.mark.parametrize("config", [{"rank": {"*": 0}}, {"rank": 2, "start_step": 100}], ids=str)
@pytest.mark.parametrize("passes", [1, 3])
def test_exact_steps_are_those_of_hybrid_sharding(four_ranks, config, passes):
    assert all(four_ranks.run(_compare_with_hybrid, config, passes))


def _compare_with_hybrid(config: dict[str, Any], passes: int) -> bool:
    mesh = mesh_of()
    native = sharded(mesh)
    train(native, passes=passes, before=lambda _, number: native.set_requires_all_reduce(number == passes - 1))
    ours = sharded(mesh["shard"])
    gradients = attach(ours, mesh, **config)

    def synchronise(_: int, number: int) -> None:
        gradients.synchronises = number == passes - 1

    train(ours, passes=passes, before=synchronise)
    return same(full(native), full(ours)) and gradients.exchange.state.step == 5


def test_passes_that_fsdp_keeps_to_itself_are_no_steps(four_ranks):
    assert all(four_ranks.run(_compare_without_synchronising))


def _compare_without_synchronising() -> bool:
    mesh = mesh_of()
    native, ours = sharded(mesh), sharded(mesh["shard"])
    gradients = attach(ours, mesh, start_step=100)
    for net in (native, ours):
        train(net, passes=2, before=lambda _, number, net=net: net.set_requires_gradient_sync(number == 1))
    return same(full(native), full(ours)) and gradients.exchange.state.step == 5


def test_in_half_precision_too(four_ranks):
    assert all(four_ranks.run(_compare_in_half_precision))


def _compare_in_half_precision() -> bool:
    mesh = mesh_of()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    native, ours = sharded(mesh, mp_policy=policy), sharded(mesh["shard"], mp_policy=policy)
    attach(ours, mesh, start_step=100)
    train(native)
    train(ours)
    return same(full(native), full(ours))


# Compressed steps


@pytest.mark.parametrize("alternate", [False, True], ids=["full", "alternating"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_replicas_of_every_shard_are_equal_and_send_what_the_plan_says(four_ranks, rank, alternate):
    for agree, sent, planned, apart in four_ranks.run(_compress, rank=rank, alternate=alternate):
        assert agree
        assert sent == planned
        # Close to hybrid sharding, which an error in the exchange would not be.
        assert apart < 0.3


def _compress(**config: Any) -> tuple[bool, float, float, float]:
    mesh = mesh_of()
    native, net = sharded(mesh), sharded(mesh["shard"])
    state = attach(net, mesh, **config).exchange.state
    train(native, steps=6)
    train(net, steps=5)
    sent = state.sent_bytes
    train(net, steps=1)
    # A step sends either factor when alternating. In the first ones supports travel, too.
    sent = (sent + state.sent_bytes) / 2 - 4 * len(list(state.plan.compressed))
    apart = max(float((full(native)[name] - value).norm() / value.norm()) for name, value in full(net).items())
    return replicas_agree(net, mesh), sent, state.plan.sent_bytes(alternate=state.config.alternate), apart


def test_a_shard_is_compressed_as_the_reference_says(four_ranks):
    found = four_ranks.run(_one_matrix)
    for shard in range(2):
        ranks = [shard, 2 + shard]
        name, first = "blocks.0.wide.weight", found[shard][0][0]
        n, m = first.shape
        reference = Reference(
            lambda side, name=name, n=n, m=m: random_factor(f"0/{name}/{side}", 2, n if side == "left" else m).T, 2
        )
        for step in range(3):
            expected = reference([found[rank][step][0] for rank in ranks])
            for rank in ranks:
                average = found[rank][step][1]
                assert (average.double() - expected).norm() < 1e-4 * expected.norm()


def _one_matrix() -> list[tuple[Tensor, Tensor]]:
    """Give this rank's shard of a gradient before the exchange and after it, in three steps."""
    mesh, seen = mesh_of(), []
    net, plain = sharded(mesh["shard"]), sharded(mesh["shard"])
    attach(net, mesh)
    for step in range(3):
        backward(plain, step)
        backward(net, step)
        seen.append(tuple(model.blocks[0].wide.weight.grad.to_local().clone() for model in (plain, net)))
        net.zero_grad()
        plain.zero_grad()
    return seen


@pytest.mark.parametrize(
    "variant", ["checkpointed", "checkpointed, reentrant", "compiled", "columns", "bfloat16", "run twice"]
)
def test_what_models_do(four_ranks, variant):
    if variant == "compiled" and not torch.backends.cpu.get_cpu_capability():
        pytest.skip("no compiler")
    for agree, steps, apart, compressed in four_ranks.run(_vary, variant):
        assert agree
        assert steps == 4
        assert apart < 0.3
        assert compressed > 5


def _vary(variant: str) -> tuple[bool, int, float, int]:
    mesh = mesh_of()
    options: dict[str, Any] = {}
    if variant == "columns":
        options["shard_placement_fn"] = lambda parameter: Shard(1) if parameter.shape == (WIDTH, WIDTH) else Shard(0)

    def make(mesh: DeviceMesh) -> Net:
        torch.manual_seed(0)
        net = Net(checkpointed=variant if "checkpointed" in variant else "")
        net.times = 2 if variant == "run twice" else 1
        if variant == "bfloat16":
            net = net.bfloat16()
        net = sharded(mesh, net, **options)
        if variant == "compiled":
            for block in net.blocks:
                block.compile(backend="eager")
        return net

    native, net = make(mesh), make(mesh["shard"])
    exchange = attach(net, mesh, rank=4).exchange
    train(native, steps=4)
    train(net, steps=4)
    apart = max(float((full(native)[name] - value).norm() / value.norm()) for name, value in full(net).items())
    state = exchange.state
    return replicas_agree(net, mesh), state.step, apart, len(list(state.plan.compressed))


# Unused parameters, and passes that break off


@pytest.mark.parametrize("config", [{"start_step": 100}, {}, {"rank": {"*": 0}}], ids=["exact", "compressed", "whole"])
def test_a_parameter_that_one_replica_does_not_use_has_the_average(four_ranks, config):
    results = four_ranks.run(_leave_out, config, "in one replica")
    for agree, gradient, _ in results:
        assert agree
        assert gradient is not None


@pytest.mark.parametrize("config", [{"start_step": 100}, {}], ids=["exact", "compressed"])
def test_a_parameter_that_no_replica_uses_has_no_gradient_and_keeps_its_error(four_ranks, config):
    for agree, gradient, kept in four_ranks.run(_leave_out, config, "in none"):
        assert agree
        assert gradient is None
        assert kept


def _leave_out(config: dict[str, Any], where: str) -> tuple[bool, Tensor | None, bool]:
    mesh = mesh_of()
    net = sharded(mesh["shard"])
    state = attach(net, mesh, **config).exchange.state
    train(net, steps=2)
    before = {name: error.clone() for name, error in state.errors.items()}
    net.uses_spare = where == "in one replica" and dist.get_rank() < 2
    backward(net, 7)
    gradient = net.spare.weight.grad
    kept = all(torch.equal(before[name], error) for name, error in state.errors.items() if "spare" in name)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    return replicas_agree(net, mesh), None if gradient is None else gradient.to_local(), kept


def test_what_was_accumulated_counts_also_where_the_last_pass_does_not_use_it(four_ranks):
    assert all(four_ranks.run(_accumulate_and_leave_out))


def _accumulate_and_leave_out() -> bool:
    mesh = mesh_of()
    net = sharded(mesh["shard"])
    gradients = attach(net, mesh, start_step=100)
    gradients.synchronises = False
    backward(net, 0)
    own = net.spare.weight.grad.to_local().clone()
    gradients.synchronises, net.uses_spare = True, False
    backward(net, 1)
    both = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(both, own, group=mesh["replicate"].get_group())
    return torch.allclose(net.spare.weight.grad.to_local(), (both[0] + both[1]) / 2)


@pytest.mark.parametrize("alternate", [False, True], ids=["full", "alternating"])
def test_what_is_not_finite_in_one_shard_leaves_no_trace_on_any_rank(four_ranks, alternate):
    assert all(four_ranks.run(_break, alternate))


def _break(alternate: bool) -> bool:
    mesh = mesh_of()
    net = sharded(mesh["shard"])
    state = attach(net, mesh, alternate=alternate).exchange.state
    train(net, steps=3)
    before = state.state_dict()["parameters"]
    with torch.no_grad():
        row = net.embedding.weight.to_local()
        saved = row.clone()
        if dist.get_rank() == 3:
            row.fill_(float("inf"))
    backward(net, 9)
    row.data.copy_(saved)
    after = state.state_dict()["parameters"]
    kept = all(
        torch.equal(entry["error"], after[name]["error"])
        and all(torch.equal(factor, after[name]["factors"][side]) for side, factor in entry["factors"].items())
        for name, entry in before.items()
    )
    net.zero_grad()
    train(net, steps=2)
    return kept and replicas_agree(net, mesh) and all(value.isfinite().all() for value in full(net).values())


def test_a_pass_that_an_exception_broke_off_is_forgotten(four_ranks):
    assert all(four_ranks.run(_break_off))


def _break_off() -> bool:
    mesh = mesh_of()
    net = sharded(mesh["shard"])
    state = attach(net, mesh).exchange.state
    train(net, steps=2)
    before = {name: error.clone() for name, error in state.errors.items()}
    handle = net.embedding.register_forward_hook(lambda *args: _fail_later(args[2]))
    with contextlib.suppress(ZeroDivisionError):
        backward(net, 5)
    handle.remove()
    kept = all(torch.equal(before[name], error) for name, error in state.errors.items())
    # FSDP2 itself keeps some of its gradients.
    net._get_fsdp_state()._reset_iter_state()
    net.zero_grad()
    train(net, steps=2)
    return kept and state.step == 4 and replicas_agree(net, mesh)


def _fail_later(output: Tensor) -> None:
    output.register_hook(_fail)


def _fail(_: Tensor) -> None:
    raise ZeroDivisionError


# When things travel


def test_most_collectives_start_before_the_end_of_the_backward_pass(four_ranks):
    for early, groups in four_ranks.run(_watch):
        assert groups >= 5
        assert early >= groups - 2


def _watch() -> tuple[int, int]:
    mesh = mesh_of()
    net = sharded(mesh["shard"])
    gradients = attach(net, mesh, group_bytes=2000)
    train(net, steps=2)
    started: list[int] = []
    original = type(gradients)._end_pass

    def end(self: Any) -> None:
        started.append(gradients.exchange._started)
        original(self)

    with mock.patch.object(type(gradients), "_end_pass", end):
        train(net, steps=1)
    return started[0], len(gradients.exchange.state.plan.groups)


# Going on


def test_a_state_that_was_saved_goes_on_with_the_same_bits(four_ranks):
    assert all(four_ranks.run(_go_on))


def _go_on() -> bool:
    mesh = mesh_of()
    straight = sharded(mesh["shard"])
    gradients = attach(straight, mesh)
    train(straight, steps=3)
    state = gradients.exchange.state_dict()
    values = full(straight)
    train(straight, steps=3)
    torch.manual_seed(0)
    net = Net()
    net.load_state_dict(values)
    resumed = sharded(mesh["shard"], net)
    attach(resumed, mesh).exchange.load_state_dict(state)
    train(resumed, steps=3)
    return same(full(straight), full(resumed))


def test_retired_it_leaves_gradients_to_the_machine(four_ranks):
    assert all(four_ranks.run(_retire))


def _retire() -> bool:
    mesh = mesh_of()
    net, plain = sharded(mesh["shard"]), sharded(mesh["shard"])
    gradients = attach(net, mesh)
    gradients.retire()
    train(net, steps=2)
    train(plain, steps=2)
    return same(full(net), full(plain))


# What is refused


def test_a_change_of_what_is_trainable_is_refused(four_ranks):
    for text in four_ranks.run_to_errors(_freeze):
        assert "'spare.weight' was frozen since PowerSGD was attached" in text


def _freeze() -> None:
    mesh = mesh_of()
    net = sharded(mesh["shard"])
    attach(net, mesh)
    train(net, steps=1)
    net.spare.requires_grad_(False)
    backward(net, 3)


def test_a_pass_that_calls_no_hooks_is_refused(four_ranks):
    for text in four_ranks.run_to_errors(_without_hooks):
        assert "has made gradients without calling the hooks of the sharded parameters" in text


def _without_hooks() -> None:
    mesh = mesh_of()
    net = sharded(mesh["shard"])
    attach(net, mesh)
    for parameter in net.parameters():
        parameter._post_accumulate_grad_hooks.clear()
    backward(net, 0)


def test_a_gradient_that_comes_once_more_is_refused(four_ranks):
    for text in four_ranks.run_to_errors(_once_more):
        assert "The gradient of 'blocks.3.gain' came more often in this backward pass" in text


def _once_more() -> None:
    mesh = mesh_of()
    net = sharded(mesh["shard"])
    gradients = attach(net, mesh)
    train(net, steps=1)
    net.embedding.register_forward_hook(
        lambda *args: args[2].register_hook(lambda _: gradients._arrive("blocks.3.gain")) and None
    )
    backward(net, 3)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("not sharded", "The model is not sharded"),
        ("root left out", "'embedding.weight' is not sharded"),
        ("replicated natively", "is replicated by FSDP already"),
        ("FSDP1", "is wrapped in `FullyShardedDataParallel`"),
        ("old torch", "Sharded models need PyTorch 2.6 or later"),
        ("on meta", "is on the meta device"),
        ("offloaded", "is kept in main memory (`CPUOffloadPolicy`)"),
    ],
)
def test_other_models_are_refused_by_name(four_ranks, case, message):
    for text in four_ranks.run_to_errors(_misfit, case):
        assert message in text


def _misfit(case: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    mesh, net = mesh_of(), Net()
    if case == "root left out":
        for block in net.blocks:
            fully_shard(block, mesh=mesh["shard"])
    elif case == "replicated natively":
        net = sharded(mesh)
    elif case == "FSDP1":
        net.spare = FullyShardedDataParallel(net.spare, mesh["shard"].get_group(), device_id=torch.device("cpu"))
    elif case == "old torch":
        with mock.patch.object(torch, "__version__", torch.torch_version.TorchVersion("2.5.1")):
            importlib.reload(sharded_module)
    elif case == "on meta":
        with torch.device("meta"):
            net = Net()
        net = sharded(mesh["shard"], net)
    elif case == "offloaded":
        net = sharded(mesh["shard"])
        # Shards on the CPU, where the mesh is of GPUs: as `CPUOffloadPolicy` leaves them.
        next(iter(net.parameters())).device_mesh._device_type = "cuda"
    attach(net, mesh)
