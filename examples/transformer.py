"""Two dropout rates of a small transformer, tuned while it learns to write.

It predicts the next character of the help texts that come with Python, or of Penn Treebank where
``--data-dir`` has ptb.train.txt, ptb.valid.txt and ptb.test.txt.

    python examples/transformer.py
"""

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_hpo import DropoutMixin, OnlineHPOCallback, fixed_values

LENGTH, WIDTH = 32, 64


class LitTransformer(DropoutMixin, lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.symbols, self.places = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(WIDTH, 128)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))
        # One keep probability for the attention, and one for all that is left.
        attention = [f"layers.layers.{i}.self_attn" for i in range(2)]
        others = [f"layers.layers.{i}.dropout{k}" for i in range(2) for k in ("", 1, 2)]
        self.register_dropout(at=attention, name="keep_attention")
        self.register_dropout(at=others, name="keep")

    def training_step(self, batch, batch_idx):
        x = self.symbols(batch[:, :-1]) + self.places.weight
        logits = self.head(self.layers(x, mask=self.mask, is_causal=True))
        return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])

    validation_step = training_step

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data-dir", type=Path, help="folder with ptb.{train,valid,test}.txt")
parser.add_argument("--characters", type=int, default=16000, help="of training, from the start")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="transformer.png", help="the picture of the training")
arguments = parser.parse_args()

if arguments.data_dir is None:
    text = "".join(topics.values())
    texts = [text[200_000 * i :] for i in range(3)]
else:
    texts = [(arguments.data_dir / f"ptb.{k}.txt").read_text() for k in ("train", "valid", "test")]
codes = [torch.tensor([min(ord(c), 127) for c in t[: arguments.characters]]) for t in texts]
train, held_out, test = (c.unfold(0, LENGTH + 1, LENGTH) for c in codes)

callback = OnlineHPOCallback()
losses, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = LitTransformer()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=arguments.epochs,
        check_val_every_n_epoch=10,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(train, 8, shuffle=True), DataLoader(held_out, 16))
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.test(module, DataLoader(test, 16), verbose=False)[0]["test_loss"])

callback.plot()[0].savefig(arguments.output)
rates = [f"{1 - keep:.2f}" for keep in fixed_values(module).values()]
print(
    f"Drop rates of {' and '.join(rates)} instead of 0.1 take the test loss from {losses[0]:.3f} "
    f"to {losses[1]:.3f}, in one training of {seconds[1] / seconds[0]:.1f} times the time of a "
    f"plain one ({seconds[0]:.1f} s)."
)
