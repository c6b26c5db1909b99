"""A small net that is trained on ranks: what its exchange saw, how far that is from the reference, and resumed runs."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import attach, gradients, make_batches, make_net
from ranks import counted_all_reduce, gather_equal
from reference import Reference
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_powersgd import PowerSGDConfig, PowerSGDState

STEPS = 50

RESUME_CONFIGS = [
    {"rank": 1},
    {"rank": 2},
    {"rank": 4, "alternate": True},
    {"rank": 8},
    {"error_dtype": "bfloat16"},
    {"comm_dtype": "bfloat16", "alternate": True},
    {"comm_dtype": "int8"},
    {"comm_dtype": "int4", "alternate": True},
    {"comm_dtype": {"P": "int4", "Q": "int8"}},
    {"warm_start": False},
]


def train(
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bucket_cap_mb: float | None = None,
    ddp: dict[str, Any] | None = None,
    **config: Any,
) -> dict[str, Any]:
    """Train a small net; give the state before every step, and this rank's gradients before and after the exchange."""
    model, exchange = attach(make_net(dtype).to(device), bucket_cap_mb, ddp, **config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before, local, averaged, sent = [], [], [], []
    for x, y in make_batches(steps):
        x, y = x.to(device, dtype), y.to(device)
        before.append(tree_map_only(Tensor, Tensor.cpu, exchange.state.state_dict()))
        twin = copy.deepcopy(model.module)
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.zero_grad()
        with counted_all_reduce() as bytes_sent:
            F.cross_entropy(model(x), y).backward()
        local.append(gradients(twin))
        averaged.append(gradients(model.module))
        sent.append((sum(bytes_sent), exchange.state.sent_bytes, len(bytes_sent)))
        optimizer.step()
    return {
        "before": before,
        "local": local,
        "averaged": averaged,
        "sent": sent,
        "equal": gather_equal(list(model.parameters())),
        "groups": len(exchange.state.plan.groups),
        "dense": exchange.state.dense_bytes,
        "parameters": {name: p.detach().cpu().clone() for name, p in model.module.named_parameters()},
    }


def worst_deviation(results: list[dict[str, Any]], *, resynchronise: bool, alternate: bool, **config: Any) -> float:
    """Give the largest relative deviation of any parameter's averaged gradient from the float64 reference, at any step.

    Args:
        results: of `train`, by rank.
        resynchronise: give the reference the errors and factors of the run before every step, instead of its own.
        alternate: as in the run.
        config: as in the run.
    """
    state = PowerSGDState(
        make_net().named_parameters(), PowerSGDConfig(**{"rank": 2, "alternate": alternate, **config})
    )
    references = {
        slot.name: Reference(lambda side, slot=slot: state.first_factor(slot, side).T, len(results), alternate)
        for slot in state.plan.compressed
    }
    assert len(references) >= 3, "nothing compressed, nothing compared"
    worst = 0.0
    for step in range(len(results[0]["local"])):
        for name, averaged in results[0]["averaged"][step].items():
            local = [result["local"][step][name] for result in results]
            exact = torch.stack([g.double() for g in local]).mean(dim=0)
            if reference := references.get(name):
                if resynchronise:
                    saved = [result["before"][step]["parameters"][name] for result in results]
                    reference.e = [entry["error"].double().flatten(1) for entry in saved]
                    reference.Q = saved[0]["factors"]["right"].double().T
                    if alternate:
                        reference.P = saved[0]["factors"]["left"].double().T
                expected = reference(local).reshape(averaged.shape)
            else:
                expected = exact
            worst = max(worst, float((averaged.double() - expected).norm() / exact.norm()))
    return worst


def resumes_bitwise(config: dict[str, Any], device: str = "cpu") -> bool:
    """Whether a run that goes on with a saved state ends where the one does that was never interrupted."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(33, 51), nn.Tanh(), nn.Linear(51, 37), nn.Tanh(), nn.Linear(37, 11)).to(device)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
        for x in batches:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def fresh() -> Any:
        model, exchange = attach(make(), bucket_cap_mb=0.004, **config)
        return model, exchange, torch.optim.AdamW(model.parameters(), lr=0.01)

    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = list(torch.randn(12, 8, 33, generator=generator).to(device).unbind())
    model, exchange, optimizer = fresh()
    steps(model, optimizer, batches[:5])
    exchange.average_errors()
    saved = copy.deepcopy((model.state_dict(), exchange.state.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, batches[5:])

    resumed, new_exchange, new_optimizer = fresh()
    resumed.load_state_dict(saved[0])
    assert not new_exchange.state.load_state_dict(saved[1])
    new_optimizer.load_state_dict(saved[2])
    steps(resumed, new_optimizer, batches[5:])
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
