"""Tier three: whole runs with ``compress="auto"``, whose clock says what the tests want."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from clock import a_link_of, steps_that_take
from lightning.pytorch import Callback, Trainer
from models import Classifier, loader, messages, replicas_agree, trainer
from test_elastic import EachStepItsBatch

from lightning_powersgd import PowerSGDStrategy

CONFIG = {"rank": 2, "min_compression_ratio": 1.0, "compress": "auto"}
# Two epochs are 20 steps: 10 compressed ones, 3 exact, and then those that were the faster ones.
SLOWER, FASTER = (2.0, 1.0), (1.0, 2.0)


class Kinds(Callback):
    """Notes which steps were compressed, and what was logged."""

    def __init__(self) -> None:
        self.kinds, self.logged = "", []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        state = trainer.strategy.exchange.state
        self.kinds += "c" if state.sent_bytes < state.dense_bytes else "e"
        metrics = trainer.callback_metrics
        self.logged.append(
            tuple(float(metrics.get(f"powersgd/{name}", -1)) for name in ("compressing", "step_time_ratio"))
        )


def train(root: str, times: tuple[float, float], ckpt_path: str | None = None, **options: Any) -> dict[str, Any]:
    kinds = Kinds()
    strategy = options.pop("strategy", None) or PowerSGDStrategy(**CONFIG)
    options = {"log_every_n_steps": 1, "max_steps": 20, **options}
    model = options.pop("model", None) or Classifier("adamw", lr=0.01)
    run = trainer(strategy, root=root, callbacks=[kinds, *options.pop("callbacks", [])], **options)
    with steps_that_take(*times), a_link_of(1e9, seconds_per_matrix=0.0), messages() as said:
        run.fit(model, loader(shuffle=False), ckpt_path=ckpt_path)
    return {
        "kinds": kinds.kinds,
        "logged": kinds.logged,
        "said": [line for line in said if "compress='auto'" in line],
        "parameters": [parameter.detach().clone() for parameter in model.parameters()],
    }


def test_a_run_goes_the_faster_way_and_says_so(fit):
    results = fit(_both_ways)
    for slower, faster in results:
        assert slower["kinds"] == "c" * 10 + "e" * 10
        assert faster["kinds"] == "c" * 10 + "e" * 3 + "c" * 7
        # After a step, the metric tells of the next one.
        assert slower["logged"][8:14] == [(1, -1), (0, -1), (0, -1), (0, -1), (0, 2), (0, 2)]
        assert faster["logged"][-1] == (1, 0.5)
    slower, faster = results[0]
    assert "on a network of 1 Gbit/s every matrix is worth compressing" in slower["said"][0]
    assert "2.00 of the time of an exact one. Gradients are exchanged as plain DDP does it" in slower["said"][1]
    assert "0.50 of the time of an exact one. Gradients are compressed" in faster["said"][1]
    assert len(slower["said"]) == len(faster["said"]) == 2


def _both_ways(root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(root, SLOWER), train(root, FASTER)


class Hooks(Callback):
    """Notes of each step whether DDP has the hook; and makes another trial come after a few steps."""

    def __init__(self, again: int) -> None:
        self.again, self.hooked = again, ""

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        held = trainer.strategy.model._get_ddp_logging_data().get("comm_hook")
        self.hooked += "h" if held == "powersgd_hook" else "."

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.again:
            trainer.strategy.exchange.state.trial.position = -2


def test_between_trials_exact_steps_are_those_of_ddp_without_a_hook(fit):
    for kinds, hooked, step in fit(_with_another_trial):
        # The first of them sends the errors. Then two until the next trial, five of it, and three that are compressed.
        assert kinds == "c" * 10 + "e" * (10 + 2 + 5) + "ccc" + "e" * 10
        assert hooked == "h" * 14 + "." * (6 + 2) + "h" * (5 + 3 + 1) + "." * 9
        assert step == 40


def _with_another_trial(root: str) -> tuple[str, str, int]:
    hooks = Hooks(again=20)
    strategy = PowerSGDStrategy(**CONFIG)
    result = train(root, SLOWER, strategy=strategy, callbacks=[hooks], max_steps=40, max_epochs=4)
    return result["kinds"], hooks.hooked, strategy.exchange.state.step


class Save(Callback):
    """Saves a checkpoint in the middle of a run, and may then end it as a crash does."""

    def __init__(self, step: int, path: str, breaks: bool = True) -> None:
        self.step, self.path, self.breaks = step, path, breaks

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            if self.breaks:
                raise KeyboardInterrupt


@pytest.mark.parametrize("step", [4, 11, 13, 17], ids=["before", "in the trial", "decided", "after"])
@pytest.mark.parametrize("times", [SLOWER, FASTER], ids=["slower", "faster"])
def test_a_run_that_is_killed_and_resumed_has_the_same_bits(fit, tmp_path, times, step):
    for whole, resumed in fit(_kill_and_resume, times, step):
        assert whole["kinds"] == resumed["kinds"]
        assert all(map(torch.equal, whole["parameters"], resumed["parameters"]))


def _kill_and_resume(root: str, times: tuple[float, float], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    path = f"{root}/{step}.ckpt"
    first = Kinds()
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        train(root, times, model=EachStepItsBatch(), callbacks=[first, Save(step, path)])
    saved = torch.load(path, weights_only=True)["powersgd"]["trial"]
    assert saved["world_size"] == 2
    resumed = train(root, times, ckpt_path=path, model=EachStepItsBatch())
    whole = train(root, times, model=EachStepItsBatch(), callbacks=[Save(step, path, breaks=False)])
    return whole, {**resumed, "kinds": first.kinds + resumed["kinds"]}


def test_where_nothing_is_worth_it_the_run_is_ddps(fit):
    results = fit(_nothing)
    for _, ours, ddps, kinds in results:
        assert kinds == "e" * 20
        assert all(map(torch.equal, ours, ddps))
    (said, *_), *_ = results[0]
    assert "on a network of 100 Gbit/s no matrix is worth compressing" in said


def _nothing(root: str) -> tuple[list[str], list[torch.Tensor], list[torch.Tensor], str]:
    kinds, model, plain = Kinds(), Classifier(), Classifier()
    with a_link_of(1e11), messages() as said:
        trainer(PowerSGDStrategy(**CONFIG), root=root, callbacks=[kinds]).fit(model, loader(shuffle=False))
    trainer("ddp", root=root).fit(plain, loader(shuffle=False))
    lines = [line for line in said if "compress='auto'" in line]
    return lines, list(model.state_dict().values()), list(plain.state_dict().values()), kinds.kinds


def test_a_plain_checkpoint_begins_a_trial_and_one_with_decisions_goes_into_always(fit):
    for decided, begun in fit(_across):
        assert decided == "c" * 10
        assert begun.startswith("c" * 10)


def _across(root: str) -> tuple[str, str]:
    path = f"{root}/half.ckpt"
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        train(root, SLOWER, callbacks=[Save(10, path)])
    always = PowerSGDStrategy(**{**CONFIG, "compress": "always"})
    decided = train(root, SLOWER, ckpt_path=path, strategy=always)["kinds"]
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        run = trainer("ddp", root=root, callbacks=[Save(10, path)])
        run.fit(Classifier("adamw", lr=0.01), loader(shuffle=False))
    return decided, train(root, SLOWER, ckpt_path=path)["kinds"]


def test_accumulated_gradients_are_one_step(fit):
    for kinds in fit(_accumulate):
        # Of the first batch nothing was sent yet.
        assert kinds == "e" + "c" * 20 + "e" * 9


def _accumulate(root: str) -> str:
    return train(root, SLOWER, accumulate_grad_batches=2, max_epochs=3)["kinds"]


def test_compress_is_checked():
    with pytest.raises(ValueError, match="`compress='never'` is neither 'always' nor 'auto'"):
        PowerSGDStrategy(compress="never")


class Forecast(Callback):
    """Notes what was known of an exact step before the first one, and the bytes of this rank's own gradients."""

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        state = trainer.strategy.exchange.state
        if state.step == 0:
            self.seconds, self.own_bytes = state.trial.exact_forecast, state.plan.dense_bytes


