"""Tier three: what a Trainer can do with a sharded model, on 4 processes as 2 replicas of 2 shards, and on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from models import Classifier, loader, messages, trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_powersgd import PowerSGDModelParallelStrategy, PowerSGDStrategy

if torch.__version__ < (2, 6):
    pytest.skip("sharded models need torch 2.6", allow_module_level=True)

from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

CONFIG = {"rank": 2, "min_compression_ratio": 1.0}


class Sharded(Classifier):
    """The classifier of the other tests, sharded as Lightning's documentation has it."""

    def __init__(self, optimizer: str = "adamw", lr: float = 0.01, **options: Any) -> None:
        super().__init__(optimizer, lr=lr, **options)
        self.tensor_parallel = self.whole = False

    def configure_model(self) -> None:
        if isinstance(self.net, FSDPModule) or self.device_mesh is None:
            return
        if self.tensor_parallel:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        mesh = self.device_mesh if self.whole else self.device_mesh["data_parallel"]
        # The last layer is left to the root, whose parameters stay gathered after an evaluation.
        for layer in list(self.net)[:-1]:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)
        if self.whole:
            for module in self.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)


class Manual(Sharded):
    """Calls its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def strategy(replicas: int | str = 2, **config: Any) -> PowerSGDModelParallelStrategy:
    return PowerSGDModelParallelStrategy(**{"replicas": replicas, **CONFIG, **config})


def full(module: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a model, sharded or not."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in module.state_dict().items()
    }


def equal_everywhere(tensors: dict[str, Tensor]) -> bool:
    flat = torch.cat([tensor.double().flatten() for tensor in tensors.values()])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return all(torch.equal(everyone[0], other) for other in everyone)


def train(root: str, run_with: Any, model: Any = None, ckpt_path: str | None = None, **options: Any) -> dict[str, Any]:
    model = Sharded() if model is None else model
    run = trainer(run_with, root=root, alike=False, **options)
    run.fit(model, loader(shuffle=False), loader(32, shuffle=False), ckpt_path=ckpt_path)
    exchange = getattr(run.strategy, "exchange", None)
    return {
        "state": full(model),
        "agree": equal_everywhere(full(model)),
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
        "steps": None if exchange is None else exchange.state.step,
        "errors": {} if exchange is None else dict(exchange.state.errors),
        "global_step": run.global_step,
    }


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - value).norm() / (value.norm() + 1e-9)) for name, value in b.items())


# Training


@pytest.mark.parametrize(
    ("size", "alternate"),
    [({}, False), ({"data_parallel_size": 2}, True), ({"replicas": 4}, False), ({"replicas": 1}, False)],
    ids=str,
)
def test_training_learns_and_all_replicas_agree(four_ranks, tmp_path, size, alternate):
    for result in four_ranks.run(_learn, str(tmp_path), size, alternate):
        assert result["agree"]
        assert result["steps"] == result["global_step"] == 60
        assert result["metrics"]["train_loss"] < 1.0
        if size != {"replicas": 1}:
            assert result["metrics"]["powersgd/compression_ratio"] > 2


def _learn(root: str, size: dict[str, int], alternate: bool) -> dict[str, Any]:
    return train(root, strategy(alternate=alternate, **size), max_epochs=12)


def test_exact_steps_are_those_of_lightnings_strategy_with_hybrid_sharding(four_ranks, tmp_path):
    for ours, theirs in four_ranks.run(_compare, str(tmp_path)):
        assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def _compare(root: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    class Hybrid(Sharded):
        def configure_model(self) -> None:
            self.whole = True
            super().configure_model()

    options = {"max_epochs": 1, "gradient_clip_val": 0.5}
    torch.manual_seed(3)
    ours = train(root, strategy(start_step=1000), **options)
    torch.manual_seed(3)
    # It takes the second dimension for tensor parallelism, and would deal out data along the first alone.
    data = {"num_replicas": 4, "rank": dist.get_rank()}
    with mock.patch.object(ModelParallelStrategy, "distributed_sampler_kwargs", data):
        theirs = train(root, ModelParallelStrategy(2, 2), Hybrid(), **options)
    return ours["state"], theirs["state"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision(four_ranks, tmp_path, precision):
    for result in four_ranks.run(_precise, str(tmp_path), precision):
        assert result["agree"]
        assert result["metrics"]["train_loss"] < 1.2


def _precise(root: str, precision: str) -> dict[str, Any]:
    return train(root, strategy(), precision=precision, max_epochs=12)


def test_accumulation_exchanges_once_a_step(four_ranks, tmp_path):
    for result in four_ranks.run(_accumulate, str(tmp_path)):
        assert result["agree"]
        assert result["steps"] == result["global_step"] == 4


def _accumulate(root: str) -> dict[str, Any]:
    return train(root, strategy(), accumulate_grad_batches=2, max_steps=4, max_epochs=-1)


def test_manual_optimisation_and_parameters_frozen_on_the_way(four_ranks, tmp_path):
    for manual, frozen in four_ranks.run(_variety, str(tmp_path)):
        assert manual["agree"]
        assert manual["steps"] == 5
        assert frozen["agree"]
        assert frozen["steps"] == 15


def _variety(root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    class Thaw(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            pl_module.net[0].requires_grad_(trainer.current_epoch != 1)

    return train(root, strategy(), Manual(), max_epochs=1), train(root, strategy(), callbacks=[Thaw()], max_epochs=3)


def test_fit_again_after_evaluations(four_ranks, tmp_path):
    for steps, agree in four_ranks.run(_fit_again, str(tmp_path)):
        assert steps == [5, 10]
        assert agree


def _fit_again(root: str) -> tuple[list[int], bool]:
    model, steps = Sharded(), []
    run = trainer(strategy(), root=root, alike=False, max_epochs=1)
    for epochs in (1, 3):
        run.fit_loop.max_epochs = epochs
        run.fit(model, loader(shuffle=False), loader(32, shuffle=False))
        run.validate(model, loader(32, shuffle=False), verbose=False)
        steps.append(run.strategy.exchange.state.step)
    return steps, equal_everywhere(full(model))


def test_tensor_parallelism(four_ranks, tmp_path):
    for result in four_ranks.run(_tensor_parallel, str(tmp_path)):
        assert result["agree"]
        assert result["metrics"]["train_loss"] < 1.0


def _tensor_parallel(root: str) -> dict[str, Any]:
    model = Sharded()
    model.tensor_parallel = True
    return train(root, strategy(tensor_parallel_size=2), model, max_epochs=12)


def test_replicas_that_begin_apart_become_alike(four_ranks, tmp_path):
    for result in four_ranks.run(_begin_apart, str(tmp_path)):
        assert result["agree"]


def _begin_apart(root: str) -> dict[str, Any]:
    torch.manual_seed(dist.get_rank())
    return train(root, strategy(), Sharded(), max_steps=2)


def test_what_is_compressed_is_said(four_ranks, tmp_path):
    said = four_ranks.run(_say, str(tmp_path))[0]
    assert any(line.startswith("PowerSGD compresses 3 of 6 trainable parameters") for line in said), said


def _say(root: str) -> list[str]:
    with messages() as said:
        train(root, strategy(), max_steps=1)
    return said


# Checkpoints


@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize(
    "config", [{}, {"alternate": True}, {"comm_dtype": "int8"}, {"tensor_parallel_size": 2}], ids=str
)
def test_a_run_resumes_with_the_same_bits(four_ranks, tmp_path, distributed, config):
    straight = four_ranks.run(_straight, str(tmp_path), distributed, config)
    for expected, found in zip(straight, four_ranks.run(_resume, str(tmp_path), distributed, config), strict=True):
        assert found["steps"] == 2 * _steps_of_an_epoch(config)
        assert all(torch.equal(found["state"][name], value) for name, value in expected["state"].items())
        assert found["errors"].keys() == expected["errors"].keys()
        assert all(torch.equal(found["errors"][name], value) for name, value in expected["errors"].items())


def _steps_of_an_epoch(config: dict[str, Any]) -> int:
    return 10 if "tensor_parallel_size" in config else 5


def _train_and_save(root: str, distributed: bool, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    # Saving replaces errors by their mean, which moves later steps by a rounding.
    saver = ModelCheckpoint(root, "{step}", every_n_train_steps=_steps_of_an_epoch(config), save_top_k=-1)
    saving, model = strategy(save_distributed_checkpoint=distributed, **config), Sharded()
    model.tensor_parallel = "tensor_parallel_size" in config
    return train(root, saving, model, callbacks=[saver], enable_checkpointing=True, max_epochs=2, **options)


def _straight(root: str, distributed: bool, config: dict[str, Any]) -> dict[str, Any]:
    return _train_and_save(root, distributed, config)


def _resume(root: str, distributed: bool, config: dict[str, Any]) -> dict[str, Any]:
    path = f"{root}/step={_steps_of_an_epoch(config)}.ckpt"
    assert Path(path).is_dir() == distributed
    return _train_and_save(f"{root}/again", distributed, config, ckpt_path=path)


class _Look(Callback):
    """Keeps the whole errors that a training begins with."""

    def __init__(self) -> None:
        self.errors: dict[str, Tensor] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        self.errors = whole_errors(trainer.strategy)


def whole_errors(of: Any) -> dict[str, Tensor]:
    """The whole errors by name: of shards put together, or as they are."""
    if not isinstance(of, PowerSGDModelParallelStrategy):
        return {name: error.clone() for name, error in of.exchange.state.errors.items()}
    from lightning_powersgd.strategies.sharded_checkpoint import sharded_errors

    return {name: error.full_tensor().clone() for name, error in sharded_errors(of._gradients).items()}


@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize(
    ("world_size", "size"),
    [(4, {"replicas": 4}), (4, {"replicas": 1}), (2, {"replicas": 1}), (2, {"replicas": 2})],
    ids=str,
)
def test_errors_are_carried_over_to_every_other_mesh(ranks, tmp_path, distributed, world_size, size):
    saved = ranks[4].run(_save, str(tmp_path), distributed)
    for found, agree in ranks[world_size].run(_go_on, str(tmp_path), distributed, size):
        assert agree
        assert found.keys() == saved[0].keys()
        # Of four shards of ten rows one has a single row, which is sent whole.
        uneven = {"net.4.weight"} if size == {"replicas": 1} and world_size == 4 else set()
        assert any(error.any() for error in found.values())
        assert all(torch.equal(found[name], error) for name, error in saved[0].items() if name not in uneven)
        for name in uneven:
            assert torch.equal(found[name][:-1], saved[0][name][:-1])


def _save(root: str, distributed: bool) -> dict[str, Tensor]:
    saving, found = strategy(save_distributed_checkpoint=distributed), {}

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(f"{root}/four.ckpt")
                found.update(whole_errors(trainer.strategy))

    train(root, saving, callbacks=[Save()], max_steps=5)
    return found


def _go_on(root: str, distributed: bool, size: dict[str, int]) -> tuple[dict[str, Tensor], bool]:
    look = _Look()
    again = strategy(save_distributed_checkpoint=distributed, **size)
    result = train(root, again, ckpt_path=f"{root}/four.ckpt", callbacks=[look], max_steps=6, max_epochs=-1)
    return look.errors, result["agree"]


@pytest.mark.parametrize("first", ["sharded", "ddp"])
def test_errors_are_carried_over_to_and_from_the_strategy_that_does_not_shard(four_ranks, tmp_path, first):
    saved = four_ranks.run(_save_one, str(tmp_path), first)
    for found, agree in four_ranks.run(_load_other, str(tmp_path), first):
        assert agree
        assert found.keys() == saved[0].keys()
        assert all(torch.equal(found[name], error) for name, error in saved[0].items())


def _one(kind: str) -> Any:
    return PowerSGDStrategy(**CONFIG) if kind == "ddp" else strategy(save_distributed_checkpoint=False)


def _save_one(root: str, kind: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(f"{root}/one.ckpt")
                found.update(whole_errors(trainer.strategy))

    train(root, _one(kind), callbacks=[Save()], max_steps=5)
    return found


def _load_other(root: str, saved_by: str) -> tuple[dict[str, Tensor], bool]:
    look = _Look()
    other = _one("sharded" if saved_by == "ddp" else "ddp")
    result = train(root, other, ckpt_path=f"{root}/one.ckpt", callbacks=[look], max_steps=6, max_epochs=-1)
    return look.errors, result["agree"]


@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "file"])
def test_what_is_saved_after_a_fit_is_validated_and_resumed(four_ranks, tmp_path, distributed):
    for before, after, agree in four_ranks.run(_save_afterwards, str(tmp_path), distributed):
        assert before == after
        assert agree


def _save_afterwards(root: str, distributed: bool) -> tuple[float, float, bool]:
    model, data = Sharded(), loader(32, shuffle=False)
    run = trainer(strategy(save_distributed_checkpoint=distributed), root=root, alike=False, max_epochs=1)
    run.fit(model, loader(shuffle=False))
    before = run.validate(model, data, verbose=False)[0]["val_loss"]
    run.save_checkpoint(f"{root}/after.ckpt")
    errors = whole_errors(run.strategy)
    after = run.validate(model, data, ckpt_path=f"{root}/after.ckpt", verbose=False)[0]["val_loss"]
    look = _Look()
    again = strategy(save_distributed_checkpoint=distributed)
    train(root, again, ckpt_path=f"{root}/after.ckpt", callbacks=[look], max_epochs=2)
    return before, after, all(torch.equal(look.errors[name], error) for name, error in errors.items())


def test_the_file_is_loadable_with_weights_only(four_ranks, tmp_path):
    four_ranks.run(_save, str(tmp_path), False)
    saved = torch.load(tmp_path / "four.ckpt", weights_only=True)
    assert saved["powersgd"]["parameters"]["net.0.weight"]["error"].shape == saved["state_dict"]["net.0.weight"].shape
    assert len(saved["powersgd"]["shards"]) == 2
    four_ranks.run(_save, str(tmp_path / "folder"), True)
    torch.load(tmp_path / "folder" / "four.ckpt" / "meta.pt", weights_only=True)


@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "file"])
def test_a_rank_that_saves_alone_saves_nothing_and_holds_nobody_up(two_ranks, tmp_path, distributed):
    said = two_ranks.run(_save_alone, str(tmp_path), distributed)
    assert any("A checkpoint was not saved" in message for message in said[0])
    assert not (tmp_path / "alone.ckpt").exists()


def _save_alone(root: str, distributed: bool) -> list[str]:
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_: Any) -> None:
            if trainer.global_step == 2 and trainer.is_global_zero:
                trainer.save_checkpoint(f"{root}/alone.ckpt")

    saving = strategy(2, save_distributed_checkpoint=distributed)
    saving._attendance._patience = saving._attendance._ONCE_LOST
    with (
        messages() as said,
        mock.patch("lightning_powersgd.exchange.presence.Attendance._FIRST", saving._attendance._patience),
    ):
        train(root, saving, callbacks=[Save()], max_steps=4)
    return said


def test_a_run_that_is_killed_while_it_saves_leaves_the_checkpoint_before(four_ranks, tmp_path):
    four_ranks.run(_save, str(tmp_path), True)
    before = sorted((path.name, path.stat().st_size) for path in (tmp_path / "four.ckpt").rglob("*"))
    for text in four_ranks.run_to_errors(_fail_to_save, str(tmp_path)):
        assert "No space left on device" in text
    assert sorted((path.name, path.stat().st_size) for path in (tmp_path / "four.ckpt").rglob("*")) == before
    # The next one takes its place.
    four_ranks.run(_save, str(tmp_path), True)
    assert not (tmp_path / "four.ckpt.part").exists()


def _fail_to_save(root: str) -> None:
    with mock.patch(
        "lightning_powersgd.strategies.sharded_checkpoint.save", side_effect=OSError("No space left on device")
    ):
        _save(root, True)


def test_a_damaged_entry_is_refused_on_every_rank(four_ranks, tmp_path):
    four_ranks.run(_save, str(tmp_path), False)
    saved = torch.load(tmp_path / "four.ckpt", weights_only=True)
    # Of one shard.
    saved["powersgd"]["shards"]["1"]["net.0.weight"]["rank"] = -1
    torch.save(saved, tmp_path / "four.ckpt")
    for text in four_ranks.run_to_errors(_go_on, str(tmp_path), False, {}):
        assert "The PowerSGD state is damaged" in text


# Names, and bad input


def test_it_is_registered_by_name():
    assert {"powersgd_model_parallel", "powersgdmodelparallelstrategy"} <= set(StrategyRegistry)
    assert isinstance(StrategyRegistry.get("powersgd_model_parallel"), PowerSGDModelParallelStrategy)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"replicas": 0}, ValueError, "`replicas=0` is below 1"),
        ({"replicas": "two"}, TypeError, "`replicas='two'` is not an integer"),
        ({"data_parallel_size": 1.5}, TypeError, "`data_parallel_size=1.5` is not an integer"),
        ({"tensor_parallel_size": 0}, ValueError, "`tensor_parallel_size=0` is below 1"),
        ({"bucket_cap_mb": -1}, ValueError, "`bucket_cap_mb=-1` is not positive"),
        ({"rank": 0}, ValueError, "`rank=0` is below 1"),
        ({"rnak": 2}, TypeError, "rnak"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PowerSGDModelParallelStrategy(**arguments)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("sizes", "cannot be had with 4 processes"),
        ("whole mesh", "is replicated by FSDP already"),
        ("not sharded", "The model is not sharded"),
    ],
)
def test_what_cannot_be_is_said_on_every_rank(four_ranks, tmp_path, case, message):
    for text in four_ranks.run_to_errors(_misuse, str(tmp_path), case):
        assert message in text


def _misuse(root: str, case: str) -> None:
    class Forgetful(Sharded):
        def configure_model(self) -> None:
            pass

    model = Forgetful() if case == "not sharded" else Sharded()
    if case == "whole mesh":
        configure = Sharded.configure_model

        class Whole(Sharded):
            def configure_model(self) -> None:
                self._device_mesh = {"data_parallel": self._device_mesh["replicate", "data_parallel"]}
                configure(self)

        model = Whole()
    train(root, strategy(3 if case == "sizes" else 2), model, max_steps=1)
