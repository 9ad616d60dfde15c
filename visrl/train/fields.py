"""Every field of `transformers.TrainingArguments`, in one table: what it may hold, and whether it is honoured here.

A field of `TrainerFields` goes to `transformers.Trainer` as it is. One with `_only` may only say what is so anyway:
`visrl train` does that part itself, and the sentence says what to write instead. Imports no torch, so that a typo is
refused at once; a test holds the table against the installed release.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from visrl.config import Config

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# YAML reads the word `no` as false.
Strategy = Annotated[
    Literal["no", "steps", "epoch", "best"], BeforeValidator(lambda value: "no" if value is False else value)
]


def _steps_or_all(value: int) -> int:
    if value == 0 or value < -1:
        raise ValueError("nothing would be trained; give a number of steps, or leave the key out for whole epochs")
    return value


def _only(value: Any, why: str) -> AfterValidator:
    """Refuses everything but `value`, and says why."""

    def check(given: Any) -> Any:
        if given not in (None, value):
            raise ValueError(why)
        return given

    return AfterValidator(check)


def _by_images(value: str) -> str:
    if value not in ("random", "sequential"):
        raise ValueError(BATCHES)
    return value


HUB = "nothing is uploaded; when the training is done, send the folder with `hf upload`"
EVALUATION = "validation is visrl's own: every item is computed whole and its losses averaged; leave the key out"
COMPILED = "items are packed to ever other shapes, and a compiled forward would be compiled anew; leave the key out"
LIGER = "log-probabilities are computed per token by visrl itself, which Liger's kernels know nothing of; leave it out"
NOISE = "the noise is scaled by a sequence's length, and items are packed; leave the key out"
ACCELERATE = "configure accelerate by its own file: accelerate launch --config_file … -m visrl.cli train …"
COLUMNS = "rows are read by visrl and no column of theirs goes to the model; leave the key out, or false"
BATCHES = "what shares a batch is decided by pictures, so that each is encoded once; leave the key out"
DEVICES = "the loss is always averaged over all processes; leave the key out"


class TrainerFields(Config):
    """The fields of `transformers.TrainingArguments`; one that is not given, or null, has transformers' default."""

    # How long, and how fast
    num_train_epochs: Positive | None = None
    max_steps: Annotated[int, AfterValidator(_steps_or_all)] | None = None
    per_device_train_batch_size: Count | None = None
    gradient_accumulation_steps: Count | None = None
    learning_rate: Positive | None = None
    lr_scheduler_type: str | None = None
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    warmup_steps: NotNegative | None = None
    optim: str | None = None
    optim_args: str | None = None
    optim_target_modules: str | list[str] | None = None
    weight_decay: NotNegative | None = None
    adam_beta1: Share | None = None
    adam_beta2: Share | None = None
    adam_epsilon: Positive | None = None
    max_grad_norm: NotNegative | None = None
    average_tokens_across_devices: Annotated[bool, _only(True, DEVICES)] | None = None
    label_smoothing_factor: (
        Annotated[float, _only(0, "no loss here is smoothed by it; dpo_label_smoothing is for preferences")] | None
    ) = None
    neftune_noise_alpha: Annotated[float, _only(0, NOISE)] | None = None

    # Numbers, memory and kernels
    bf16: bool | None = None
    fp16: bool | None = None
    tf32: bool | None = None
    bf16_full_eval: Annotated[bool, _only(False, EVALUATION)] | None = None
    fp16_full_eval: Annotated[bool, _only(False, EVALUATION)] | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None
    gradient_checkpointing: bool | None = None
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = None
    torch_compile: Annotated[bool, _only(False, COMPILED)] | None = None
    torch_compile_backend: Annotated[str, _only(None, COMPILED)] | None = None
    torch_compile_mode: Annotated[str, _only(None, COMPILED)] | None = None
    use_liger_kernel: Annotated[bool, _only(False, LIGER)] | None = None
    liger_kernel_config: Annotated[dict[str, Any], _only(None, LIGER)] | None = None
    use_cache: Annotated[bool, _only(False, "training keeps no keys and values; leave the key out")] | None = None
    torch_empty_cache_steps: Count | None = None
    auto_find_batch_size: (
        Annotated[bool, _only(False, "`visrl train --dry-run` measures what a batch takes; leave the key out")] | None
    ) = None
    use_cpu: bool | None = None
    full_determinism: bool | None = None
    seed: Seed | None = None
    data_seed: Annotated[Seed, _only(None, "the order of items follows from seed alone; set that")] | None = None
    skip_memory_metrics: bool | None = None
    debug: Annotated[str | list[str], _only("", "no debugger of transformers is attached; leave it out")] | None = None

    # What is said
    logging_strategy: Strategy | None = None
    logging_steps: Positive | None = None
    logging_first_step: bool | None = None
    log_on_each_node: bool | None = None
    logging_nan_inf_filter: bool | None = None
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] | None = None
    log_level_replica: Literal["debug", "info", "warning", "error", "critical", "passive"] | None = None
    disable_tqdm: bool | None = None
    report_to: str | list[str] | None = None
    run_name: str | None = None
    project: str | None = None
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: str | Literal[False] | None = None
    include_num_input_tokens_seen: (
        Annotated[str | bool, _only(False, "tokens are counted once each by `visrl train --dry-run`; leave it out")]
        | None
    ) = None

    # Validation
    do_eval: bool | None = None
    do_predict: Annotated[bool, _only(False, "predictions are made by `visrl eval`; leave it out")] | None = None
    eval_strategy: Strategy | None = None
    eval_steps: Positive | None = None
    eval_delay: NotNegative | None = None
    eval_on_start: bool | None = None
    per_device_eval_batch_size: Count | None = None
    prediction_loss_only: Annotated[bool, _only(False, EVALUATION)] | None = None
    eval_do_concat_batches: Annotated[bool, _only(True, EVALUATION)] | None = None
    eval_use_gather_object: Annotated[bool, _only(False, EVALUATION)] | None = None
    eval_accumulation_steps: Annotated[int, _only(None, EVALUATION)] | None = None
    include_for_metrics: Annotated[list[str], _only([], EVALUATION)] | None = None
    batch_eval_metrics: Annotated[bool, _only(False, EVALUATION)] | None = None
    load_best_model_at_end: bool | None = None
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None

    # Checkpoints
    save_strategy: Strategy | None = None
    save_steps: Positive | None = None
    save_total_limit: Count | None = None
    save_on_each_node: bool | None = None
    save_only_model: (
        Annotated[bool, _only(False, "checkpoints are there to go on from, which weights alone cannot; leave it out")]
        | None
    ) = None
    enable_jit_checkpoint: (
        Annotated[bool, _only(False, "a stopped training goes on at its last checkpoint; set save_steps")] | None
    ) = None
    resume_from_checkpoint: bool | str | None = None
    ignore_data_skip: bool | None = None
    restore_callback_states_from_checkpoint: (
        Annotated[bool, _only(False, "no callback here has a state; leave it out")] | None
    ) = None
    push_to_hub: Annotated[bool, _only(False, HUB)] | None = None
    hub_model_id: Annotated[str, _only(None, HUB)] | None = None
    hub_token: Annotated[str, _only(None, HUB)] | None = None
    hub_strategy: Annotated[str, _only("every_save", HUB)] | None = None
    hub_private_repo: Annotated[bool, _only(None, HUB)] | None = None
    hub_always_push: Annotated[bool, _only(False, HUB)] | None = None
    hub_revision: Annotated[str, _only(None, HUB)] | None = None

    # Batches
    dataloader_drop_last: bool | None = None
    dataloader_num_workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    dataloader_pin_memory: bool | None = None
    dataloader_persistent_workers: bool | None = None
    dataloader_prefetch_factor: Count | None = None
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    dataloader_in_order: bool | None = None
    remove_unused_columns: Annotated[bool, _only(False, COLUMNS)] | None = None
    label_names: Annotated[list[str], _only(None, COLUMNS)] | None = None
    train_sampling_strategy: (
        Annotated[Literal["random", "sequential", "group_by_length", "batch_rebalance"], AfterValidator(_by_images)]
        | None
    ) = None
    length_column_name: Annotated[str, _only("length", BATCHES)] | None = None

    # Several processes
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: Count | None = None
    ddp_broadcast_buffers: bool | None = None
    ddp_static_graph: bool | None = None
    ddp_backend: Literal["nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"] | None = None
    ddp_timeout: Annotated[int, Field(ge=1, le=10**9)] | None = None
    fsdp: str | bool | None = None
    fsdp_config: dict[str, Any] | str | None = None
    deepspeed: dict[str, Any] | str | None = None
    accelerator_config: Annotated[dict[str, Any] | str, _only(None, ACCELERATE)] | None = None
    parallelism_config: Annotated[dict[str, Any], _only(None, ACCELERATE)] | None = None
    local_rank: Annotated[int, _only(-1, "torchrun and accelerate say it by LOCAL_RANK; leave it out")] | None = None

    def trainer_values(self) -> dict[str, Any]:
        """The fields that are given, ours (`remove_unused_columns`, `resume_from_checkpoint`) left out."""
        given = {name: getattr(self, name) for name in TrainerFields.model_fields}
        ours = ("remove_unused_columns", "resume_from_checkpoint")
        return {name: value for name, value in given.items() if value is not None and name not in ours}
