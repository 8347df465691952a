"""Start CPU processes that prove a module, as a run with ``strategy="lss"`` would before its first step."""

import pickle
import sys
from typing import Any, cast

import cloudpickle
import lightning.pytorch as pl
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_lss.proof.report import InexactError, Report
from lightning_lss.strategy.lss import LSSStrategy
from lightning_lss.testing.world import World
from lightning_lss.verifier.leaks import find_leaks
from lightning_lss.verifier.table import print_report


def verify(
    module: pl.LightningModule,
    batch: Any,
    sequence_parallel_size: int = 2,
    *,
    precision: Any = "32-true",
    verbose: bool = True,
    timeout: float = 300.0,
    **strategy: Any,
) -> Report:
    """Prove on CPU processes that ``module`` trains on a split sequence as on one device.

    The module's own ``training_step`` runs on ``batch``, shortened where the module allows it, whole and split, and every
    trained parameter must get the same gradient. Nothing is trained; ``module`` stays unchanged. A script calls it below
    ``if __name__ == "__main__":``, since the processes import the script.

    Args:
        module: with its ``training_step`` and, if it optimizes manually, ``configure_optimizers``.
        batch: as the data loader gives it, with whole sequences, on the CPU.
        sequence_parallel_size: S, the number of processes to start, at least 2.
        precision: the Trainer's.
        verbose: print a table of parameters, modules and of what a token reaches.
        timeout: seconds that the processes may take.
        **strategy: arguments of :class:`~lightning_lss.LSSStrategy`, such as ``layout`` or ``sequence_dims``.

    Returns:
        what was compared, with ``gradients``, and, of a module that is written for segments, ``modules`` and ``leaks``.

    Raises:
        InexactError: if the training would not be that of one device; the message names causes and lines to write.
        ValueError: if the size is less than 2, or the batch cannot be split.
        MisconfigurationException: if the strategy refuses the module, or nothing could be compared.
    """
    if sequence_parallel_size < 2:
        raise ValueError(
            f"sequence_parallel_size={sequence_parallel_size}: one rank has nothing to be compared with; use 2."
        )
    call = _pickled(module, batch, sequence_parallel_size, precision, strategy)
    with World(sequence_parallel_size, timeout) as world:
        result = world.run(sequence_parallel_size, _prove_on_rank, call)[0]
    if isinstance(result, Exception):
        raise result
    if verbose:
        print_report(result)
    if result.unverified:
        raise MisconfigurationException(f"Nothing could be compared: {result.unverified}.")
    if not result.exact:
        raise InexactError(result)
    return result


def _pickled(*args: Any) -> bytes:
    """Pickle by reference, so that messages name the user's own files, where the processes can import what they are given: not
    what a notebook or a function defines."""
    try:
        if hasattr(sys.modules["__main__"], "__file__"):
            return pickle.dumps(args)
    except (pickle.PicklingError, AttributeError, TypeError):
        pass
    return cloudpickle.dumps(args)


class _Proved(BaseException):
    """Ends a run after its proof."""


class _Prover(LSSStrategy):
    """Proves a run at length, and ends it before its first step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Prove, and step no further."""
        proof = self._batch_proof(args[1:])
        report = proof.prove()
        if not report.unverified:
            proof.inspect(report)
        if report.exact and not proof.rehearsal.shows_whole:  # there a rank's outputs are shown whole too
            report.leaks = list(find_leaks(proof, report.length))
        raise _Proved(report)


def _prove_on_rank(rank: int, call: bytes) -> Any:
    module, batch, size, precision, strategy = cloudpickle.loads(call)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    try:
        prover = _Prover(size, cluster_environment=LightningEnvironment(), **strategy)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=size,
            strategy=prover,
            precision=precision,
            max_steps=1,
            limit_val_batches=0,
            **quiet,
        )
        trainer.fit(module, DataLoader(cast(Any, [batch]), batch_size=None, shuffle=False))
    except _Proved as proved:
        return proved.args[0]
    except (ValueError, MisconfigurationException) as error:
        return error
    return Report(0, 0, size, 0.0, unverified="the run ended without a training step")