def test_hierarchical_runs_decide_alike(four_ranks, tmp_path):
    results = four_ranks.run(_hierarchical, str(tmp_path))
    # The owners send at the same time: what each measures is its share of the link, which carries its own gradients.
    slowest = 8 * max(own_bytes for _, _, _, own_bytes in results) / 1e9
    for kinds, agree, forecast, _ in results:
        assert kinds == "c" * 10 + "e" * 10
        assert agree
        assert forecast == pytest.approx(slowest)


def _hierarchical(root: str) -> tuple[str, bool, float, int]:
    import test_hierarchical

    kinds, forecast, model = Kinds(), Forecast(), Classifier("adamw", lr=0.01)
    with steps_that_take(*SLOWER), a_link_of(1e9, seconds_per_matrix=0.0):
        test_hierarchical.train(root, CONFIG, model, callbacks=[kinds, forecast], max_epochs=4)
    return kinds.kinds, replicas_agree(model), forecast.seconds, forecast.own_bytes


def test_sharded_runs_decide_alike(four_ranks, tmp_path):
    for kinds, agree, errors in four_ranks.run(_sharded, str(tmp_path)):
        assert kinds == "c" * 10 + "e" * 10
        assert agree
        assert errors == 0


def _sharded(root: str) -> tuple[str, bool, float]:
    import test_model_parallel

    kinds = Kinds()
    with steps_that_take(*SLOWER), a_link_of(1e9, seconds_per_matrix=0.0):
        run = test_model_parallel.train(
            root, test_model_parallel.strategy(**CONFIG), callbacks=[kinds], max_epochs=4, limit_val_batches=0
        )
    errors = sum(float(error.abs().sum()) for error in run["errors"].values())
    return kinds.kinds, run["agree"], errors


def test_fabric_leaves_whole_what_is_not_worth_it(two_ranks):
    for whole, kinds in two_ranks.run(_fabric):
        assert whole == ["0.weight", "2.weight", "4.weight"]
        assert kinds == [False] * 2


def _fabric() -> tuple[list[str], list[bool]]:
    from lightning.fabric import Fabric

    from lightning_powersgd import PowerSGDFabricStrategy

    strategy = PowerSGDFabricStrategy(**CONFIG)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    with a_link_of(1e12):
        fabric.launch()
        net = fabric.setup_module(Classifier().net)
    kinds = []
    for _ in range(2):
        kinds.append(strategy.exchanges[0].compressing)
        fabric.backward(net(torch.randn(4, 32)).sum())
    return sorted(strategy.exchanges[0].state.whole), kinds
