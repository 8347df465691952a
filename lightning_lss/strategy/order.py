"""The order of samples: the loader's own with one data replica, a distributed sampler's in that order with several."""

from types import SimpleNamespace
from typing import Any

from lightning.fabric.utilities.data import _reinstantiate_wrapped_cls, has_iterable_dataset
from lightning.pytorch.trainer.connectors.data_connector import _get_distributed_sampler
from lightning.pytorch.utilities.data import _get_dataloader_init_args_and_kwargs, _is_dataloader_shuffled
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler


def distribute_samples(loader: object, overfit_batches: int | float, **kwargs: Any) -> object:
    """Give each data replica its part of a loader's samples, shuffled only if the loader was.

    Lightning does the same, but shuffles every training loader. Samplers of the user's own are wrapped and keep their
    order. Iterable datasets and loaders that have a ``DistributedSampler`` stay as they are, and so does what is not a
    ``DataLoader``.

    Args:
        loader: the user's loader.
        overfit_batches: the Trainer's; other than 0 it turns shuffling off.
        **kwargs: ``num_replicas`` and ``rank`` of the ``DistributedSampler``.

    Returns:
        a new loader of the same class, or ``loader`` itself.

    Raises:
        TypeError: from Lightning, if a batch sampler of the user's own takes no sampler, or a sampler has no length.
    """
    if not isinstance(loader, DataLoader) or has_iterable_dataset(loader):
        return loader
    batches = loader.batch_sampler
    own = getattr(batches, "sampler", loader.sampler)  # beside a batch sampler, the loader's is a dummy
    if isinstance(own, DistributedSampler):
        return loader
    source: Any = SimpleNamespace(dataset=loader.dataset, sampler=own)
    sampler = _get_distributed_sampler(source, _is_dataloader_shuffled(loader), overfit_batches, **kwargs)
    args, options = _get_dataloader_init_args_and_kwargs(loader, sampler)
    if type(batches) is BatchSampler and loader.batch_size is None:  # passed by the user: Lightning loses its size
        batches = BatchSampler(sampler, batches.batch_size, batches.drop_last)
        options |= {"batch_sampler": batches, "sampler": None, "batch_size": 1, "drop_last": False}
    return _reinstantiate_wrapped_cls(loader, *args, **options)
