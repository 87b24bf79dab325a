"""Resources: where and how fast a stage runs.

Nothing here may change a result beyond rounding, so nothing here is part of a fingerprint: with the
same recipe, another machine finds the artifacts that are already published.
"""

from typing import Literal

from pydantic import Field, model_validator

from longreach.infra.choices import Choices

STAGE_RETRIES = 2
"""How often Ray retries a stage whose worker process died.

This is the last of three retry budgets, which multiply. (1) Ray Train restarts all ranks after one
has died, up to `max_failures` times in one `fit()`. (2) `run_ranks` calls `fit()` again, up to
`max_failures` times, if Ray Train gave up because a rank died while it was being started. (3) Ray
runs the whole stage again, as a new attempt, up to STAGE_RETRIES times. So the ranks of a stage are
started at most (max_failures + 1) ** 2 * (STAGE_RETRIES + 1) times, 27 by default. Each start resumes
from the newest checkpoint. An error that a retry would only repeat ends the run at once
(infra/launch.py).
"""


class Resources(Choices):
    """What training ranks and evaluation tasks may use."""

    workers: int = Field(default=2, ge=1)
    """Number of training ranks (Ray Train workers); each is one DeepSpeed rank."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores and torch threads per rank."""
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """1: NCCL and CUDA, with one GPU per rank; 0: gloo and CPU."""
    micro_batch_rows: int = Field(default=1, ge=1)
    """Rows per forward pass of one rank; gradient accumulation makes up the global batch."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage, which sets what is sharded over the ranks."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer state is kept: on the rank's device, in host memory, or on a disk
    (zero_stage 3, and DeepSpeed's async_io, which needs libaio's headers and a compiler)."""
    offload_parameters: bool = False
    """Keep the weights in host memory too (with offload nvme: on the disk), and move them to the device
    layer by layer (zero_stage 3)."""
    nvme_path: str | None = None
    """Folder on a fast local disk, with the same path on every node; required by offload nvme."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Number of neighbouring ranks that share each row, for rows too long for one rank
    (DeepSpeed-Ulysses). It must divide workers, pack.seq_len and the model's query heads and
    key/value heads."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of training. On CPUs without AMX, float32 is faster."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products, in torch's terms: `high` lets a GPU use TensorFloat-32;
    `medium` lets a CPU round both factors to bfloat16 and sum in float32. On a CPU that multiplies
    bfloat16 itself (`amx_bf16` or `avx512_bf16` in /proc/cpuinfo), `medium` is faster, for LongLoRA
    less than for full fine-tuning (RESULTS.md)."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass, which saves memory and takes about a
    third more time."""
    eval_cpus: int = Field(default=1, ge=1)
    """CPU cores (torch threads) per evaluation task. As many tasks run in parallel as the cores allow."""
    eval_workers: int = Field(default=1, ge=1)
    """Number of Ray tasks that share the cells of one evaluation. Each has eval_cpus cores and its own
    copy of the model."""
    # The first two of the three retry budgets that STAGE_RETRIES explains.
    max_failures: int = Field(default=2, ge=0)
    """How often Ray Train restarts a stage's ranks after one of them died."""
    checkpoint_every_steps: int = Field(default=50, ge=1)
    """Optimizer steps between checkpoints, which is the most work that a crash can lose; if nodes share
    no disk, also the steps trained during an upload."""
    keep_last: int = Field(default=2, ge=1)
    """Number of newest checkpoints that an attempt keeps while it runs."""
    keep_best: int = Field(default=1, ge=1)
    """Number of checkpoints with the lowest validation loss that are kept as well, if the section's
    result is best."""

    @model_validator(mode="after")
    def _sequence(self) -> "Resources":
        if self.workers % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel} does not divide workers {self.workers}: change one of them"
            )
        return self

    @model_validator(mode="after")
    def _offload(self) -> "Resources":
        needed = 0
        if self.offload == "nvme" or self.offload_parameters:
            needed = 3
        elif self.offload == "cpu":
            needed = 1
        if self.zero_stage < needed:
            field = f"offload {self.offload}" if self.offload != "none" else "offload_parameters"
            raise ValueError(f"{field} needs zero_stage {needed}{' or more' * (needed < 3)}; it is {self.zero_stage}")
        if (self.offload == "nvme") != (self.nvme_path is not None):
            raise ValueError(f"offload {self.offload} with nvme_path {self.nvme_path}: set both, or neither")
        return self

    def prepare_torch(self, threads: int) -> None:
        """Set this process's torch threads and matmul precision, whatever an earlier task in the same
        process has set."""
        import torch

        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(self.matmul_precision)

    def accumulation(self, global_batch_rows: int, ranks: int) -> int:
        """Return the number of gradient accumulation steps for a global batch on `ranks` ranks.

        Raises:
            ValueError: the rows do not divide evenly.
        """
        at_once = self.rows_at_once(ranks)
        if global_batch_rows % at_once:
            raise ValueError(
                f"a global batch of {global_batch_rows} rows is not divisible by {ranks // self.sequence_parallel} "
                f"ranks x micro_batch_rows {self.micro_batch_rows}: change workers or micro_batch_rows so that their "
                "product divides it, or change global_batch_tokens"
            )
        return global_batch_rows // at_once

    def rows_at_once(self, ranks: int) -> int:
        """Return the number of rows in one forward pass of all ranks. Ranks that share a row count as
        one."""
        return ranks // self.sequence_parallel * self.micro_batch_rows

    def check_row(self, tokens: int) -> None:
        """Raise ValueError if ranks that share a row cannot have equal parts of it."""
        if tokens % self.sequence_parallel:
            raise ValueError(
                f"{tokens} is not divisible by resources.sequence_parallel {self.sequence_parallel}: change one of them"
            )
