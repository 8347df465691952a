"""Time training steps of models as they are, against our own transformer of the same sizes."""

import statistics
import time
from argparse import Namespace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.clock import StepClock
from benchmarks.commands import make_job
from benchmarks.contestants import CONTESTANTS
from benchmarks.steps import Row
from benchmarks.training import Job, fit, make_trainer
from benchmarks.turns import in_turn, median_ratio, start_ranks
from lightning_lss.testing.world import World


class FineTuned(pl.LightningModule):
    """A Hugging Face Llama with the sizes of a job."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = job.config
        torch.manual_seed(7)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=sizes.vocab_size,
                hidden_size=sizes.width,
                intermediate_size=sizes.hidden_width,
                num_hidden_layers=sizes.num_layers,
                num_attention_heads=sizes.num_heads,
                num_key_value_heads=sizes.kv_heads,
                max_position_embeddings=job.length,
                tie_word_embeddings=sizes.tie_embeddings,
            )
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the model's own loss."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def time_model(rank: int, name: str, size: int, job: Job) -> tuple[float, float]:
    """Train on this rank; return the median seconds of a step, and the processor's of all of them."""
    clock = StepClock()
    before = time.process_time()
    if name == "lss":
        fit("lss", size, job, clock)
    else:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(job.model["vocab_size"], (job.length,), generator=generator)
        loader: DataLoader[Any] = DataLoader([{"input_ids": tokens, "labels": tokens}] * job.steps, batch_size=1)
        make_trainer(CONTESTANTS["lss"], size, job, [clock]).fit(FineTuned(job), loader)
    return statistics.median(clock.seconds_between_ends[job.warm_up - 1 :]), time.process_time() - before


def run(args: Namespace) -> list[Row]:
    """Time training steps of a Hugging Face Llama as it is, against our own transformer of the same sizes."""
    job = make_job(args, args.length).with_model(mlp="swiglu", positions="rotary")
    rows = []
    with start_ranks(max(args.ranks)) as world:
        for size in args.ranks:
            runs = {name: partial(_slowest, world, name, size, job) for name in ("lss", "huggingface")}
            found = in_turn(runs, args.rounds, warm_up=0)
            for name, turns in found.items():
                seconds, processor = ([turn[i] for turn in turns] for i in (0, 1))
                own_seconds, own_processor = ([turn[i] for turn in found["lss"]] for i in (0, 1))
                rows.append(
                    {
                        "contestant": name,
                        "ranks": size,
                        "length": job.length,
                        "width": job.config.width,
                        "layers": job.config.num_layers,
                        "heads": job.config.num_heads,
                        "rounds": args.rounds,
                        "steps_a_round": job.steps - job.warm_up,
                        "seconds": round(statistics.median(seconds), 5),
                        "seconds_against_lss": round(median_ratio(seconds, own_seconds), 4),
                        "processor_seconds_against_lss": round(median_ratio(processor, own_processor), 4),
                    }
                )
    return rows


def _slowest(world: World, name: str, size: int, job: Job) -> tuple[float, float]:
    answers = world.run(size, time_model, name, size, job)
    return max(seconds for seconds, _ in answers), max(processor for _, processor in answers)
