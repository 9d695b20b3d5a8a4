"""The dropout of a small transformer, tuned while it learns to write like Python's help texts.

It trains twice, plain and tuned: python examples/transformer.py
"""

import argparse
import time
from pydoc_data.topics import topics

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_hpo import DropoutMixin, OnlineHPOCallback

LENGTH, WIDTH = 32, 64


class LitTransformer(DropoutMixin, lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.symbols, self.places = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 256, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(WIDTH, 128)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))
        self.register_dropout(name="keep")  # one keep probability, also for the attention

    def training_step(self, batch, batch_idx):
        x = self.symbols(batch[:, :-1]) + self.places.weight
        logits = self.head(self.layers(x, mask=self.mask, is_causal=True))
        return nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--characters", type=int, default=16_000, help="of each set")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

text = "".join(topics.values())
texts = [text[200_000 * i :][: arguments.characters] for i in range(3)]
codes = [torch.tensor([min(ord(character), 127) for character in text]) for text in texts]
train, held_out, test = (code.unfold(0, LENGTH + 1, LENGTH) for code in codes)

callback = OnlineHPOCallback()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
losses, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = LitTransformer()
    trainer = lightning.Trainer(max_epochs=arguments.epochs, callbacks=callbacks, **quiet)
    start = time.perf_counter()
    trainer.fit(module, DataLoader(train, 8, shuffle=True), DataLoader(held_out, 16))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.validate(module, DataLoader(test, 16), verbose=False)[0]["val_loss"])

callback.plot()[0].savefig("transformer.png")
print(
    f"A drop rate of {1 - module.keep().item():.2f} instead of 0.1 takes the test loss from "
    f"{losses[0]:.3f} to {losses[1]:.3f}, in one training of {seconds[1] / seconds[0]:.1f} times "
    f"the time of a plain one ({seconds[0]:.1f} s). Picture: transformer.png"
)
