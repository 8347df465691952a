"""The README's table of what is supported and what is refused: each of its items is shown by a test.

Items are what stands between semicolons; those that the same tests show may stand together. Who changes the table changes this
list, and adds the test.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.integrations import architectures
from tests.processes import ROOT

FAULTS = "tests/proof/test_faults.py::test_a_fault_is_named_on_every_rank"
TRAINER = "tests/tensor/test_trainer.py::test_training_is_that_of_one_device"
DECODERS = "tests/integrations/test_huggingface.py::test_a_decoder"
OTHER_MODELS = "tests/integrations/test_huggingface.py::test_other_models"
SHOWN = "tests/attention/test_masks.py::test_what_masks_show"
ANY_MASK = "tests/attention/test_any_mask.py::test_output_and_gradients_are_those_of_the_dense_mask"
FOR_ONE_DEVICE = "tests/tensor/test_training.py::test_a_module_for_one_device"
RULES = "tests/tensor/test_rules.py::test_rules"
WAYS = "tests/integrations/test_huggingface.py::test_ways_to_train"
STAGES = "tests/strategy/test_strategy.py::test_fit_validate_test_and_predict_agree_with_one_process"
WHOLE_STAGES = "tests/tensor/test_trainer.py::test_every_stage_and_the_checkpoint_are_those_of_one_device"
PRECISIONS = "tests/strategy/test_strategy.py::test_precisions"
FLOAT64 = "tests/test_parity.py::test_float64"
LAUNCHERS = "tests/strategy/test_launchers.py::test_launchers_train_what_one_process_trains"
SCORES = "tests/attention/test_modifiers.py::test_soft_capping_sinks_biases_and_slopes"
WHOLE_VIEW = "tests/tensor/test_whole_view.py::test_what_is_exact_and_what_is_refused"
VERSIONS = "tests/test_support.py::test_versions_are_those_that_are_installed_with"

SHOWN_BY: dict[str, dict[str, list[str]]] = {
    "versions": {
        "Python 3.10 to 3.13; Lightning 2.6; torch 2.11 and later, see below": [VERSIONS],
    },
    "launchers": {
        'subprocess (`"lss"`, `"lss_fsdp"`)': [LAUNCHERS, "tests/cli/test_launch.py::test_two_ranks_start"],
        '`"lss_spawn"`; `"lss_fork"`': [LAUNCHERS],
        '`"lss_notebook"`': ["tests/strategy/test_strategy.py::test_names_are_registered"],
        "torchrun": [LAUNCHERS, "tests/cli/test_launch.py::test_two_ranks_start"],
        "SLURM": [
            "tests/strategy/test_launchers.py::test_slurm_says_who_a_rank_is_and_must_not_requeue_what_all_ranks_save"
        ],
    },
    "stages": {
        "fit; validate; test; predict; sanity check": [STAGES, WHOLE_STAGES],
        "`overfit_batches`; `fast_dev_run`": ["tests/strategy/test_strategy.py::test_trainer_modes", TRAINER],
    },
    "precision": {
        "32": ["tests/test_parity.py::test_float32", TRAINER],
        "64": [FLOAT64, TRAINER],
        "bf16-mixed; bf16-true; 16-mixed; 16-true": [PRECISIONS, TRAINER],
    },
    "optimization": {
        "automatic and manual": [
            "tests/test_bugs.py::test_manual_optimization_with_two_optimizers",
            "tests/parallel/test_fsdp_manual.py::test_manual_optimization",
            TRAINER,
        ],
        "several optimizers": ["tests/test_bugs.py::test_manual_optimization_with_two_optimizers", TRAINER],
        "accumulation; clipping by norm and value": [FLOAT64, TRAINER],
        "gradient scaler": ["tests/test_bugs.py::test_an_overflow_on_one_rank_skips_the_step_on_all", PRECISIONS],
        "weight averaging (EMA)": ["tests/test_bugs_tables.py::test_weight_averaging_averages_own_rows", TRAINER],
        "parameters that are frozen, unfrozen (`BackboneFinetuning`) or added while training": [
            "tests/parallel/test_trainable.py::test_what_is_trained_may_change",
            TRAINER,
        ],
        "adapters on a frozen model": ["tests/parallel/test_trainable.py::test_what_is_trained_may_change", WAYS],
    },
    "[any LightningModule as it is](https://github.com/lightning-lss/lightning-lss/blob/main/docs/models.md); tested": {
        "`nn.MultiheadAttention`": [RULES],
        "`nn.TransformerEncoder` and `Decoder`; attention from its formula": [FOR_ONE_DEVICE, RULES],
        "positions from `arange` and tables": [FOR_ONE_DEVICE],
        "class tokens": [FOR_ONE_DEVICE, "tests/test_examples.py::test_training_is_that_of_one_device"],
        "pooling; labels shifted in the step": [FOR_ONE_DEVICE],
        "`nn.Conv1d`": [FOR_ONE_DEVICE, "tests/test_examples.py::test_training_is_that_of_one_device"],
        "recurrences; mixtures of experts; rows of unequal length, filled up on either side": [FOR_ONE_DEVICE],
        "sequences of any length (in modules that are shown segments with `pad_values`)": [
            FOR_ONE_DEVICE,
            "tests/strategy/test_padding.py::test_sequences_of_any_length",
        ],
    },
    "Hugging Face; tested": {
        "GPT-2; Llama; Qwen3; Mistral; Gemma 2 and 3; gpt-oss; Mixtral; Qwen3-MoE; Llama 4; DeepSeek-V3": [DECODERS],
        "BERT; ModernBERT; T5; ViT; Whisper's encoder": [OTHER_MODELS],
        "LoRA; both kinds of gradient checkpointing": [WAYS],
    },
    "[masks](https://github.com/lightning-lss/lightning-lss/blob/main/docs/masks.md)": {
        "causal; bidirectional; sliding windows; blocks; prefixes; packed documents; padding; tables": [
            SHOWN,
            ANY_MASK,
        ],
        "functions": [SHOWN, ANY_MASK],
        "their intersections and unions": [ANY_MASK],
        "other ones from batch to batch, row to row and layer to layer": [
            "tests/test_parity.py::test_documents_padding_windows_sinks_and_soft_capping"
        ],
    },
    "attention": {
        "grouped-query heads": ["tests/attention/test_attention.py::test_output_and_gradients_match_one_process"],
        "values of another width than keys": [
            "tests/attention/test_modifiers.py::test_values_of_another_width_than_keys"
        ],
        "cross-attention to a memory that is split or whole": [
            "tests/attention/test_modifiers.py::test_attention_to_a_memory"
        ],
        "dropout": [
            "tests/attention/test_modifiers.py::test_dropout_is_that_of_the_whole_sequence",
            "tests/test_parity.py::test_dropout_of_attention_and_of_elements",
        ],
        "soft-capping": [SCORES],
        "sinks": [SCORES, "tests/test_parity.py::test_documents_padding_windows_sinks_and_soft_capping"],
        "ALiBi and other additive biases (without gradients)": [
            SCORES,
            "tests/attention/test_modifiers.py::test_what_cannot_be_computed_is_refused",
        ],
        "contiguous, zigzag and balanced layouts": [
            FLOAT64,
            "tests/strategy/test_balancing.py::test_training_is_that_of_one_device",
        ],
        "`torch.compile` without a graph break (with dropout: one where the seed of a mask is drawn)": [
            "tests/models/test_compile.py::test_compiled_models_have_no_graph_break_and_the_same_gradients",
            "tests/models/test_compile.py::test_with_dropout_the_graph_breaks_where_a_seed_is_drawn_and_nowhere_else",
        ],
    },
    "memory, of any module": {
        "activation checkpointing: `full`, `offload`, or `selective`, which computes attention once": [
            "tests/strategy/test_memory.py::test_the_training_is_the_same",
            "tests/strategy/test_memory.py::test_selective_runs_the_kernel_of_a_users_block_once",
            FOR_ONE_DEVICE,
        ],
        "MLP in tiles": ["tests/strategy/test_memory.py::test_the_training_is_the_same", TRAINER],
        "loss without logits": [
            "tests/nn/test_loss.py::test_cross_entropy_and_gradients_are_those_of_logits",
            "tests/nn/test_loss.py::test_cross_entropy_never_holds_all_logits",
            TRAINER,
        ],
        "sharded parameters": [
            "tests/parallel/test_fsdp.py::test_users_modules",
            "tests/parallel/test_fsdp.py::test_a_rank_holds_its_share",
            FOR_ONE_DEVICE,
        ],
    },
    "kernels; those of CUDA are not yet measured": {
        "CPU flash": [
            "tests/attention/test_kernels.py::test_on_cpu_flash_is_chosen_for_every_dtype",
            "tests/attention/test_kernels_scores.py::test_any_scores_that_a_kernel_takes",
        ],
        "CUDA flash; CUDA cuDNN": [
            "tests/attention/test_kernels_cuda.py::test_operators_are_given_what_they_rely_on",
            "tests/attention/test_kernels_cuda.py::test_the_operators_take_the_arguments_as_they_are_passed",
        ],
        "memory-efficient (CUDA in float32 and before Ampere)": [
            "tests/attention/test_kernels.py::test_on_cuda_the_choice_follows_dtype_width_and_capability",
            "tests/attention/test_kernels_cuda.py::test_the_efficient_operators_take_the_arguments_as_they_are_passed",
        ],
        "FlexAttention (CUDA, for soft-capping)": [
            "tests/attention/test_kernels_flex.py::test_the_scores_that_it_takes",
            "tests/attention/test_kernels_flex.py::test_soft_capping_on_cuda_does_not_fall_to_the_reference",
        ],
        "a plain reference (any device, float64)": [
            "tests/attention/test_kernels.py::test_any_other_device_gets_the_reference",
            "tests/attention/test_kernels_scores.py::test_any_scores_that_a_kernel_takes",
        ],
    },
    "checkpoints": {
        "one standard Lightning file, or a folder, that knows neither S, D, layout nor sharding": [
            "tests/checkpoint/test_checkpoint.py::test_files_of_all_grids_hold_the_same",
            "tests/checkpoint/test_sharded.py::test_files_are_those_of_one_process",
        ],
        "resume on any number of ranks": [
            "tests/checkpoint/test_checkpoint.py::test_a_checkpoint_of_one_grid_resumes_on_any_other",
            "tests/checkpoint/test_sharded.py::test_a_checkpoint_resumes_on_any_other_grid",
            "tests/checkpoint/test_sharded.py::test_a_checkpoint_without_sharding_resumes_with_it",
        ],
        "`load_from_checkpoint` without a strategy": [
            "tests/checkpoint/test_checkpoint.py::test_load_from_checkpoint_without_a_strategy",
            WHOLE_STAGES,
        ],
    },
    "[proved](#exact-or-refused)": {
        "fit, on the first batch": [FAULTS, "tests/proof/test_sound.py::test_a_sound_module_is_proved"],
        "on the first uneven one": [
            "tests/proof/test_faults.py::test_a_mean_is_refused_at_the_first_batch_whose_segments_count_different_numbers"
        ],
        "whenever what is trained changes": [
            "tests/proof/test_faults.py::test_what_is_unfrozen_is_proved_before_its_first_step"
        ],
        "in any precision and sharding": [
            "tests/proof/test_sound.py::test_in_every_precision",
            "tests/proof/test_faults.py::test_faults_are_found_with_replicas_and_sharded_parameters",
        ],
    },
    "refused, with the remedy": {
        "a step whose gradients are not those of one device": [FAULTS],
        "S that does not divide the devices": [
            "tests/strategy/test_strategy.py::test_a_size_that_does_not_divide_the_world_is_refused_by_the_trainer",
            "tests/sequence/test_layout.py::test_a_size_that_does_not_divide_is_answered_with_those_that_do",
        ],
        "ranks of a group with different batches": [
            "tests/test_bugs.py::test_different_batches_in_a_group_are_refused",
            "tests/strategy/test_batches.py::test_batches_are_compared_in_every_loader_stage_and_run",
        ],
        "`dataloader_iter`": [
            "tests/strategy/test_strategy.py::test_modules_that_cannot_be_split_are_refused_before_any_collective"
        ],
        "masks made from segments or for other sequences": [
            "tests/attention/test_masks.py::test_a_mask_of_a_segment_is_refused_with_the_remedy",
            "tests/strategy/test_balancing.py::test_what_cannot_be_balanced_is_refused_with_the_remedy",
        ],
        "biases that require gradients": ["tests/attention/test_modifiers.py::test_what_cannot_be_computed_is_refused"],
        "parameters unfrozen within a step, on some ranks only, or added after sharding": [
            "tests/parallel/test_trainable.py::test_what_would_be_wrong_is_refused"
        ],
        "parameters that a step does not use, without `find_unused_parameters=True`": [
            "tests/test_bugs.py::test_a_step_whose_gradients_were_not_averaged_is_refused"
        ],
        "weight averaging with sharding": ["tests/parallel/test_fsdp.py::test_runs_that_cannot_be_sharded_are_refused"],
    },
    "refused, with learned positions": {
        "tables that do not fit the sequence": [
            "tests/nn/test_positions.py::test_with_ranks_any_other_length_than_the_tables_is_refused",
            "tests/strategy/test_strategy.py::test_modules_that_cannot_be_split_are_refused_before_any_collective",
        ],
        "the balanced layout": [
            "tests/strategy/test_balancing.py::test_what_cannot_be_balanced_is_refused_with_the_remedy"
        ],
        "ZeRO; post-local SGD": [
            "tests/strategy/test_optimizers.py::test_optimizers_that_copy_parameters_between_ranks_are_refused"
        ],
        "Adafactor": [
            "tests/parallel/test_trainable.py::test_what_would_be_wrong_is_refused",
            "tests/parallel/test_trainable.py::test_mixing_optimizers_may_have_other_parameters",
        ],
        "Muon": ["tests/parallel/test_trainable.py::test_mixing_optimizers_may_have_other_parameters"],
    },
    "refused, in modules that are shown whole sequences": {
        "`torch.autograd.grad`": [WHOLE_VIEW, "tests/tensor/test_whole_view.py::test_functions_that_are_refused"],
        "weights that `nn.MultiheadAttention` returns, once they are used": [WHOLE_VIEW],
        "`out=` arguments": ["tests/tensor/test_whole_view.py::test_functions_that_are_refused"],
        "kernels that read memory by its pointer": [WHOLE_VIEW],
        "arguments of a Hugging Face attention that are not known": [
            "tests/integrations/test_huggingface.py::test_an_unknown_argument_is_refused_by_name"
        ],
    },
    "refused, in modules that are shown segments": {
        "batch normalization without `sync_batchnorm`": [FAULTS],
        "convolutions along the sequence without `SegmentConv1d` or `convert=True`": [
            FAULTS,
            "tests/strategy/test_crossing.py::test_what_cannot_cross_is_refused",
        ],
        "recurrences; other attention; pooling of a segment": [FAULTS],
        "a plain mean over different numbers of targets": [
            FAULTS,
            "tests/proof/test_faults.py::test_a_mean_is_refused_at_the_first_batch_whose_segments_count_different_numbers",
        ],
        'L not divisible by S (2 S for zigzag and `"auto"`) without `pad_values`': [
            "tests/strategy/test_strategy.py::test_lengths_that_cannot_be_split_are_refused_on_every_rank",
            "tests/sequence/test_layout.py::test_a_refused_length_names_length_divisor_and_remedy",
        ],
        "batch entries of different lengths": [
            "tests/strategy/test_strategy.py::test_batches_with_entries_that_are_not_sequences",
            "tests/sequence/test_batch.py::test_disagreement_names_keys_shapes_and_remedies",
        ],
    },
    "not the same as one device": {
        "masks of `nn.Dropout` (use `SegmentDropout`)": [
            "tests/nn/test_dropout.py::test_masks_of_torchs_dropout_are_others_and_so_is_the_order_after_them",
            "tests/tensor/test_trainer.py::test_dropout_is_the_same_however_a_sequence_is_split_and_another_than_on_one_device",
        ],
        "after them, from the second epoch on, the order of a loader that shuffles without a generator of its own": [
            "tests/nn/test_dropout.py::test_masks_of_torchs_dropout_are_others_and_so_is_the_order_after_them"
        ],
        (
            "with several data replicas the masks of `SegmentDropout` and of attention dropout (each"
            " replica draws its own, as under DDP)"
        ): [
            "tests/nn/test_dropout.py::test_each_replica_draws_its_own_masks",
            "tests/nn/test_dropout.py::test_replicas_train_as_without_splitting",
        ],
        "other optimizers that mix rows of a parameter (LAMB) on learned positions": [
            "tests/strategy/test_optimizers.py::test_an_optimizer_that_mixes_rows_is_not_that_of_one_device_on_learned_positions"
        ],
    },
    "not proved": {
        "modules that cannot run alone on one device (one line warns)": [
            "tests/proof/test_faults.py::test_what_cannot_run_on_one_device_is_said_and_trained"
        ],
        "`verify=False` (a line names recurrent layers and convolutions, if any)": [
            "tests/proof/test_faults.py::test_a_run_without_a_proof_names_recurrences_and_convolutions"
        ],
        "what the proof [cannot see](#exact-or-refused)": [
            "tests/proof/test_faults.py::test_what_the_proof_cannot_see_is_what_the_readme_says"
        ],
    },
    "not supported": {
        "`pytorch_lightning` (import from `lightning`)": [
            "tests/strategy/test_strategy.py::test_pytorch_lightning_is_refused"
        ],
        "double backward through attention": ["tests/attention/test_attention.py::test_second_derivatives_are_refused"],
        (
            "SLURM's auto-requeue where all ranks save: learned positions, sharded parameters, folders"
            " (`SLURMEnvironment(auto_requeue=False)`)"
        ): ["tests/strategy/test_launchers.py::test_slurm_says_who_a_rank_is_and_must_not_requeue_what_all_ranks_save"],
        "`example_input_array` (ignored, with a warning)": [
            "tests/test_bugs_tables.py::test_one_model_under_several_trainers"
        ],
    },
}

NOT_HERE = {
    "Python 3.10 to 3.13": "Tests run on the Python that there is; here is compared what pip accepts.",
    "Lightning 2.6": "Tests run on the Lightning that there is; here is compared what pip accepts.",
    "torch 2.11 and later, see below": "Tests run on the torch that there is; below the table stands what ran on others.",
    "CUDA flash": "Runs on a GPU: tests/attention/test_gpu_kernels.py. Here what it is given is compared with torch's signature.",
    "CUDA cuDNN": "Runs on a GPU: tests/attention/test_gpu_kernels.py. Here what it is given is compared with torch's signature.",
    "memory-efficient (CUDA in float32 and before Ampere)": "Runs on a GPU: tests/attention/test_gpu_kernels.py.",
    "FlexAttention (CUDA, for soft-capping)": "On a GPU in tests/attention/test_gpu_kernels.py; here its forward pass on the CPU.",
    "batch normalization without `sync_batchnorm`": "With it torch needs a GPU; here is the refusal without.",
}
"""Items of which the tests show a part only, and why."""

HUGGING_FACE = {
    "GPT-2": ["gpt2"],
    "Llama": ["llama"],
    "Qwen3": ["qwen3"],
    "Mistral": ["mistral"],
    "Gemma 2 and 3": ["gemma2", "gemma3"],
    "gpt-oss": ["gpt_oss"],
    "Mixtral": ["mixtral"],
    "Qwen3-MoE": ["qwen3_moe"],
    "Llama 4": ["llama4"],
    "DeepSeek-V3": ["deepseek_v3"],
    "BERT": ["bert", "bert_classifier"],
    "ModernBERT": ["modernbert"],
    "T5": ["t5"],
    "ViT": ["vit"],
    "Whisper's encoder": ["whisper"],
}
"""As documents call them: architectures of tests/integrations/architectures.py."""


def table() -> dict[str, str]:
    """The rows of the README's table."""
    text = (ROOT / "README.md").read_text().partition("## What is supported, what is refused\n")[2]
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", text.partition("\n## ")[0], re.MULTILINE)
    return dict(rows)


