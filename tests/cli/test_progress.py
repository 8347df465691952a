"""What the progress bar says of epochs."""

import pytest
from lightning.pytorch import Trainer

from lightning_lss.cli.progress import StepsProgressBar


@pytest.mark.parametrize(
    ("limit", "words"), [({"max_epochs": -1}, "Epoch 3"), ({"max_epochs": 5}, "Epoch 3/4")], ids=["steps", "epochs"]
)
def test_a_run_that_is_counted_in_steps_has_no_last_epoch(limit, words) -> None:
    bar = StepsProgressBar()
    bar._trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[bar], **limit)
    assert bar._get_train_description(3).strip() == words
