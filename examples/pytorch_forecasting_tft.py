"""Dropout of a module that another package ships: pytorch-forecasting's TFT.

The temporal fusion transformer comes with its optimizer, losses and logs; none of them changes.
The start of 0.5 is too much on purpose: from TFT's own default of 0.1, the rate stays where it is.

    pip install pytorch-forecasting && python examples/pytorch_forecasting_tft.py
"""

import argparse
import time

import lightning
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data

from lightning_hpo import DropoutMixin, OnlineHPOCallback, fixed_values, with_mixins

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

table = generate_ar_data(seasonality=10.0, timesteps=70, n_series=20, seed=0)
options = {
    "time_idx": "time_idx",
    "target": "value",
    "group_ids": ["series"],
    "time_varying_known_reals": ["time_idx"],
    "time_varying_unknown_reals": ["value"],
    "max_encoder_length": 20,
    "max_prediction_length": 5,
}
data = TimeSeriesDataSet(table[table.time_idx < 50], **options)
train = data.to_dataloader(train=True, batch_size=64)
held_out, test = (  # what comes later, in the same series
    TimeSeriesDataSet.from_dataset(
        data, table[table.time_idx < end], min_prediction_idx=end - 10
    ).to_dataloader(train=False, batch_size=64)
    for end in (60, 70)
)

callback = OnlineHPOCallback()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
losses, seconds = [], []
for callbacks in [], [callback]:
    lightning.seed_everything(arguments.seed, verbose=False)
    module = TemporalFusionTransformer.from_dataset(
        data, hidden_size=16, dropout=0.5, learning_rate=0.01, optimizer="adam"
    )
    if callbacks:  # the two lines that are added
        module = with_mixins(module, DropoutMixin)
        module.register_dropout()
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, gradient_clip_val=0.1, callbacks=callbacks, **quiet
    )
    start = time.perf_counter()
    trainer.fit(module, train, held_out)
    seconds.append(time.perf_counter() - start)
    losses.append(trainer.validate(module, test, verbose=False)[0]["val_loss"])

callback.plot()[0].savefig("tft.png")
(keep,) = fixed_values(module).values()
print(
    f"A drop rate of {1 - keep:.2f} instead of 0.5 takes the test loss from {losses[0]:.3f} to "
    f"{losses[1]:.3f}, in one training of {seconds[1] / seconds[0]:.1f} times the time of a plain "
    f"one ({seconds[0]:.1f} s). Picture: tft.png"
)