def functions(path: Path) -> Iterator[str]:
    """Names of a module's test functions; those of classes follow their class."""
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        yield from (prefix + x.name for x in inner or [node] if isinstance(x, ast.FunctionDef))


def test_every_item_of_the_table_is_listed_and_no_other() -> None:
    assert table() == {row: "; ".join(items) for row, items in SHOWN_BY.items()}
    assert NOT_HERE.keys() <= {item for items in table().values() for item in items.split("; ")}
    assert all(NOT_HERE.values())


def test_every_item_is_shown_by_tests_that_exist() -> None:
    for items in SHOWN_BY.values():
        for item, tests in items.items():
            assert tests, item
            for path, _, name in (test.partition("::") for test in tests):
                assert name.rpartition("::")[2].startswith("test_"), f"{item}: {name}"
                assert name in functions(ROOT / path), f"{item}: {path} has no {name}"


def test_versions_are_those_that_are_installed_with() -> None:
    """The bounds of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    minors = re.findall(r"Programming Language :: Python :: 3\.(\d+)", text)
    assert minors == [str(x) for x in range(int(minors[0]), int(minors[-1]) + 1)]
    (torch,) = re.findall(r'"torch>=([\d.]+),<3"', text)
    ((first, last),) = re.findall(r'"lightning>=(2\.\d+),<2\.(\d+)"', text)
    assert int(last) == int(first[2:]) + 1  # one release
    found = [f"Python 3.{minors[0]} to 3.{minors[-1]}", f"Lightning {first}", f"torch {torch} and later, see below"]
    assert "; ".join(found) == table()["versions"]
    assert f'requires-python = ">=3.{minors[0]}"' in text


def test_models_of_hugging_face_are_the_tested_ones_in_all_documents() -> None:
    tested = [name for names in HUGGING_FACE.values() for name in names]
    assert tested == [*architectures.DECODERS, *architectures.OTHERS]
    assert table()["Hugging Face; tested"].startswith("; ".join(HUGGING_FACE) + "; LoRA")
    *names, last = HUGGING_FACE
    listed = f"Tested: {', '.join(names)} and {last};"
    assert listed in " ".join((ROOT / "docs/models.md").read_text().split())
