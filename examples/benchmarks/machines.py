"""Time whole training steps on two machines of two devices each, with every way to average between them.

    python examples/benchmarks/machines.py                           # loopback: what the arithmetic takes
    python examples/benchmarks/machines.py --link 1gbit 100mbit      # emulated links need root, `ip` and `tc`

The machines are network namespaces of two processes each, with an emulated link between them. The contestants take
turns within one run of the same processes, and their ratios are taken round by round. Some shard the model inside each
machine: "hybrid sharding" is FSDP2's own on a mesh of two dimensions, with bf16 it reduces gradients in that dtype, and
"no exchange" averages inside each machine only.
The others have the whole model on every device. No contestant takes an optimizer's step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import common
import numpy as np
import torch
from common import BLUE, GREEN, GREY, ORANGE, PURPLE, ResultTable, format_bytes, format_number, positive, spread
from matplotlib.figure import Figure
from network import LINKS, over_links
from processes import Rank, run_over_link
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from workloads import NETWORKS, Network, bf16_hook

MACHINES, DEVICES = 2, 2
REPEATS = {"loopback": 20, "10gbit": 20, "1gbit": 8, "100mbit": 3}
NO_EXCHANGE, HYBRID, DDP = "sharded, no exchange", "sharded, FSDP2's hybrid sharding", "DDP"
HYBRID_BF16, DDP_BF16 = f"{HYBRID}, bf16", f"{DDP}, bf16 hook"
COLORS = {NO_EXCHANGE: GREY, HYBRID: ORANGE, DDP: ORANGE, HYBRID_BF16: PURPLE, DDP_BF16: PURPLE}


@dataclass
class Timing:
    """The rounds of one contestant: seconds, and the bytes that a rank hands to the other machine in a step."""

    seconds: list[float] = field(default_factory=list)
    sent_bytes: float = 0


def run(network: Network, ranks: Sequence[int], repeats: int, arguments: argparse.Namespace, link: str) -> Any:
    """Measure all contestants over a link. A round counts as long as its slowest rank takes.

    Raises:
        NetworkError: if the link cannot be had.
    """
    results: list[dict[str, Timing]] = run_over_link(
        _measure,
        network,
        ranks,
        repeats,
        link=link,
        world_size=MACHINES * DEVICES,
        device=arguments.device,
        place=link,
        reports=(5 + 4 * len(ranks)) * (1 + repeats),
        devices=DEVICES,
    )
    slowest = results[0]
    for name, timing in slowest.items():
        timing.seconds = np.max([result[name].seconds for result in results], axis=0).tolist()
    return slowest


def _measure(rank: Rank, network: Network, ranks: Sequence[int], repeats: int) -> dict[str, Timing]:
    mesh = init_device_mesh(rank.device.type, (MACHINES, DEVICES), mesh_dim_names=("replicate", "shard"))
    batch = network.draw(rank.device, seed=rank.number)
    models, timings = _contestants(network, rank.device, mesh, ranks)
    for name, model in models.items():
        rank.report(f"warming up: {name}")
        for _ in range(2):
            _step(model, batch)
    rank.limit_link()
    for number in range(repeats):
        for name, model in models.items():
            rank.report(f"round {number + 1}: {name}")
            timings[name].seconds.append(rank.seconds(lambda model=model: _step(model, batch)))
    return timings


def _contestants(
    network: Network, device: torch.device, mesh: DeviceMesh, ranks: Sequence[int]
) -> tuple[dict[str, nn.Module], dict[str, Timing]]:
    from lightning_powersgd import PowerSGDConfig, attach_powersgd, attach_powersgd_to_shards

    shard_bytes = network.gradient_bytes / DEVICES
    models = {
        NO_EXCHANGE: _sharded(network, device, mesh["shard"]),
        HYBRID: _sharded(network, device, mesh),
        HYBRID_BF16: _sharded(network, device, mesh, reduce_dtype=torch.bfloat16),
        DDP: DistributedDataParallel(network.build(device)),
        DDP_BF16: DistributedDataParallel(network.build(device)),
    }
    models[DDP_BF16].register_comm_hook(None, bf16_hook)
    timings = {
        NO_EXCHANGE: Timing(),
        HYBRID: Timing(sent_bytes=shard_bytes),
        HYBRID_BF16: Timing(sent_bytes=shard_bytes / 2),
        DDP: Timing(sent_bytes=network.gradient_bytes),
        DDP_BF16: Timing(sent_bytes=network.gradient_bytes / 2),
    }
    for kept in ranks:
        for alternate in (False, True):
            name = f"sharded, PowerSGD, rank {kept}{', alternating' if alternate else ''}"
            models[name] = _sharded(network, device, mesh["shard"])
            config = PowerSGDConfig(rank=kept, alternate=alternate)
            gradients = attach_powersgd_to_shards(models[name], config, mesh["replicate"])
            timings[name] = Timing(sent_bytes=gradients.exchange.state.plan.sent_bytes(alternate=alternate))
        for devices in (None, DEVICES):
            name = f"DDP, PowerSGD, rank {kept}{', hierarchical' if devices else ''}"
            models[name] = DistributedDataParallel(network.build(device))
            exchange = attach_powersgd(models[name], PowerSGDConfig(rank=kept), devices=devices)
            timings[name] = Timing(sent_bytes=exchange.state.plan.sent_bytes(alternate=False))
    return models, timings


def _sharded(
    network: Network, device: torch.device, mesh: DeviceMesh, reduce_dtype: torch.dtype | None = None
) -> nn.Module:
    model, policy = network.build(device), MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule) and device.type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # gloo has no average
    return model


def _step(model: nn.Module, batch: Tensor) -> None:
    model(batch).square().mean().backward()
    model.zero_grad()


def tabulate(link: str, timings: dict[str, Timing], arguments: argparse.Namespace) -> ResultTable:
    """Lay one link's figures side by side."""
    table = ResultTable(
        f"{NETWORKS[arguments.model].name} on {MACHINES} machines of {DEVICES} processes, {link}",
        ["exchange", "sent", "ms", "quartiles", "FSDP2 ÷ this", "DDP ÷ this"],
        f"Medians of {len(timings[HYBRID].seconds)} rounds; ratios to FSDP2's hybrid sharding and to DDP are taken"
        " round by round. Sent is what each process hands in a step to collectives that cross the link.",
    )
    for name, timing in sorted(timings.items(), key=lambda item: item[0].startswith("DDP")):
        table.rows.append(
            [
                name,
                format_bytes(timing.sent_bytes),
                format_number(1e3 * spread(timing.seconds).median),
                spread(timing.seconds).quartiles(1e3),
                *(
                    format_number(common.paired_ratio(timings[reference].seconds, timing.seconds).median)
                    for reference in (HYBRID, DDP)
                ),
            ]
        )
    return table


