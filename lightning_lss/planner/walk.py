"""One training step of one rank, as the tensors that come and go.

The walk follows :mod:`lightning_lss.models.transformer` line by line. In the forward pass what autograd saves stays and all else is
gone at once; in the backward pass the gradients of each layer come and its saved tensors go. Every tensor has its name
in the code, so that a line can be held against what a memory tracker lists.

Sizes: N = B x l local tokens, E model width, K = G x D width of the keys, F hidden width, V vocabulary.
"""

from __future__ import annotations

from lightning_lss.attention.kernels import KERNELS
from lightning_lss.planner.ledger import Ledger
from lightning_lss.planner.setup import Setup
from lightning_lss.planner.sizes import Sizes
from lightning_lss.sequence.layout import chunks_per_rank

_KEPT = {  # tensors of a block that activation checkpointing keeps
    "full": ("stream",),
    "selective": ("stream", "attended", "lse", "kept"),
    "offload": (),
}
_HIDDEN = {  # tensors of the hidden width that autograd saves
    "gelu": ("up", "bent"),  # the input of gelu, that of the last layer
    "swiglu": ("gate", "opened", "up", "product"),  # input of silu, inputs of the product, that of the last layer
}


class Walk(Sizes):
    """A step of a rank; afterwards ``ledger`` knows the peak."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.ledger = Ledger()
        self.layer = 0

    def step(self) -> None:
        """Forward pass, loss, backward pass, optimizer's step."""
        self._standing()
        self._forward()
        self._loss()
        if not self._adds_up:
            self.ledger.free("last_gradients")
        self._loss_backward()
        for layer in reversed(range(self.config.num_layers)):
            self.layer = layer
            self._block_backward()
        self._embedding_backward()
        self._optimizer_step()

    # -- names of the layer ------------------------------------------------------------------------------------------------

    def _hold(self, name: str, size: float, part: str = "activations") -> None:
        if f"{self.layer}.{name}" not in self.ledger.held:  # a block that is computed again finds what it has kept
            self.ledger.hold(f"{self.layer}.{name}", size, part)

    def _free(self, *names: str) -> None:
        self.ledger.free(*(f"{self.layer}.{name}" for name in names))

    def _brief(self, name: str, size: float, part: str = "activations") -> None:
        self._hold(name, size, part)
        self._free(name)

    def _pass_on(self, *names: str, to: str, size: float) -> None:
        """A gradient is computed from others, which are let go."""
        self._hold(to, size)
        self._free(*names)

    # -- forward -------------------------------------------------------------------------------------------------------

    def _standing(self) -> None:
        """What is there before a step begins."""
        own = self.parameters.held(self.setup.shards) * self.setup.precision.parameter
        self.ledger.hold("parameters", own, "parameters")
        self.ledger.hold("moments", 2 * own, "optimizer")  # AdamW's two
        if self.setup.shards == 1 and self.options.ddp:
            self.ledger.hold("buckets", self.parameters.shared * self.setup.precision.parameter, "gradients")
        # Lightning lets the last step's gradients go after the forward pass, not before it
        self.ledger.hold("last_gradients", own - self._in_buckets, "gradients")
        if self.setup.shards > 1:  # FSDP keeps the root's whole for as long as the step lasts
            root = self.parameters.root - self.parameters.positions
            self.ledger.hold("root", root * self.setup.precision.parameter, "parameters")
        self.ledger.hold("batch", 2 * 8 * self.tokens)  # inputs and targets, int64
        if self.config.positions == "rotary":
            positions = self.rows / self.setup.batch_size
            self.ledger.hold("turns", positions * self.config.head_dim * max(4, self.setup.precision.parameter))

    @property
    def _in_buckets(self) -> float:
        """Bytes of gradients that have no tensor of their own beside DDP's buckets."""
        views = self.options.ddp and self.options.gradient_as_bucket_view and self.setup.shards == 1
        return self.parameters.shared * self.setup.precision.parameter if views else 0.0

    @property
    def _adds_up(self) -> bool:
        """Whether gradients are added to those of the batches before, as they are in every batch of a step but the first."""
        return self.options.accumulate_grad_batches > 1

    def _forward(self) -> None:
        self.layer = 0
        self._hold("stream", self.stream)  # saved by the first norm
        if self.config.dropout:
            self.ledger.hold("embedding_mask", self.stream)
        for layer in range(self.config.num_layers):
            self.layer = layer
            self._block_forward()
            self._forget()
            self.layer = layer + 1
            self._hold("stream", self.stream)  # saved by the next block's norm, or by the last
        self._hold("norm", self.local + self.statistics)  # saved by the head

    def _block_forward(self) -> None:
        """One block; what is held afterwards is what autograd has saved."""
        self._gather_block()
        if self.cast:  # the weights in the dtype of computation, saved by the linear layers
            self._hold("weights", (self.parameters.attention + self.parameters.mlp) * self.setup.precision.compute)
        self._attention_forward()
        self._hold("middle", self.stream)  # x + attention, saved by the MLP's norm
        self._normed("mlp_in", readers=2 if self.config.mlp == "swiglu" else 1)
        for name in _HIDDEN[self.config.mlp]:
            self._hold(name, self.hidden)
        if self.setup.mlp_tiles > 1:  # computed again in the backward pass, norm and all
            self._free("mlp_in", "mlp_in_statistics", *_HIDDEN[self.config.mlp])
        self._project_out("mlp")
        self._free("block", "next_block")

    def _normed(self, name: str, readers: int) -> None:
        """The output of a norm, saved by the linear layers that read it: once, or under autocast a copy for each."""
        if self.tensor_parallel or self.cast:
            self._hold("normed", self.stream)  # before it is gathered or cast
        self._hold(name, self.gathered * (readers if self.cast else 1))
        self._hold(f"{name}_statistics", self.statistics)
        self._free("normed")

    def _attention_forward(self) -> None:
        width = self.config.width
        self._normed("attention_in", readers=2)
        self._hold("q", self.shared(width))
        self._hold("kv", self.keys_values)  # one tensor, of which k and v are views
        if self.config.positions == "rotary":
            self._hold("turned_q", self.shared(width))  # saved by attention in place of q
            self._hold("turned_k", self.keys_values / 2)  # kv stays none the less, for v
            self._free("q")
        self._attend()
        if self.split and self.config.keep_gathered:
            self._free("kv", "turned_k")
            self._hold("kept", self.setup.size * self.keys_values, "kv_buffers")
        self._project_out("attention")

    def _attend(self) -> None:
        """The kernel: its output and log-sum-exp are saved."""
        if f"{self.layer}.attended" in self.ledger.held:  # selective checkpointing has kept them
            return
        self._hold("attended", self.shared(self.config.width))
        self._hold("lse", self.rows * self.config.num_heads / self.shares * max(4, self.setup.precision.compute))
        if self.split:  # a chunk in use and one that arrives; also while the only one is put in order or converted
            compute, runs = self.setup.precision.compute, chunks_per_rank(self.setup.size, self.options.layout)
            copied = runs == 2 or self.setup.travelling(compute) != compute
            self._brief("first_chunks", self.chunk * (2 if copied else min(self.chunks, 2)), "kv_buffers")
            self._hold("in_use", self.chunk * min(self.chunks, 2), "kv_buffers")
            self._brief("tile", self.shared(self.config.width) / self.chunks)
        if self.options.explicit_scores:  # the scores, saved by softmax, and the probabilities, saved by the product
            self._hold("scores", 2 * self.shared(self.config.num_heads * self.setup.seq_len))
        self._free("in_use")

    def _project_out(self, branch: str) -> None:
        """The last matrix of a branch, its dropout and the sum with the residual stream."""
        if branch == "attention" and not self.split:  # torch's attention does not put the heads of a token side by side
            self._hold("projected", self.shared(self.config.width))  # saved by the projection
        if self.tensor_parallel:
            self._brief("partial", self.gathered)  # partial sums of all rows, before they are scattered
        self._hold("branch", self.local)
        if self.config.dropout:
            self._hold(f"{branch}_mask", self.local)  # saved by the product
            self._brief("dropped", self.local)
        self._brief("sum", self.stream)
        self._free("branch")

    def _forget(self) -> None:
        """With activation checkpointing, let go of all that is not kept."""
        if self.setup.activation_checkpointing == "none":
            return
        kept = {f"{self.layer}.{name}" for name in _KEPT[self.setup.activation_checkpointing]}
        own = [name for name in self.ledger.held if name.startswith(f"{self.layer}.")]
        self.ledger.free(*(name for name in own if name not in kept))

    # -- loss ----------------------------------------------------------------------------------------------------------

    def _loss(self) -> None:
        self._hold("logits", self.logits, "logits")
        if self.cast:
            self._brief("cast_logits", self.logits / 2, "logits")
        if not self.setup.chunked_loss:
            self._hold("log_softmax", self.logits, "logits")  # saved by the loss
        else:  # chunk by chunk with its gradient, so that no logits are kept
            self._hold("norm_grad", self.local, "logits")
            self._hold("head_grad", self._head_grad, "logits")
            self._brief("head_grad_of_rows", self._head_grad, "logits")
        self._free("logits")

    @property
    def _head_grad(self) -> float:
        """The gradient of the head's weight, which a loss in chunks sums up in float32 at least."""
        return self.config.vocab_size * self.config.width * max(4, self.setup.precision.parameter)

    def _loss_backward(self) -> None:
        if not self.setup.chunked_loss:
            self._hold("likelihood_grad", self.logits, "logits")
            self._hold("logits_grad", self.logits, "logits")
            self._free("likelihood_grad", "log_softmax")
            self._hold("norm_grad", self.local)
        self._weight_grad("head", self.config.vocab_size * self.config.width)
        self._free("logits_grad", "norm", "head_grad")
        self._pass_on("norm_grad", "stream", to="grad", size=self.stream)

    # -- backward ------------------------------------------------------------------------------------------------------

    def _block_backward(self) -> None:
        """One block, from the gradient of its output, which is that of the next block's input, to that of its own."""
        self.ledger.rename(f"{self.layer + 1}.grad", f"{self.layer}.grad")
        self._gather_block()
        if self.setup.activation_checkpointing != "none":
            self._hold("stream", self.stream)  # comes back from the host, where it had gone there
            self._block_forward()
            self._gather_block()
        self._mlp_backward()
        self._attention_backward()
        self._scatter_block()

    def _branch_grad(self, branch: str) -> None:
        """The gradient of the output of a branch's last matrix."""
        if self.config.dropout or self.cast:
            self._hold("branch_grad", self.local)
            self._free(f"{branch}_mask")
        if self.tensor_parallel:
            self._hold("gathered_grad", self.gathered)
            self._free("branch_grad")

    def _mlp_backward(self) -> None:
        width, hidden = self.config.width, self.config.hidden_width
        self._branch_grad("mlp")
        self._hold("mlp_in", self.gathered / self.setup.mlp_tiles)
        for name in _HIDDEN[self.config.mlp]:  # held already, unless they are computed again tile by tile
            self._hold(name, self.hidden)
        matrix = width * hidden / self.shares
        self._hold("last_grad", self.hidden)
        self._weight_grad("mlp_out", matrix)
        self._free("bent", "product", "branch_grad", "gathered_grad")
        if self.config.mlp == "swiglu":
            self._hold("opened_grad", self.hidden)
            self._pass_on("last_grad", "opened", "up", to="up_grad", size=self.hidden)
            self._hold("mlp_in_grad", self.gathered)
            self._weight_grad("mlp_up", matrix)
            self._free("up_grad")
            self._pass_on("opened_grad", "gate", to="gate_grad", size=self.hidden)
            self._brief("mlp_in_grad_gate", self.gathered)
            self._weight_grad("mlp_gate", matrix)
            self._free("gate_grad")
        else:
            self._pass_on("last_grad", "up", to="up_grad", size=self.hidden)
            self._hold("mlp_in_grad", self.gathered)
            self._weight_grad("mlp_up", matrix)
            self._free("up_grad")
        self._norm_backward("mlp_in", "middle")

    def _norm_backward(self, name: str, saved: str) -> None:
        """From the gradient of a norm's output to that of its input, which joins that of the residual stream."""
        self._free(name)
        if self.tensor_parallel or self.cast:  # scattered, or cast back
            self._pass_on(f"{name}_grad", to="normed_grad", size=self.stream)
        self._hold("stream_grad", self.stream)
        self._free(f"{name}_grad", "normed_grad", f"{name}_statistics", saved)
        self._brief("sum", self.stream)
        self._free("stream_grad")

    def _attention_backward(self) -> None:
        width, keys = self.config.width, self.setup.kv_width
        self._branch_grad("attention")
        self._hold("attended_grad", self.shared(width))
        self._weight_grad("attention_out", width * width / self.shares)
        self._free("projected", "branch_grad", "gathered_grad")
        self._attend_backward()
        self._free("kv", "turned_k", "q", "turned_q", "attended", "lse", "attended_grad", "kept", "scores")
        if self.config.positions == "rotary":  # halves, products and their sum, of the larger
            self._brief("turning", 2 * self.shared(width))
        self._pass_on("k_grad", "v_grad", to="kv_grad", size=self.keys_values)  # side by side again
        self._hold("attention_in_grad", self.gathered)
        self._weight_grad("key_value", 2 * width * keys / self.shares)
        self._free("kv_grad")
        self._hold("attention_in_grad_q", self.gathered)
        self._weight_grad("query", width * width / self.shares)
        self._free("q_grad")
        self._brief("attention_in_grad_sum", self.gathered)
        self._free("attention_in_grad_q")
        self._norm_backward("attention_in", "stream")

    def _attend_backward(self) -> None:
        if self.options.explicit_scores:
            self._brief("scores_grad", 2 * self.shared(self.config.num_heads * self.setup.seq_len))
        self._hold("q_grad", self.shared(self.config.width))
        if self.split:
            # a chunk in use and one that arrives; room for the gradients of one, and of another that is on its way; while
            # the first of two chunks is in use none is on its way, while the last is in use none arrives
            chunks = min(self.chunks + 1, 4) - (1 if self.config.keep_gathered else 0)
            self._hold("in_use", self.chunk * chunks, "kv_buffers")
            arrived = 0 if self.chunks == 1 else max(1, self.chunks - 2) / self.chunks
            self._hold("arrived", self.keys_values * arrived)
            self._brief("tile", self._kernel_gradients(), "kv_buffers")
            self._free("in_use", "arrived")
            if self.chunks > 1:
                self._hold("chunk_grads", self.keys_values)  # before they are one tensor
        self._hold("k_grad", self.keys_values / 2)
        self._hold("v_grad", self.keys_values / 2)
        self._free("chunk_grads")

    def _kernel_gradients(self) -> float:
        """What a call of attention's backward kernel returns, beside the sum of the queries' gradients so far."""
        length, runs = self.setup.seq_len, chunks_per_rank(self.setup.size, self.options.layout)
        kernel, causal = KERNELS[self.options.kernel], self.config.causal
        diagonal = length / (self.setup.size * runs) if causal else 0  # a tile with a diagonal is not cut
        keys = length if kernel.backward_keys is None else max(min(kernel.backward_keys, length), diagonal)
        one_call = keys == length and (kernel.offset_diagonal or not causal)
        queries = self.shared(self.config.width) / self.chunks / (runs if causal else 1)
        return self.chunk * keys / length + queries * (1 if one_call else 2)

    def _embedding_backward(self) -> None:
        self.layer = 0
        self.ledger.free("embedding_mask")
        self._weight_grad("positions", self.parameters.positions)
        table = self.config.vocab_size * self.config.width
        self._weight_grad("embedding", table)
        self.ledger.free("outgoing")
        if self.config.tie_embeddings:  # the head's gradient was there already
            self._free("embedding_grad")
        self._free("grad")

    # -- parameters ------------------------------------------------------------------------------------------------------

    def _gather_block(self) -> None:
        """FSDP gathers the parameters of a block, and those of the next while they are in use."""
        if self.setup.shards > 1:
            self._hold("block", self.parameters.block * self.setup.precision.parameter, "parameters")
            self._hold("next_block", self.parameters.block * self.setup.precision.parameter, "parameters")

    def _weight_grad(self, name: str, numbers: float) -> None:
        """The gradient of a matrix: it becomes ``.grad``, or is added to a bucket that is ``.grad``."""
        size = numbers * self.setup.precision.parameter
        if self.cast:
            self._brief(f"{name}_cast_grad", numbers * self.setup.precision.compute, "gradients")
        self._hold(f"{name}_weight_grad", size, "gradients")
        if self._in_buckets or (self._adds_up and self.setup.shards == 1):
            self._free(f"{name}_weight_grad")

    def _scatter_block(self) -> None:
        """FSDP sums the gradients of a block over the ranks and keeps its shard."""
        if self.setup.shards > 1:
            size = self.parameters.block * self.setup.precision.parameter
            self.ledger.free("outgoing")  # those of a block are let go when the next block's are about to leave
            self.ledger.hold("outgoing", size, "gradients")
            self._free(
                *(
                    f"{name}_weight_grad"
                    for name in ("mlp_out", "mlp_up", "mlp_gate", "attention_out", "key_value", "query")
                )
            )
            self._hold("shard_grad", size / self.setup.shards, "gradients")
            if self._adds_up:
                self._free("shard_grad")
        self._free("block", "next_block", "weights")

    def _optimizer_step(self) -> None:
        """AdamW's temporaries: its denominators, of all parameters at once on a GPU, two of one parameter on a CPU."""
        sizes = {"none": 0, "largest": 2 * self.parameters.largest, "all": self.parameters.total}
        numbers = sizes[self.options.optimizer_temporaries] / self.setup.shards
        self.ledger.brief("denominators", numbers * self.setup.precision.parameter, "optimizer")
