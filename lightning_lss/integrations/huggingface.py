"""Hugging Face models: their attention and their masks, by the library's own interfaces.

A ``PreTrainedModel`` asks its configuration which attention to call, and which function makes the mask for it. Within
:func:`adapt` these are the ones here. A mask then stays what it is, a window or documents, instead of a table of all pairs.
"""

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from inspect import getclosurevars, signature
from operator import and_, or_
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lss.attention.functional import lss_attention
from lightning_lss.attention.masks import AttentionMask
from lightning_lss.tensor.attention import attend, read_mask, split_alike
from lightning_lss.tensor.split_tensor import SplitTensor, part, split, split_tensor, whole

NAME = "lss"

# -- attention ---------------------------------------------------------------------------------------------------------

_IGNORED = {
    *("position_ids", "cache_position", "use_cache", "past_key_values", "past_key_value", "layer_idx", "is_causal"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch"),
    *("sliding_window", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    "deterministic",
}
"""Keyword arguments of attention functions that say nothing which the mask does not."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' own attention functions do: [B, H, L, D] -> [B, L, H, Dv].

    Raises:
        NotImplementedError: for a keyword argument that is not known; the message names it.
    """
    if unknown := [name for name, x in kwargs.items() if x is not None and name not in _IGNORED]:
        raise NotImplementedError(
            f"{type(module).__name__} passes {', '.join(map(repr, unknown))} to its attention, which is not known for a sequence that is"
            " split. Load the model with attn_implementation='eager' to compute attention from its formula."
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    learned = isinstance(attention_mask, Tensor) and attention_mask.requires_grad
    if (position_bias is not None or learned) and softcap is None and s_aux is None:
        return _with_bias(module, query, key, value, attention_mask, dropout, scaling, causal, position_bias)
    if position_bias is not None or learned:
        raise NotImplementedError(
            f"{type(module).__name__} learns a bias of its attention and uses softcap or s_aux too, which is not known for a sequence"
            " that is split. Load the model with attn_implementation='eager' to compute attention from its formula."
        )
    mask, bias = attention_mask, None
    if isinstance(attention_mask, Tensor):
        mask, bias = read_mask(attention_mask, query.shape[2], key.shape[2])
    causal = causal and attention_mask is None and query.shape[2] > 1
    query, key, value = split_alike(query, key, value)
    options: dict[str, Any] = {"mask": mask, "bias": bias, "scale": scaling, "dropout": dropout}
    options |= {"softcap": softcap, "sinks": s_aux, "causal": causal}
    if isinstance(query, SplitTensor):
        result: Tensor = attend(query, key, value, **options)
    else:
        result = lss_attention(query, key, value, **options)
    return result.transpose(1, 2).contiguous(), None


def _with_bias(*args: Any) -> tuple[Tensor, None]:
    """Attend with a bias that is learned, as T5's of relative positions: in torch's attention, which keeps its gradient."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module, query, key, value, mask, dropout, scaling, causal, bias = args
    if isinstance(mask, AttentionMask):
        mask = mask.dense(query.shape[2], num_keys=key.shape[2]).to(query.device)
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout, scaling, causal, bias
    )
    return result


# -- masks -------------------------------------------------------------------------------------------------------------


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> AttentionMask:
    """Make the mask of a layer as transformers' own mask functions do, but of its structure where that is known."""
    from transformers.masking_utils import sdpa_mask

    assert mask_function is not None
    shown = read_function(mask_function, kv_length)
    if shown is None or int(q_offset) or int(kv_offset):
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        table = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
        return AttentionMask.from_dense(whole(table))
    if attention_mask is None:
        return shown
    valid = whole(attention_mask).bool()
    return shown if bool(valid.all()) else shown & AttentionMask.key_padding(valid)


def read_function(function: Callable[..., Any], length: int) -> AttentionMask | None:
    """Say in one value what a mask function of transformers shows in sequences of ``length``; None for one that is not known."""
    kind = function.__qualname__.split(".")[0] if function.__module__ == "transformers.masking_utils" else ""
    reader = _READERS.get(kind)
    return None if reader is None else reader(getclosurevars(function).nonlocals, length)


def _combined(combine: Callable[[AttentionMask, AttentionMask], AttentionMask]) -> "_Reader":
    def read(closure: Mapping[str, Any], length: int) -> AttentionMask | None:
        parts = [read_function(part, length) for part in closure["mask_functions"]]
        known = [part for part in parts if part is not None]
        return reduce(combine, known) if len(known) == len(parts) else None

    return read


def _chunked(closure: Mapping[str, Any], length: int) -> AttentionMask:
    size, padding = closure["chunk_size"], whole(closure["left_padding"])
    if not bool(padding.any()):
        return AttentionMask.chunked(size)
    return AttentionMask.documents((torch.arange(length) - padding.cpu().view(-1, 1)).div(size, rounding_mode="floor"))


def _packed(closure: Mapping[str, Any], length: int) -> AttentionMask | None:
    """A mask in terms of positions within documents: within a document they are as far apart as in the sequence. (The
    library shows pairs of different documents nothing.)"""
    positions, function = whole(closure["position_ids"]), closure["mask_function"]
    shown = read_function(function, length)
    if shown is None or "chunked" in function.__qualname__ or _has_chunks(function):
        return None
    return shown & AttentionMask.from_position_ids(positions)


def _has_chunks(function: Callable[..., Any]) -> bool:
    parts = getclosurevars(function).nonlocals.get("mask_functions", ())
    return function.__qualname__.startswith("chunked_overlay") or any(map(_has_chunks, parts))


def _blocks(closure: Mapping[str, Any], length: int) -> AttentionMask:
    ids = whole(closure["block_sequence_ids"])
    return AttentionMask.documents(ids) & AttentionMask.padding(ids >= 0)


_Reader = Callable[[Mapping[str, Any], int], AttentionMask | None]
_READERS: dict[str, _Reader] = {
    "causal_mask_function": lambda closure, length: AttentionMask.causal(),
    "bidirectional_mask_function": lambda closure, length: AttentionMask.full(),
    "and_masks": _combined(and_),
    "or_masks": _combined(or_),
    "sliding_window_overlay": lambda x, length: AttentionMask.sliding_window(x["sliding_window"] - 1, length),
    "sliding_window_bidirectional_overlay": lambda x, _: AttentionMask.sliding_window(*[x["sliding_window"]] * 2),
    "chunked_overlay": _chunked,
    "padding_mask_function": lambda x, _: AttentionMask.key_padding(whole(x["padding_mask"])),
    "packed_sequence_mask_function": lambda x, _: AttentionMask.documents(whole(x["packed_sequence_mask"])),
    "remap_positions_for_packed_sequence": _packed,
    "blockwise_overlay": _blocks,
}
"""By the function of transformers that made a mask function, what that shows."""

# -- models ------------------------------------------------------------------------------------------------------------


@contextmanager
def adapt(module: nn.Module) -> Generator[None, None, None]:
    """Let the Hugging Face models in ``module`` use this attention and these masks within the ``with`` statement."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
    models = [x for x in module.modules() if isinstance(x, PreTrainedModel)]
    configs = {id(x.config): x.config for x in models if x._can_set_attn_implementation()}
    with ExitStack() as stack:
        for config in configs.values():
            stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
            config._attn_implementation_internal = NAME
        for model in models:
            stack.callback(model.register_forward_pre_hook(_without_cache, with_kwargs=True).remove)
        for child in module.modules():
            if type(child).__name__.endswith("RotaryEmbedding"):
                stack.callback(child.register_forward_pre_hook(_split_positions, with_kwargs=True).remove)
            if type(child).__name__.endswith("Experts") and "forward" not in vars(child):
                child.forward = partial(_token_by_token, child.forward)
                stack.callback(delattr, child, "forward")
        yield


def _without_cache(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Keep no keys and values, unless that changes the mask: of packed documents, told by positions alone, it does."""
    packed = kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None
    if packed or not torch.is_grad_enabled() or "use_cache" not in signature(model.forward).parameters:
        return args, kwargs
    return args, {"use_cache": False, **kwargs}


def _split_positions(rotary: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Split positions as the tokens are, so that a rank computes no angles but its own."""
    given = [*args, *kwargs.values()]
    tokens = next((x for x in given if isinstance(x, SplitTensor)), None)
    if tokens is None:
        return None

    def split_like(x: Any) -> Any:
        along = (
            tokens.placement.dim == 1 and type(x) is Tensor and x.dim() == 2 and x.size(1) == tokens.placement.length
        )
        return split(x, tokens.placement) if along else x

    return tuple(map(split_like, args)), {name: split_like(x) for name, x in kwargs.items()}


def _token_by_token(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let experts compute a rank's tokens only: what they give a token depends on nothing but the token and its choice."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    placements = {x.placement if isinstance(x, SplitTensor) else None for x in given}
    placement = next(iter(placements))
    if len(placements) > 1 or placement is None or placement.dim != 0:
        return compute(*args, **kwargs)
    result = compute(*map(part, args), **{name: part(x) for name, x in kwargs.items()})
    return split_tensor(result, placement)
