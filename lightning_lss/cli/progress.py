"""The progress bar of a run that is counted in steps."""

from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override


class StepsProgressBar(RichProgressBar):
    """Shows Lightning's bar, without a last epoch where none is set: Lightning writes "Epoch 0/-2"."""

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "  ")  # of max_epochs=-1; the width stays