def draw(results: dict[str, dict[str, Timing]], arguments: argparse.Namespace) -> Figure:
    """Draw a bar for each contestant and link."""
    figure = Figure(figsize=(8, 1.2 + 3.0 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axes, (link, timings) in zip(rows, results.items(), strict=True):
        names = sorted(timings, key=lambda name: not name.startswith("DDP"))
        medians = [1e3 * spread(timings[name].seconds).median for name in names]
        colors = [COLORS.get(name, BLUE if name.startswith("sharded") else GREEN) for name in names]
        labels = [f"{median:,.0f}" for median in medians]
        common.draw_bars(axes, link, names, medians, labels, colors)
    figure.suptitle(f"{NETWORKS[arguments.model].name} on two machines of two processes")
    return figure


def main() -> None:
    """Run the benchmark."""
    parser = common.make_parser("Time steps on two machines of two devices, with every way to average between them.")
    parser.add_argument("--model", choices=("transformer", "tiny"), default="transformer")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 4], help="of a shard's factors")
    parser.add_argument("--link", choices=tuple(LINKS), nargs="+", default=["loopback"], help="one or several")
    parser.add_argument("--repeats", type=positive, help=f"rounds; by default {REPEATS}")
    arguments = common.parse(parser, quick={"model": "tiny", "ranks": [2], "repeats": 3})
    results, remarks = over_links(
        arguments.link,
        lambda link: run(
            NETWORKS[arguments.model], arguments.ranks, arguments.repeats or REPEATS[link], arguments, link
        ),
    )
    common.write_results(
        "machines",
        "Two machines of two devices",
        arguments,
        [tabulate(link, timings, arguments) for link, timings in results.items()],
        {
            "links": {
                link: {name: vars(timing) for name, timing in timings.items()} for link, timings in results.items()
            }
        },
        draw(results, arguments),
        remarks,
    )


if __name__ == "__main__":
    main()
