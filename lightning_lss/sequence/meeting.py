"""Ranks meet at the store that their process group was made with, where one may not come and a collective would hang."""

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


def meet(name: str, size: int, word: str, timeout: timedelta | None) -> int | None:
    """Wait until ``size`` ranks have called this with the same ``name``.

    Args:
        name: of the ranks that meet; they may meet often, and every rank comes once to each meeting.
        size: how many they are.
        word: what this rank has to say.
        timeout: how long to wait; None for the store's own.

    Returns:
        how many ranks have said the same, or None if some did not come.
    """
    store = dist.PrefixStore(f"lightning_lss/{name}", _get_default_store())
    meeting = (store.add("arrived", 1) - 1) // size
    store.add(f"{meeting}/{word}", 1)
    if store.add(f"{meeting}/said", 1) == size:
        store.set(f"{meeting}/all have said", "")
    try:
        store.wait([f"{meeting}/all have said"], *([timeout] if timeout is not None else []))
    except RuntimeError:  # a DistStoreError, but for some kinds of store
        return None
    return store.add(f"{meeting}/{word}", 0)
