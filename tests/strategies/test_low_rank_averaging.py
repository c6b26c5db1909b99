"""Tier three: what a Trainer can do with `topology="all"`, where all ranks average their models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Classifier, loader, messages, trainer
from test_powergossip import deviation, mean_of, state, train
from test_powersgd import Gan, Manual, Unfreeze, Unfrozen

from lightning_powersgd import PowerGossipStrategy

ARGUMENTS = {"topology": "all", "rank": 2, "min_compression_ratio": 1.0}


def _train(root: str, model: Any = None, config: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return train(root, PowerGossipStrategy(**{**ARGUMENTS, **(config or {})}), model=model, **options)


@pytest.mark.parametrize("comm_dtype", [None, "int8", "int4"])
def test_training_learns_and_ends_with_the_average_model_everywhere(fit, comm_dtype):
    for result in fit(_train, config={"comm_dtype": comm_dtype}, max_epochs=10):
        assert result["agree"]
        assert result["steps"] == [result["global_step"]] == [100]
        assert result["compressed"] == 3
        assert result["metrics"]["train_loss"] < 1.0
        assert result["metrics"]["powergossip/bytes_sent"] == result["metrics"]["powergossip/link_bytes"] > 0


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_other_numbers_of_ranks(ranks, tmp_path, world_size):
    for result in ranks[world_size].run(_train, str(tmp_path), config={"comm_dtype": "int8"}, max_epochs=4):
        assert result["agree"]
        assert (result["metrics"]["powergossip/bytes_sent"] > 0) == (world_size > 1)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(fit, precision):
    for result in fit(_train, precision=precision, max_epochs=10):
        assert result["agree"]
        assert result["metrics"]["train_loss"] < 1.0


def test_accumulation_manual_optimisation_and_two_optimizers(fit):
    for accumulated, manual, two in fit(_variety):
        assert accumulated["agree"]
        assert accumulated["steps"] == [5]
        assert manual["agree"]
        assert manual["steps"] == [10]
        assert two["agree"]
        assert two["steps"] == [10, 10]


def _variety(root: str) -> tuple[dict[str, Any], ...]:
    return (
        _train(root, accumulate_grad_batches=4, max_steps=5, max_epochs=-1),
        _train(root, model=Manual(), max_epochs=1),
        _train(root, model=Gan(), max_epochs=1),
    )


def test_parameters_frozen_and_unfrozen_during_the_fit(fit):
    for result in fit(_unfreeze):
        assert result["agree"]
        assert result["steps"] == [30]


def _unfreeze(root: str) -> dict[str, Any]:
    return _train(root, model=Unfrozen(), callbacks=[Unfreeze()], max_epochs=3)


def test_what_will_happen_is_said(fit):
    said = fit(_say)[0]
    assert any(
        line.startswith("PowerGossip compresses 3 of 6 trainable parameters: a rank sends ")
        and line.endswith("It connects 2 ranks in a topology named 'all': they average together, without links.")
        for line in said
    ), said


def _say(root: str) -> list[str]:
    with messages() as said:
        _train(root, max_steps=1)
    return said


# Checkpoints


def _model() -> Classifier:
    return Classifier("adamw", lr=0.01)


@pytest.mark.parametrize("when", ["in the middle", "after the fit"])
@pytest.mark.parametrize("comm_dtype", [None, "int4"])
def test_ranks_that_save_their_own_models_resume_with_the_same_bits(fit, tmp_path, comm_dtype, when):
    straight = fit(_through, comm_dtype)
    fit(_halfway, comm_dtype, when)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["powergossip"][0]["rounds"][0]["rounds"] == 10
    for expected, found in zip(straight, fit(_through, comm_dtype, f"{tmp_path}/half.ckpt"), strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert deviation(straight[0], straight[1]) > 1e-5


def _through(root: str, comm_dtype: str | None, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
    strategy = PowerGossipStrategy(**ARGUMENTS, comm_dtype=comm_dtype, average_model=False)
    model = _model()
    options = {"max_epochs": 2}
    trainer(strategy, root=root, alike=False, **options).fit(model, loader(shuffle=False), ckpt_path=ckpt_path)
    return state(model)


def _halfway(root: str, comm_dtype: str | None, when: str) -> None:
    strategy = PowerGossipStrategy(**ARGUMENTS, comm_dtype=comm_dtype, average_model=False)
    saver = ModelCheckpoint(root, "half", every_n_train_steps=10, save_top_k=1, enable_version_counter=False)
    middle = when == "in the middle"
    run = trainer(
        strategy,
        root=root,
        alike=False,
        callbacks=[saver] if middle else [],
        enable_checkpointing=middle,
        max_epochs=2 if middle else 1,
        max_steps=15 if middle else -1,
    )
    run.fit(_model(), loader(shuffle=False))
    if not middle:
        run.save_checkpoint(f"{root}/half.ckpt")


def test_a_damaged_state_is_refused_on_every_rank(fit, tmp_path):
    fit(_halfway, None, "after the fit")
    for name in ("half.ckpt", "rank1-half.ckpt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        saved["powergossip"][0]["rounds"][0].pop("references")
        torch.save(saved, tmp_path / name)
    for error in fit(_fails, f"{tmp_path}/half.ckpt"):
        assert "The checkpoint's entry 'powergossip' is damaged" in error


def _fails(root: str, ckpt_path: str) -> str:
    with pytest.raises(ValueError, match="damaged") as caught:
        _through(root, None, ckpt_path)
    return str(caught.value)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (3, 1)])
def test_a_run_resumes_at_any_number_of_ranks_from_the_average(ranks, tmp_path, before, after):
    own = ranks[before].run(_save_average, str(tmp_path))
    saved = torch.load(tmp_path / "average.ckpt", weights_only=True)
    assert "powergossip" not in saved
    assert deviation(saved["state_dict"], mean_of(own)) < 1e-6
    for found, agree in ranks[after].run(_resume_average, str(tmp_path)):
        assert agree
        assert all(torch.equal(found[name], value) for name, value in saved["state_dict"].items())


def _save_average(root: str) -> dict[str, torch.Tensor]:
    own: dict[str, torch.Tensor] = {}

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
            if trainer.global_step == 3:
                own.update(state(pl_module))
                trainer.save_checkpoint(f"{root}/average.ckpt")

    train(root, PowerGossipStrategy(**ARGUMENTS), model=_model(), callbacks=[Save()], max_steps=4)
    return own


def _resume_average(root: str) -> tuple[dict[str, torch.Tensor], bool]:
    found: dict[str, torch.Tensor] = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            found.update(state(pl_module))

    run = trainer(
        PowerGossipStrategy(**ARGUMENTS), root=root, alike=False, callbacks=[Look()], max_steps=6, max_epochs=-1
    )
    model = _model()
    run.fit(model, loader(), ckpt_path=f"{root}/average.ckpt")
    return found, all(_equal(tensor) for tensor in model.parameters())


def _equal(tensor: torch.Tensor) -> bool:
    both = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(both, tensor.detach())
    return all(torch.equal(both[0], other) for other in both)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overlap": True}, "`overlap=True` is not possible with `topology='all'`"),
        ({"weights": [[0.5, 0.5], [0.5, 0.5]]}, "`weights` are those of links, and `topology='all'` has none"),
        ({"topology": "ring", "comm_dtype": "int8"}, "`comm_dtype='int8'` is for `topology='all'` only"),
        ({"topology": [[0, 1]], "comm_dtype": "int4"}, "`comm_dtype='int4'` is for `topology='all'` only"),
        ({"comm_dtype": "bfloat16"}, "`comm_dtype='bfloat16'` is none of 'int8', 'int4' and None"),
        ({"topology": "al"}, "Did you mean 'all'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        PowerGossipStrategy(**{"topology": "all", **arguments})
