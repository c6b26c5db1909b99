"""Tier one: what is forecast from a plan; and once on two ranks, that the hook sends what was forecast."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from nets import attach, make_batches, make_net, resnet18_parameters
from ranks import counted_all_reduce
from torch import nn
from torch.nn import functional as F

from lightning_powersgd import PowerSGDConfig, forecast_exchange, make_plan
from lightning_powersgd.planner import forecast
from lightning_powersgd.planner.units import format_rate, parse_rate


def test_the_times_are_those_computed_by_hand():
    # 100 × 100 and 100 elements of 4 bytes; factors of 2 × 100 each. One group: P with the vector, then Q.
    result = forecast_exchange(
        nn.Linear(100, 100), PowerSGDConfig(rank=2), world_size=4, latency=0.001, compress_seconds=0.005
    )
    assert result.dense_payloads == (40_400,)
    assert result.payloads == (1_200, 800)
    link = result.over("1mbit")
    # Six messages of a quarter of the payload: 1 ms and 8 · 10,100 / 1e6 s each.
    assert link.all_reduce_seconds == pytest.approx(6 * (0.001 + 0.0808))
    # Half the bytes in as many messages; the casts are free where PowerSGD's arithmetic was given.
    assert result.bf16_payloads == (20_200,)
    assert link.bf16_seconds == pytest.approx(6 * (0.001 + 0.0404))
    assert (link.rival, link.rival_seconds) == ("the bf16 hook", link.bf16_seconds)
    assert link.network_seconds == pytest.approx(6 * (0.001 + 0.0024) + 6 * (0.001 + 0.0016))
    assert link.powersgd_seconds == pytest.approx(0.005 + link.network_seconds)
    assert link.pays
    # A second collective costs 6 ms, computing 5 ms; 6 · 8 · (5,050 − 500) bits are saved.
    assert result.break_even == pytest.approx(218_400 / 0.011)


def test_the_ratio_of_a_resnet18_is_the_plans():
    config = PowerSGDConfig(rank=2)
    result = forecast_exchange(resnet18_parameters(), config, compress_seconds=0.03)
    plan = make_plan(resnet18_parameters(), config)
    assert (
        result.compression_ratio == plan.dense_bytes / plan.sent_bytes(alternate=False) == pytest.approx(136, rel=0.01)
    )
    assert [slot.name for slot in result.parameters] == [name for name, _ in resnet18_parameters()]
    assert sum(result.payloads) == result.sent_bytes
    assert sum(result.dense_payloads) == result.dense_bytes


def _payloads_of_two_steps(**config) -> list[list[int]]:
    model, exchange = attach(make_net(), **config)
    steps = []
    for x, y in make_batches(2):  # in which alternating steps send more, once
        F.cross_entropy(model(x), y).backward()
    for x, y in make_batches(2):
        with counted_all_reduce() as sent:
            F.cross_entropy(model(x), y).backward()
        steps.append(list(sent))
    return [[sum(step) / 2 for step in zip(*steps, strict=True)], exchange.state.plan.payloads(**_alternating(config))]


def _alternating(config):
    return {"alternate": config.get("alternate", False)}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"alternate": True},
        {"bucket_cap_mb": 1e-6},
        {"bucket_cap_mb": 1e-6, "comm_dtype": "bfloat16"},
        {"bucket_cap_mb": 1e-6, "comm_dtype": "bfloat16", "alternate": True},
        {"rank": {"3.weight": 2}, "bucket_cap_mb": 1e-3},
    ],
)
def test_payloads_are_those_that_enter_all_reduce(two_ranks, config):
    sent, planned = two_ranks.run(_payloads_of_two_steps, **config)[0]
    assert sent == planned


def _dense_buckets() -> list[list[float]]:
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*[nn.Linear(700, 700) for _ in range(16)]))
    buckets: list[int] = []

    def note(state, bucket):
        buckets.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, note)
    for _ in range(2):  # DDP makes its buckets anew after the first step
        buckets.clear()
        model(torch.ones(1, 700)).sum().backward()
    return [buckets, [*forecast_exchange(model.module, compress_seconds=0).dense_payloads]]


def test_dense_payloads_are_the_buckets_of_ddp(two_ranks):
    reduced, planned = two_ranks.run(_dense_buckets)[0]
    assert len(reduced) == 3
    assert planned == reduced


def test_every_dtype_has_buckets_of_its_own():
    parameters = [("a", torch.empty(100)), ("b", torch.empty(2**20)), ("c", torch.empty(2**19, dtype=torch.bfloat16))]
    named = [(name, nn.Parameter(tensor)) for name, tensor in parameters]
    assert forecast_exchange(named, compress_seconds=0).dense_payloads == (2**20, 2**22, 400)


def test_on_the_link_of_break_even_powersgd_takes_as_long_as_its_rival():
    result = forecast_exchange(resnet18_parameters(), PowerSGDConfig(rank=2), compress_seconds=0.03)
    at, below, above = (result.over(result.break_even * factor) for factor in (1, 0.99, 1.01))
    assert at.rival_seconds == at.bf16_seconds == pytest.approx(at.powersgd_seconds)
    assert below.pays
    assert not above.pays
    assert str(above).startswith(f"{above.name}: PowerSGD would not pay here. It takes 34.")
    assert f", the bf16 hook 34.3 ms. It would pay on a link below {format_rate(result.break_even)}." in str(above)
    assert str(result.over("100mbit")) == "100mbit: 80.3 ms instead of 3.13 s with the bf16 hook, 39× faster."


def test_where_computing_costs_nothing_it_always_pays():
    result = forecast_exchange(resnet18_parameters(), PowerSGDConfig(rank=2, alternate=True), compress_seconds=0)
    assert result.break_even == math.inf
    assert result.over(1e15).pays
    assert "it is faster than plain all-reduce and the bf16 hook on any link." in str(result)


def test_a_latency_may_eat_all_that_is_saved():
    result = forecast_exchange(nn.Linear(50, 50), world_size=64, latency=0.01, compress_seconds=0.001)
    link = result.over("10gbit")
    assert not link.pays
    assert 0 < result.break_even < link.bits_per_second


def test_nothing_to_compress_never_pays():
    result = forecast_exchange(nn.LayerNorm(100), device="cpu")
    assert result.compress_seconds == 0
    assert result.break_even == 0
    assert not result.over(1).pays
    assert str(result.over("1gbit")).startswith("1gbit: PowerSGD would not pay here. It takes 1.41 ms, ")
    assert str(result) == "PowerSGD compresses none of the 2 trainable parameters."


def test_the_bf16_hook_sends_two_bytes_of_what_is_wider():
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)
    named = [(str(dtype), nn.Parameter(torch.empty(1000, dtype=dtype))) for dtype in dtypes]
    result = forecast_exchange(named, compress_seconds=0)
    assert sorted(result.dense_payloads) == [2000, 2000, 4000, 8000, 8000]
    assert sorted(result.bf16_payloads) == [2000, 2000, 2000, 2000, 8000]
    assert result.cast_seconds == 0


def test_casts_are_measured_where_computing_is(monkeypatch):
    monkeypatch.setattr(forecast, "measure_compression", lambda *_: 0.03)
    monkeypatch.setattr(forecast, "measure_casts", lambda slots, device: 1e-6 * sum(slot.numel for slot in slots))
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100, dtype=torch.bfloat16))
    result = forecast_exchange(model, device="cpu")
    assert result.cast_seconds == pytest.approx(0.0101)
    link = result.over("1gbit")
    given = forecast_exchange(model, compress_seconds=0.03).over("1gbit")
    assert link.bf16_seconds == pytest.approx(given.bf16_seconds + 0.0101)
    # Then plain all-reduce is the one to be faster than.
    assert (link.rival, given.rival) == ("plain all-reduce", "the bf16 hook")
    assert link.rival_seconds == link.all_reduce_seconds


def test_where_the_bf16_hook_sends_fewer_bytes_no_slow_link_pays():
    # One matrix of 30 × 30, and a vector that only the hook makes shorter.
    model = nn.ParameterDict({"matrix": torch.empty(30, 30), "vector": torch.empty(10_000)})
    result = forecast_exchange(model, PowerSGDConfig(rank=2), compress_seconds=0.001)
    assert sum(result.bf16_payloads) < result.sent_bytes < result.dense_bytes
    assert result.break_even == 0
    assert not result.over("1kbit").pays
    assert str(result.over("1kbit")).endswith(" s.")
    assert "it is faster than plain all-reduce and the bf16 hook on no link." in str(result)


def test_the_speedup_of_a_step_lies_between_no_overlap_and_all():
    # A link that carries a second's worth of bfloat16.
    link = forecast_exchange(nn.Linear(100, 100), world_size=2, latency=0, compress_seconds=0.5).over(16 * 10_100)
    assert link.all_reduce_seconds == 2
    assert link.bf16_seconds == 1
    assert link.powersgd_seconds == pytest.approx(0.5 + 900 / 5_050)
    assert link.speedup() == pytest.approx(1 / link.powersgd_seconds)
    assert link.speedup(2) == pytest.approx(3 / (2 + link.powersgd_seconds))
    assert link.least_speedup(2) == pytest.approx(2 / (2 + link.powersgd_seconds))
    assert link.least_speedup(0.1) == pytest.approx(1 / (0.1 + link.powersgd_seconds))


def test_a_model_may_be_described_in_several_ways():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(60, 50), nn.BatchNorm1d(50), nn.Linear(50, 40))
    module[2].bias.requires_grad_(False)
    by_module = forecast_exchange(module, compress_seconds=0)
    by_names = forecast_exchange(iter(module.named_parameters()), compress_seconds=0)
    assert by_module == by_names
    assert by_module.frozen == 1
    assert [slot.name for slot in by_module.parameters] == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]
    # A state dict does not know what is frozen.
    by_state = forecast_exchange(module.state_dict(), compress_seconds=0)
    assert [slot.name for slot in by_state.parameters] == [name for name, _ in module.named_parameters()]


def test_a_sharded_model_is_forecast_for_the_first_of_its_devices():
    model = nn.ModuleDict({"wide": nn.Linear(4096, 30, bias=False), "tall": nn.Linear(64, 4096)})
    config = PowerSGDConfig(rank=2, min_compression_ratio=1)
    result = forecast_exchange(model, config, world_size=2, compress_seconds=0, shards=4)
    assert [slot.shape for slot in result.parameters] == [(8, 4096), (1024, 64), (1024,)]
    assert result.dense_bytes == 4 * (8 * 4096 + 1024 * 64 + 1024)
    assert result.sent_bytes == 4 * (2 * (8 + 4096) + 2 * (1024 + 64) + 1024)
    # Two gathers and a reduction, each of three quarters of the model.
    assert result.bytes_in_node == 3 * 3 * result.dense_bytes
    assert result.error_bytes == 4 * (8 * 4096 + 1024 * 64)
    # Of 30 × 4096 each of four devices then has 30 × 1024.
    assert result.along_longest == 4 * (2 * (30 + 1024) + 2 * (1024 + 64) + 1024)
    whole = forecast_exchange(model, config, compress_seconds=0)
    assert (whole.shards, whole.bytes_in_node, whole.along_longest) == (1, 0, None)


def test_machines_with_several_devices_are_forecast_for_the_busiest_of_them():
    model = nn.ModuleDict({"large": nn.Linear(300, 200), "a": nn.Linear(200, 100), "b": nn.Linear(200, 100)})
    config = PowerSGDConfig(rank=2, min_compression_ratio=1)
    result = forecast_exchange(model, config, world_size=4, compress_seconds=0.01, devices=2)
    inside = result.hierarchy
    # The large one has an owner of its own, who has 60,000 of 100,000 elements.
    assert inside.compress_seconds == pytest.approx(0.006)
    assert inside.error_bytes == 4 * 60_000
    assert inside.bytes_in_node == (result.dense_bytes + result.sent_bytes) / 2
    assert inside.break_even == pytest.approx(8 * inside.bytes_in_node / 0.004)
    assert forecast_exchange(model, config, world_size=4, compress_seconds=0.01).hierarchy is None
    # All belongs to one device, and nothing is gained.
    alone = forecast_exchange(nn.Linear(300, 200, bias=False), config, world_size=4, compress_seconds=1, devices=2)
    assert (alone.hierarchy.compress_seconds, alone.hierarchy.break_even) == (1, math.inf)
    nothing = forecast_exchange(nn.Linear(30, 1), config, world_size=4, compress_seconds=1, devices=2)
    assert nothing.hierarchy.break_even == math.inf


def test_a_link_carries_a_bit_to_an_exabit_a_second():
    assert [parse_rate(text) for text in ("1bit", "1000000tbit")] == [1, 1e18]
    for text in ("0.999bit", "1000001tbit", "0." + 320 * "0" + "1gbit", "1" + 400 * "0" + "bit"):
        with pytest.raises(ValueError, match="is not the speed of a link"):
            parse_rate(text)


def test_a_gpu_that_is_full_is_named(monkeypatch):
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(forecast, "measure_compression", full)
    with pytest.raises(ValueError, match=r"`device='cuda'`: its memory is too full .* give `compress_seconds`"):
        forecast_exchange(nn.Linear(100, 100))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"world_size": 1}, ValueError, "`world_size=1` is below 2. A single rank has nobody"),
        ({"shards": 0}, ValueError, "`shards=0` is below 1. Use 1 if the model is not sharded"),
        ({"devices": 0}, ValueError, "`devices=0` is below 1. Use 1 if every machine has one device"),
        ({"devices": 3}, ValueError, "`devices=3` cannot be with `world_size=8` and `shards=1`. Give the devices"),
        ({"devices": 8}, ValueError, "`devices=8` cannot be with `world_size=8` and `shards=1`"),
        ({"devices": 2, "shards": 2}, ValueError, "`devices=2` cannot be with `world_size=8` and `shards=2`"),
        ({"world_size": 2.5}, TypeError, "`world_size=2.5` is not an integer"),
        ({"world_size": 2**31}, ValueError, "`world_size=2147483648` is above 2147483647. Give the number"),
        ({"latency": -1}, ValueError, "`latency=-1` is not a time"),
        ({"latency": 10**400}, ValueError, "`latency=1000*` is not a time"),
        ({"compress_seconds": math.nan}, ValueError, "`compress_seconds=nan` is not a time"),
        ({"compress_seconds": 10**400}, ValueError, "`compress_seconds=1000*` is not a time"),
        ({"device": "cuda"}, ValueError, "torch finds no GPU"),
        ({"config": PowerSGDConfig(rank={"nothing*": 2})}, ValueError, "matches no parameter"),
    ],
)
def test_what_cannot_be_forecast_is_named(monkeypatch, arguments, error, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        forecast_exchange(nn.Linear(60, 60), **arguments)


@pytest.mark.parametrize("link", [0, -1.0, math.nan, math.inf, pytest.param(10**400, id="huge"), True])
def test_a_speed_is_positive(link):
    with pytest.raises(ValueError, match="is not the speed of a link"):
        forecast_exchange(nn.Linear(60, 60), compress_seconds=0).over(link)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_dtype_that_cannot_be_averaged_is_named(dtype):
    module = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60, device="meta", dtype=dtype))
    for model in (module, module.state_dict()):
        with pytest.raises(ValueError, match=f"'1.weight' is of {dtype}, in which gradients cannot be averaged. Give"):
            forecast_exchange(model)
    module[1].requires_grad_(False)
    assert forecast_exchange(module, compress_seconds=0).frozen == 2


def test_complex_parameters_are_sent_whole():
    state = {"spectrum": torch.zeros(60, 60, dtype=torch.complex64), "weight": torch.zeros(60, 60)}
    result = forecast_exchange(state, compress_seconds=0)
    assert [slot.rank for slot in result.parameters] == [0, 3]


def test_a_model_without_gradients_or_shapes_is_refused():
    for model in (
        nn.ReLU(),
        nn.Linear(3, 3).requires_grad_(False),
        {"ids": torch.arange(3)},
        {"empty": torch.empty(0, 5)},
    ):
        with pytest.raises(ValueError, match="no trainable parameter"):
            forecast_exchange(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older versions of torch say that lazy modules are new
        lazy = nn.LazyLinear(10)
    with pytest.raises(ValueError, match="'weight' is lazy"):
        forecast_exchange(lazy)
