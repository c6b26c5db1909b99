"""Settings with Hydra: `hydra_config.yaml` names the classes, and the command line changes their arguments.

    python examples/hydra_config.py                                    # two CPU processes, PowerSGD
    python examples/hydra_config.py trainer.strategy.rank=4 model.learning_rate=0.1
    python examples/hydra_config.py trainer.strategy=ddp               # plain DDP

Hydra puts what a run leaves behind into a folder of its own, `outputs/DATE/TIME`.
"""

from __future__ import annotations

import hydra
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

import lightning_powersgd  # noqa: F401  (makes the strategy known by its names, such as `trainer.strategy=powersgd`)


@hydra.main(version_base="1.3", config_path=".", config_name="hydra_config")
def main(config: DictConfig) -> None:
    """Train and test what the settings describe."""
    seed_everything(config.seed)
    model, data = instantiate(config.model), instantiate(config.data)
    trainer = instantiate(config.trainer)
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
