"""A generative adversarial network on MNIST: manual optimisation of two networks, each with an optimizer of its own.

    python examples/gan.py fit                                                       # two CPU processes, PowerSGD
    python examples/gan.py fit --trainer.strategy ddp_find_unused_parameters_true    # the same with plain DDP

At the end it writes a picture of digits that nobody has written, `digits.png` unless told otherwise.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from image_classification import Batch, ImageDataModule
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from matplotlib.image import imsave
from torch import nn


class GAN(LightningModule):
    """Two small convolutional networks: one draws 28×28 grey images, the other tells them from real ones.

    Args:
        picture: where to write generated images when training ends, 8 rows of 8.
        noise_size: random numbers that an image is made of.
        learning_rate: of both networks.
    """

    def __init__(self, picture: Path = Path("digits.png"), noise_size: int = 64, learning_rate: float = 5e-4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.picture = picture
        self.noise_size = noise_size
        self.learning_rate = learning_rate
        self.generator = nn.Sequential(
            nn.Linear(noise_size, 128 * 7 * 7),
            nn.Unflatten(1, (128, 7, 7)),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.ConvTranspose2d(128, 64, kernel_size=4, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 1, kernel_size=4, stride=2, padding=1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 64, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(128 * 7 * 7, 1),
        )

    def on_train_start(self) -> None:
        # All processes start from one seed, and would draw the same noise.
        torch.manual_seed(torch.initial_seed() + self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        real, _ = batch
        noise = torch.randn(len(real), self.noise_size, device=self.device)
        generator_optimizer, discriminator_optimizer = self.optimizers()

        # Toggled: of a gradient that is averaged and then thrown away, a part would stay in PowerSGD's error buffers.
        self.toggle_optimizer(discriminator_optimizer)
        fake = self.generator(noise).detach()
        loss = (F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(fake))).mean()
        self.log("discriminator_loss", loss, prog_bar=True)
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()
        self.untoggle_optimizer(discriminator_optimizer)

        self.toggle_optimizer(generator_optimizer)
        loss = F.softplus(-self.discriminator(self.generator(noise))).mean()
        self.log("generator_loss", loss, prog_bar=True)
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()
        self.untoggle_optimizer(generator_optimizer)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.generator.eval()
            noise = torch.randn(64, self.noise_size, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                images = self.generator(noise.to(self.device)).cpu()
            imsave(self.picture, images.view(8, 8, 28, 28).transpose(1, 2).reshape(224, 224).numpy(), cmap="gray")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), self.learning_rate, betas=(0.5, 0.999)) for network in networks]


def main() -> None:
    """Run the command line."""
    LightningCLI(
        GAN,
        ImageDataModule,
        seed_everything_default=0,
        trainer_defaults={
            "accelerator": "cpu",
            "devices": 2,
            "max_epochs": 30,
            # Each backward pass reaches one of the two networks, and DDP would wait for gradients of the other.
            "strategy": "powersgd_find_unused_parameters_true",
        },
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    main()
