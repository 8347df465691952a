"""How many parameters a rank holds, by the module that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_lss.planner.setup import Setup


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters on a rank before any of them is sharded by FSDP.

    ``attention`` and ``mlp`` are the matrices of one block, ``norms`` its vectors; ``positions`` is this rank's share of
    a learned table.
    """

    attention: int
    mlp: int
    norms: int
    embedding: int
    positions: int
    head: int
    last_norm: int
    num_layers: int

    @property
    def block(self) -> int:
        """Of one block."""
        return self.attention + self.mlp + self.norms

    @property
    def root(self) -> int:
        """Outside of the blocks."""
        return self.embedding + self.positions + self.head + self.last_norm

    @property
    def total(self) -> int:
        """Of the rank."""
        return self.num_layers * self.block + self.root

    @property
    def shared(self) -> int:
        """Those whose gradients are averaged over the world under LSS: all but the positions."""
        return self.total - self.positions

    def held(self, shards: int) -> float:
        """Of the rank where FSDP shards the others over ``shards`` ranks; positions are not sharded."""
        return self.shared / shards + self.positions

    @property
    def largest(self) -> int:
        """An upper bound of the largest tensor."""
        return max(self.embedding, self.positions, self.mlp // 2, self.attention // 2)


def count(setup: Setup) -> ParameterCounts:
    """Count what a rank holds. Megatron shares out the matrices of the blocks; LSS cuts the positional table."""
    config, shares = setup.config, setup.size if setup.scheme == "megatron" else 1
    width, table = config.width, config.vocab_size * config.width
    learned = config.positions == "learned"
    return ParameterCounts(
        attention=(2 * width * width + 2 * width * setup.kv_width) // shares,
        mlp=width * config.hidden_width * (3 if config.mlp == "swiglu" else 2) // shares,
        norms=4 * width,
        embedding=table,
        positions=setup.seq_len * width // setup.size if learned else 0,
        head=0 if config.tie_embeddings else table,
        last_norm=2 * width,
        num_layers=config.num_layers,
    )
