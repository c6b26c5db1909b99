"""Tier two: the exchange without DDP: gradients that a loop hands over, on real gloo ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import attach, gradients, like_an_accelerator, make_batches, make_net
from ranks import counted_all_reduce
from torch import Tensor, nn

from lightning_powersgd import GradientExchange, PowerSGDConfig, PowerSGDState
from lightning_powersgd.compressor import native


def exchange_of(net: nn.Module, group_bytes: int = 2**20, arrival: Iterable[str] | None = None, **settings):
    state = PowerSGDState(net.named_parameters(), PowerSGDConfig(**{"rank": 2, **settings}), group_bytes, arrival)
    return GradientExchange(state)


def backward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    net.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()


def hand_over(exchange: GradientExchange, parameters: Iterable[Tensor]) -> None:
    exchange.begin_step()
    for parameter in parameters:
        exchange.take(parameter, parameter.grad)
        exchange.advance()
    exchange.end_step()


@pytest.mark.parametrize("alternate", [False, True], ids=["full", "alternating"])
@pytest.mark.parametrize("group_bytes", [2**10, 2**20], ids=["many groups", "one group"])
def test_a_loop_over_gradients_gets_what_ddps_hook_gets(two_ranks, group_bytes, alternate):
    for ours, ddps in two_ranks.run(_loop_and_hook, group_bytes, alternate):
        assert ours == ddps


def _loop_and_hook(group_bytes: int, alternate: bool) -> tuple[list[bytes], list[bytes]]:
    settings = {"alternate": alternate, "start_step": 2, "min_compression_ratio": 1.0}
    net = make_net()
    exchange = exchange_of(net, group_bytes, **settings)
    model, hooked = attach(make_net(), group_bytes / 2**20, **settings)
    ours, ddps = [], []
    for batch in make_batches(6):
        backward(net, batch)
        hand_over(exchange, net.parameters())
        ours += [parameter.grad.numpy().tobytes() for parameter in net.parameters()]
        backward(model, batch)
        ddps += [gradient.numpy().tobytes() for gradient in gradients(model).values()]
    assert exchange.state.dense_bytes == hooked.state.dense_bytes
    assert exchange.state.total_sent_bytes == hooked.state.total_sent_bytes
    return ours, ddps


def test_exact_steps_send_each_group_in_one_collective(two_ranks):
    for sent, planned in two_ranks.run(_exact_step):
        assert sent == planned
        assert len(sent) > 1


def _exact_step() -> tuple[list[int], list[int]]:
    net = make_net()
    exchange = exchange_of(net, 2**12, start_step=1)
    backward(net, make_batches(1)[0])
    with counted_all_reduce() as sent:
        hand_over(exchange, net.parameters())
    return sent, [sum(slot.dense_bytes for slot in group.slots) for group in exchange.state.plan.groups]


def test_an_exact_step_may_average_what_a_source_has_packed_itself(two_ranks):
    for first, second in two_ranks.run(_packed_by_the_source):
        assert torch.equal(first, torch.tensor([0.5, 1.0]))
        assert second == 8


def _packed_by_the_source() -> tuple[Tensor, int]:
    exchange = exchange_of(make_net(), start_step=1)
    packed = torch.tensor([1.0, 2.0]) * dist.get_rank()
    exchange.begin_step()
    exchange.average(packed)
    exchange.end_step()
    return packed, exchange.state.sent_bytes


def test_the_first_group_starts_when_its_gradients_are_there_and_not_at_the_end(two_ranks):
    """In the order of arrival that it was told, whatever the order in which parameters were registered."""
    for in_order, against_it in two_ranks.run(_starts):
        assert in_order[0] < 1.0
        assert against_it[0] == 1.0


def _starts() -> list[list[float]]:
    return [_shares_before_each_collective(told) for told in (True, False)]


def _shares_before_each_collective(told: bool) -> list[float]:
    """The share of gradients that were there before each collective, where they come in the order of registration."""
    net = make_net()
    names = [name for name, _ in net.named_parameters()]
    exchange = exchange_of(net, 2**10, names if told else None)
    backward(net, make_batches(1)[0])
    shares: list[float] = []
    exchange.begin_step()
    for index, parameter in enumerate(net.parameters(), 1):
        exchange.take(parameter, parameter.grad)
        with counted_all_reduce() as sent:
            exchange.advance()
        shares += [index / len(names)] * len(sent)
    exchange.end_step()
    return shares


def test_an_order_of_arrival_without_a_parameter_is_refused():
    net = make_net()
    others = [name for name, _ in net.named_parameters() if name != "3.weight"]
    with pytest.raises(ValueError, match=r"`arrival` has not the trainable parameter '3\.weight'"):
        PowerSGDState(net.named_parameters(), PowerSGDConfig(rank=2), arrival=others)


@pytest.mark.parametrize("start_step", [0, 2])
def test_an_exchange_without_parameters_takes_part_in_nothing(two_ranks, start_step):
    for sent, step, saved in two_ranks.run(_nothing_to_exchange, start_step):
        assert sent == []
        assert step == 3
        assert saved == {}


def _nothing_to_exchange(start_step: int) -> tuple[list[int], int, dict[str, object]]:
    exchange = exchange_of(nn.ReLU(), start_step=start_step)
    with counted_all_reduce() as sent:
        for _ in range(3):
            hand_over(exchange, [])
    exchange.average_errors()
    assert exchange.residual_norms() == (0, 0)
    saved = exchange.state.state_dict()["parameters"]
    exchange.retire()
    return sent, exchange.state.step, saved


@pytest.mark.parametrize("accelerator", [False, True], ids=["", "as on an accelerator"])
@pytest.mark.parametrize("alternate", [False, True], ids=["full", "alternating"])
def test_judges_of_other_shards_keep_errors_and_factors_as_they_were(four_ranks, alternate, accelerator):
    """Ranks 0 and 2 average one shard, 1 and 3 another. An inf in the first must not let the second go on alone."""
    for spoiled, kept, kept_alone in four_ranks.run(_two_shards, alternate, accelerator):
        assert kept, "the shard that saw no inf keeps its errors and factors as well"
        assert kept_alone is spoiled, "without judges it would not"


def _two_shards(alternate: bool, accelerator: bool) -> tuple[bool, bool, bool]:
    shard = dist.get_rank() % 2
    averaging = [dist.new_group([index, index + 2]) for index in (0, 1)][shard]
    sharding = [dist.new_group([index, index + 1]) for index in (0, 2)][dist.get_rank() // 2]
    results = []
    for judges in (sharding, None):
        torch.manual_seed(shard)
        weight = nn.Parameter(torch.zeros(40, 30 + shard))
        state = PowerSGDState([("weight", weight)], PowerSGDConfig(rank=2, alternate=alternate))
        with like_an_accelerator(accelerator):
            exchange = GradientExchange(state, averaging, judges=judges)
            for spoiled in (False, True):
                weight.grad = torch.randn(40, 30 + shard, generator=torch.Generator().manual_seed(dist.get_rank()))
                if spoiled and not shard:
                    weight.grad[3, 4] = torch.inf
                before = _held(state)
                hand_over(exchange, [weight])
            after = _held(state)
        results.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return not shard, *results


def _held(state: PowerSGDState) -> list[Tensor]:
    state.held  # noqa: B018  # asks for the verdict of the last step
    return [state.errors["weight"].clone(), *(factor.clone() for factor in state.factors["weight"].values())]


def test_a_step_that_lacks_a_gradient_says_whose(two_ranks):
    for text in two_ranks.run_to_errors(_forget_a_gradient):
        assert "The step has no gradient of 1 parameters, such as '7.bias'" in text


def _forget_a_gradient() -> None:
    net = make_net()
    backward(net, make_batches(1)[0])
    hand_over(exchange_of(net), list(net.parameters())[:-1])


@contextmanager
def _autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def _medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _of_the_backend() -> Iterator[None]:
    products = torch.backends.mkldnn.matmul
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        yield
        assert products.fp32_precision == "bf16"
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize("rank", [1, 2, 32])
@pytest.mark.parametrize("wishes", [_autocast, _medium, _of_the_backend])
def test_what_a_program_asks_of_its_own_products_does_not_reach_the_exchange(two_ranks, wishes, rank):
    for expected, found in two_ranks.run(_beside, wishes, rank):
        assert expected == found


def _beside(wishes: Callable[[], AbstractContextManager[None]], rank: int) -> list[list[bytes]]:
    results = []
    # The passes of the compiled library ask nobody.
    with mock.patch.object(native, "library", return_value=None):
        for context in (nullcontext, wishes):
            torch.manual_seed(dist.get_rank())
            parameters = [nn.Parameter(torch.randn(256, 320)), nn.Parameter(torch.randn(320, 256))]
            named = {str(number): parameter for number, parameter in enumerate(parameters)}
            settings = PowerSGDConfig(rank=rank, min_compression_ratio=1.0)
            exchange = GradientExchange(PowerSGDState(named.items(), settings))
            for _ in range(3):
                for parameter in parameters:
                    parameter.grad = torch.randn_like(parameter)
                with context():
                    hand_over(exchange, parameters)
            results.append([parameter.grad.numpy().tobytes() for parameter in parameters])
    return results


def test_a_captured_graph_is_refused(two_ranks):
    for error in two_ranks.run_to_errors(_capture):
        assert "is captured as a CUDA graph" in error


def _capture() -> None:
    exchange = exchange_of(make_net())
    exchange._device = torch.device("cuda")
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
        exchange.begin_step()


def test_what_a_broken_step_has_sent_is_waited_for(two_ranks):
    """Or it would be added to what the next step packs into the same memory."""
    assert two_ranks.run(_waits) == [[True] * 4] * 2


def _waits() -> list[bool]:
    waited = []
    for config in ({}, {"alternate": True}, {"comm_dtype": "int8"}, {"start_step": 9}):
        net = make_net()
        exchange = exchange_of(net, **config)
        for _ in range(3):  # the integers' magnitudes are known then
            backward(net, make_batches(1)[0])
            hand_over(exchange, net.parameters())
        exchange.begin_step()
        for parameter in net.parameters():
            exchange.take(parameter, parameter.grad)
        exchange.advance()
        works = [work for wire in exchange._wires._wires if wire._in_flight for work in wire._in_flight[:1]]
        works += [group._work for group in exchange._exact if group._work is not None]
        exchange.begin_step()
        waited.append(len(works) > 0 and all(work.is_completed() for work in works))
    return waited


def test_a_step_goes_on_after_one_that_was_broken_off(two_ranks):
    for first, second in two_ranks.run(_break_off):
        assert first == second


def _break_off() -> list[list[bytes]]:
    results = []
    for broken in (True, False):
        net = make_net()
        exchange = exchange_of(net)
        backward(net, make_batches(1)[0])
        if broken:
            exchange.begin_step()
            weight = next(iter(net.parameters()))
            exchange.take(weight, weight.grad.clone())
        hand_over(exchange, net.parameters())
        results.append([parameter.grad.numpy().tobytes() for parameter in net.parameters()])
    return results
