"""Options that change how a step is computed and not what: that they do it."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_lss import LSSTransformer

SIZES: dict[str, Any] = {"vocab_size": 11, "seq_len": 16, "width": 16, "num_heads": 2, "positions": "rotary"}


def test_every_block_is_compiled_and_its_compiled_code_is_called() -> None:
    calls: list[int] = []

    def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        number = len(compiled_functions)
        compiled_functions.append(options)

        def call(*args: Any) -> Any:
            calls.append(number)
            return function(*args)

        return call

    tokens = torch.zeros(1, 16, dtype=torch.int64)
    for wanted in (True, False):
        compiled_functions: list[dict[str, Any]] = []
        calls.clear()
        module = LSSTransformer(**SIZES, num_layers=3, compile_blocks=wanted)
        with patch("torch.compile", compiled):
            module.setup("fit")
            module(tokens)
        assert compiled_functions == [{"fullgraph": True}] * 3 * wanted
        assert calls == [0, 1, 2] * wanted


@pytest.mark.parametrize(("mode", "kept"), [("none", True), ("full", True), ("offload", False)])
def test_offload_keeps_no_input_of_a_block_on_the_device(mode, kept) -> None:
    # Autograd gives what it saves to the innermost hooks: with offload to those that move it to host memory. What it
    # keeps where it is comes to the hooks around the model.
    saved: list[int] = []
    inputs: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.data_ptr())
        return x

    module = LSSTransformer(**SIZES, num_layers=3, activation_checkpointing=mode)
    for block in module.model.blocks:
        block.attention_norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].data_ptr()))
    with saved_tensors_hooks(pack, lambda x: x):
        loss = module(torch.zeros(1, 16, dtype=torch.int64)).sum()
    assert len(inputs) == 3
    assert [pointer in saved for pointer in inputs] == [kept] * 3
    loss.backward()
