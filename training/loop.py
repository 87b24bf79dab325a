"""The training loop of one rank, from start to end. Ray Train starts it (infra/launch.py).

    build the model -> stretch it, apply the arm, set the pattern -> DeepSpeed engine -> resume ->
    for each step: rows by arithmetic -> loss -> backward -> step -> record -> checkpoint
    -> check and save the result

What all arms share (rows, order, seed, schedule) depends only on the seed and the step number. So
arms differ only in their own choices, and a resumed run is bitwise identical to an uninterrupted
one. Steps are counted from 0 while they run. `progress.step` is the number of steps done, as in
checkpoints and records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longreach.attention.causal import Causal
from longreach.attention.hf import active_pattern, set_pattern
from longreach.attention.pattern import Pattern
from longreach.attention.sink_mass import attention_mass, sink_heads, sink_mass
from longreach.attention.ulysses import part_of, sequence_ranks
from longreach.infra.errors import OutOfMemory, Stopped, Superseded
from longreach.infra.files import digest_of
from longreach.training import cost, export, throughput, zero
from longreach.training.build import build
from longreach.training.checkpoint import Checkpoints
from longreach.training.corpus import PackedRows
from longreach.training.curriculum import in_pieces, stage_of
from longreach.training.exposure import effective_contexts, exact_weights
from longreach.training.long_ce import TokenGains
from longreach.training.longlora import lora_b, trainable_parameters
from longreach.training.loss import TokenLoss, causal_lm, count_targets, weight_of_targets
from longreach.training.positions import skip_positions
from longreach.training.recipe import OptimRecipe, TrainJob
from longreach.training.row_order import RowOrder
from longreach.training.skips import Skips
from longreach.training.steplog import StepLog
from longreach.training.summary import PackSummary, TrainingSummary
from longreach.training.validation import validation_loss, validation_rows

LARGE_EMBEDDING = 0.1
"""Fraction of all parameters above which trained embeddings are worth a note. They are 1.9% of
Llama-2-7B, but 21% of Llama-3.2-1B, whose "small adapter" is then no longer small."""
PROBE_ROWS = 4  # rows at the start of the corpus on which sink mass is measured


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train `job` (a TrainJob's fields). Rank 0 returns the TrainingSummary, other ranks return {}.

    Every rank calls it, after the process group is initialized.

    Raises:
        ValueError: choices contradict each other, the corpus or the base.
        FloatingPointError: too many steps in a row were skipped; names them and their rows.
        Superseded: a newer attempt took over.
        Stopped: training was asked to stop, and wrote a checkpoint.
        OutOfMemory: the message says what would fit.
        RuntimeError: the pattern is not active, or the result is not what was trained.
    """
    choices = TrainJob.model_validate(job)
    try:
        training = Training(choices)
        training.resume()
        while training.progress.step < choices.optim.steps:
            training.run_step()
        return training.finish()
    except RuntimeError as error:  # the base class of torch's OutOfMemoryError
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        seq_len = PackSummary.read(choices.corpus).seq_len
        raise OutOfMemory(cost.what_would_fit(choices.resources, seq_len, str(error))) from error


@dataclass
class Progress:
    """Progress of the training; the same on every rank."""

    step: int  # optimizer steps done so far
    saved: int  # steps done when the newest checkpoint was written or loaded; 0 without one
    validated: dict[int, float]
    """Validation loss by number of steps done, for the steps that may be saved."""
    trained_losses: list[tuple[int, float]]
    """(step, training loss) of the steps that were trained before resuming."""
    notes: list[str]  # checkpoints that were skipped, and why


class Training:
    """One rank's training: the setup, and each step."""

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self.optim = job.optim
        self.world = dist.get_world_size()
        # Ranks that share a row read the same rows, so they form one data rank.
        self.sequence = sequence_ranks(job.resources.sequence_parallel)
        self.data_rank = dist.get_rank() // self.sequence.size
        self.data_ranks = self.world // self.sequence.size
        self.out = Path(job.out)
        torch.manual_seed(job.seed)
        zero.check_nvme(job.resources)
        process_gib = throughput.peak_gib()  # memory before the model exists

        self.rows = PackedRows(job.corpus)
        self.packed = self.rows.summary
        self.weights_C: Tensor | None = None  # loss weights of targets, by effective context; None: all are 1
        if job.arm.objective == "exact":
            self.weights_C = torch.from_numpy(exact_weights(self.rows.context_counts()))
        self.gains: TokenGains | None = None  # long_ce's weights are computed from these
        if job.arm.objective == "long_ce":
            assert job.gains, "gains are an input of the training stage"
            self.gains = TokenGains(job.gains)
        self.held_out = self._held_out_rows()
        self.model, self.tokenizer = build(job, self.packed)
        if dist.get_rank() == 0 and not self._has_trained():
            export.check_saves(self.model, self.tokenizer, Path(job.work) / "untrained")
        self._attend_by(self._pattern_at(0))
        # of the weights in the dtype that the engine rounds them to; otherwise all would seem changed
        self.start_digests = export.tensor_digests(self.model, getattr(torch, job.resources.dtype))
        self.parameters = self.model.num_parameters()
        self.trainable = trainable_parameters(self.model)

        self.peak_rate = job.arm.learning_rate or self.optim.learning_rate
        self.global_batch_rows = self.optim.global_batch_tokens // self.packed.seq_len
        embedding_rate = job.arm.embedding_learning_rate or self.peak_rate
        embeddings = causal_lm(self.model).get_input_embeddings().parameters()
        self.engine = zero.start_engine(
            TokenLoss(self.model),
            self.optim,
            job.resources,
            global_batch_rows=self.global_batch_rows,
            rate_scales=dict.fromkeys(embeddings, embedding_rate / self.peak_rate)
            | dict.fromkeys(lora_b(self.model), job.arm.lora_plus_ratio or 1.0),
        )
        self.engine.train()
        # again, since the engine may have moved the model to a device or dtype that needs another kernel
        self.kernel = set_pattern(self.model, self._pattern_at(0), sequence=self.sequence).kernel
        self.order = RowOrder(len(self.rows), job.seed, self.global_batch_rows)

        self.machine, self.predicted = cost.measure_and_predict(
            job,
            causal_lm(self.model),
            device=self.engine.device,
            parameters=self.parameters - self.trainable.lora,
            seq_len=self.packed.seq_len,
            document=self.rows.mean_document(),
            process_gib=process_gib,
        )

        self.log = StepLog(self.out / "metrics.jsonl", job.spool) if dist.get_rank() == 0 else None
        self.checkpoints = Checkpoints(
            Path(job.work) / "checkpoints",
            identity=digest_of(job.choices()),
            earlier=[Path(work) / "checkpoints" for work in job.earlier],
            share=job.share,
        )
        self.checkpoint_laps: dict[str, float] = {}  # seconds of a checkpoint, for the record of the next step

    def _has_trained(self) -> bool:
        """Return whether this attempt or an earlier one has a checkpoint. If so, saving the model
        was already tried, and a restart need not spend time on it."""
        return any(any(Path(work, "checkpoints").glob("*")) for work in (self.job.work, *self.job.earlier))

    def resume(self) -> None:
        """Start from the newest valid checkpoint of this attempt or an earlier one, else at step
        0."""
        self.progress = self._load_newest()
        self.resumed_from = self.progress.step
        self.skips = Skips(self.optim, self.progress.trained_losses)
        share = self.trainable.embed / self.parameters
        if self.log and share > LARGE_EMBEDDING and self.job.arm.tune != "all":
            self.log.note(
                f"embeddings are {share:.0%} of all parameters and are fully trained: this arm is no small adapter"
            )

    def _load_newest(self) -> Progress:
        """Load the newest valid checkpoint and the record of the steps before it."""
        path, passed_over = self.checkpoints.newest()
        recorded: list[Any] = [{}, []]
        if self.log:
            self.log.restart(path / "metrics.jsonl" if path else None)
            for note in passed_over:
                self.log.note(note)
            recorded = [self.log.validation_losses(), self.log.trained_losses()]
        dist.broadcast_object_list(recorded)  # only rank 0 keeps the record
        step = self.checkpoints.load(self.engine, path) if path else 0
        validated, trained_losses = recorded
        return Progress(step, step, validated, trained_losses, notes=passed_over)

    def run_step(self) -> None:
        """Train one step, or skip it if its loss or gradient is bad; record it; checkpoint if due.

        After too many skipped steps in a row, training returns to its last checkpoint instead.
        """
        step, clock = self.progress.step, throughput.Clock()
        if Path(self.job.superseded_file).exists():
            self.checkpoints.abandon_upload()
            raise Superseded(f"step {step + 1}: a newer attempt took over ({self.job.superseded_file})")
        self._attend_by(self._pattern_at(step))
        batches = self._read_batches(step)
        targets, weight, tokens = self._agree(batches)
        clock.lap("data")

        rate = learning_rate(self.optim, self.peak_rate, step)
        loss, norm, distrust = self._forward_backward(step, batches, weight, rate, clock)
        trained = math.isfinite(norm)
        row = {
            "step": step + 1,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": int(tokens),
            "targets": int(targets),
            "tokens_per_s": tokens / clock.total,
            "seconds": clock.total,
            "phases": clock.laps | self.checkpoint_laps,
            "rows": self.order.rows_of_step(step).tolist(),
            "skipped": not trained,
            **self._measure(step, trained),
            **self._mfu(step, clock.total),
        }
        self.checkpoint_laps = {}
        if self.log:
            self.log.add(row, total=self.optim.steps)

        if trained:
            self.skips.trained(step, loss)
        elif self._skip(step, distrust or f"its gradient norm is {norm}", row):
            self._go_back()
            return
        self.progress.step += 1
        if self._checkpoint_due() and not self.skips.in_a_row:  # never save weights that may be bad
            self.save()

    def _read_batches(self, step: int) -> list[dict[str, Tensor]]:
        """Return this rank's micro-batches of a step. Those of all ranks together do not depend on
        the number of ranks."""
        batches = []
        pieces = stage_of(self.job.arm.curriculum, step)
        place = self.order.first_place(step, self.data_rank, self.data_ranks)
        if self.job.arm.positions is not None:
            repeats = self.order.repeats_of_step(step)
        for row_ids in self.order.for_rank(step, self.data_rank, self.data_ranks, self.job.resources.micro_batch_rows):
            batch = self.rows.batch(row_ids, drop_first=self.job.drops_first)
            places_B = np.arange(place, place + len(row_ids))
            place += len(row_ids)
            if pieces is not None:
                batch = in_pieces(batch, places_B, pieces)
            if self.weights_C is not None:
                batch["weights"] = self.weights_C[effective_contexts(batch["position_ids"])]
            if self.gains is not None:
                batch["weights"] = self.gains.weights(row_ids)
            if self.job.arm.positions is not None:
                repeats_B = repeats[places_B - step * self.global_batch_rows]
                batch = skip_positions(batch, row_ids, repeats_B, self.job.arm.positions, seed=self.job.seed, step=step)
            batches.append(part_of(batch, self.sequence))
        return batches

    def _agree(self, batches: list[dict[str, Tensor]]) -> tuple[float, float, float]:
        """Return (targets, their weight, tokens) of the step over all ranks; save and stop if
        asked.

        The loss is one weighted mean over the targets of the global batch, however they are spread
        over ranks and micro-batches. So every rank needs their total weight before the first
        forward pass.
        """
        own_weight = sum(weight_of_targets(batch) for batch in batches)
        own_targets = sum(count_targets(batch["labels"]) for batch in batches)
        own_tokens = sum(batch["input_ids"].numel() for batch in batches)
        stop_asked = False
        if self.job.stop_file is not None:
            asked_by_driver = self.log is not None and self.log.stop_asked
            stop_asked = asked_by_driver or Path(self.job.stop_file).exists()
        targets, weight, tokens, stop = all_sum(self.engine, [own_targets, own_weight, own_tokens, stop_asked])
        if stop:
            step = self.progress.step
            if step > self.progress.saved and not self.skips.in_a_row:
                self.save()
            resume = "run the same command to resume from there"
            if failed := self.checkpoints.finish_upload():
                resume = f"its checkpoint was not uploaded ({failed}), so the same command resumes from an earlier one"
            raise Stopped(f"stopped after step {step} of {self.optim.steps}: {resume}")
        return targets, weight, tokens

    def _forward_backward(
        self, step: int, batches: list[dict[str, Tensor]], weight: float, rate: float, clock: throughput.Clock
    ) -> tuple[float, float, str]:
        """Accumulate gradients over the micro-batches and update the weights.

        Returns (mean loss over the global batch, gradient norm before clipping, the reason why the
        loss is not trusted or ""). If the norm is not finite, the weights did not change.
        """
        # DeepSpeed averages over ranks, which the factor `world` undoes. Weights may sum to less than
        # 1 (long_ce). Without any target the sum of the loss is 0, so any divisor will do.
        scale = self.world / (weight or 1)
        loss_sum, norm, distrust = 0.0, math.nan, ""
        for micro_step, own_batch in enumerate(batches, start=1):
            batch = {name: tensor.to(self.engine.device) for name, tensor in own_batch.items()}
            loss = self.engine(**batch, scale=scale)
            loss_sum += loss.item() / self.world
            clock.lap("forward")
            if micro_step == len(batches):
                (loss_sum,) = all_sum(self.engine, [loss_sum])
                if distrust := self.skips.distrusts(step, loss_sum):
                    # Accumulated gradients cannot be undone. So make the loss NaN: with NaN
                    # gradients every rank skips the optimizer step, and weights and moments do not
                    # change (zero.step).
                    loss = loss * math.nan
            zero.backward(self.engine, loss)
            clock.lap("backward")
            norm = zero.step(self.engine, rate)
            clock.lap("step")
        return loss_sum, norm, distrust

    def _measure(self, step: int, trained: bool) -> dict[str, Any]:
        """Measure what is due after a step, with the current weights."""
        measured: dict[str, Any] = {}
        if is_due(step, self.job.sink_mass_every, self.optim.steps):
            mass = attention_mass(causal_lm(self.model), self._probe_ids())
            measured |= {"sink_mass": sink_mass(mass), "sink_heads": sink_heads(mass)}
        if is_due(step, self.optim.validate_every_steps, self.optim.steps):
            self._attend_by(Causal())
            own_sum, own_targets = validation_loss(self.engine, self.held_out, self.data_rank, self.data_ranks)
            loss_sum, targets = all_sum(self.engine, [own_sum, own_targets])
            measured["validation_loss"] = loss_sum / targets
            if trained and math.isfinite(loss_sum / targets):  # a skipped step is not saved
                self.progress.validated[step + 1] = loss_sum / targets
        return measured

    def _mfu(self, step: int, seconds: float) -> dict[str, float]:
        """Return the MFU: the step's FLOPs per second and rank over the measured matmul speed. Steps
        with another pattern than the first, or with rows cut by the curriculum, have none: their
        FLOPs were not counted."""
        if self.machine is None or self.predicted is None:
            return {}
        if self._pattern_at(step) != self._pattern_at(0) or stage_of(self.job.arm.curriculum, step):
            return {}
        return {"mfu": self.predicted.flops / seconds / self.world / self.machine.matmul}

    def _skip(self, step: int, why: str, row: dict[str, Any]) -> bool:
        """Record a skipped step; return whether training must return to its last checkpoint."""
        note = f"step {step + 1} skipped: {why}, in rows {row['rows']}"
        if self.log:
            self.log.note(note)
        if not self.skips.skipped(step, why):
            return False
        if self.skips.went_back or not self.progress.saved:
            when = "again after" if self.progress.saved else "no checkpoint for"
            raise FloatingPointError(
                f"{note}; {self.skips.in_a_row} steps in a row, {when} going back: "
                f"lower learning_rate ({row['lr']:g}) or check these rows"
            )
        return True

    def _go_back(self) -> None:
        """Restart from the last checkpoint. Steps known to be bad are then skipped."""
        notes = self.progress.notes
        newest = self._load_newest()
        if not newest.saved:  # weights and optimizer are those of the bad steps
            lost = "; ".join(newest.notes) or "they were removed"
            raise FloatingPointError(
                f"no valid checkpoint to go back to after skipped steps ({lost}): run the same command again, which "
                f"trains from the start"
            )
        self.progress = newest
        self.progress.notes = notes + self.progress.notes
        self.skips.go_back()

    def _checkpoint_due(self) -> bool:
        """Return whether a checkpoint interval was completed since the last checkpoint (if at a skipped
        step, the checkpoint follows at the next trained one), or the weights are the best so far."""
        step, validated = self.progress.step, self.progress.validated
        if self.optim.result == "best" and step in validated and validated[step] == min(validated.values()):
            return True
        every = self.job.resources.checkpoint_every_steps
        return step // every > self.progress.saved // every and step < self.optim.steps

    def save(self) -> None:
        """Write a checkpoint after the steps done so far.

        RuntimeError if this checkpoint and the one before it could not be uploaded. After one failed
        upload, training goes on.
        """
        step, clock = self.progress.step, throughput.Clock()
        failed = self.checkpoints.finish_upload()
        path = self.checkpoints.save(
            self.engine,
            step,
            keep_last=self.job.resources.keep_last,
            best=self._best_steps(),
            attach=[self.out / "metrics.jsonl"],
        )
        if failed:
            self._note_upload(failed)
            if again := self.checkpoints.finish_upload():
                raise RuntimeError(f"two checkpoints in a row were not uploaded: {again}")
        clock.lap("checkpoint")
        self.checkpoint_laps = clock.laps
        self.progress.saved = step
        if self.log:
            self.log.checkpoint(step, self.checkpoints.identity, path)

    def _note_upload(self, failed: str) -> None:
        if self.log:
            self.log.note(f"the checkpoint after step {self.progress.saved} was not uploaded: {failed}")

    def _best_steps(self) -> list[int]:
        """Return the steps with the lowest validation losses, whose checkpoints are kept."""
        if self.optim.result != "best":
            return []
        validated, done = self.progress.validated, self.progress.step
        steps = [step for step in validated if step == done or self.checkpoints.path_of(step).exists()]
        return sorted(steps, key=validated.__getitem__)[: self.job.resources.keep_best]

    def finish(self) -> dict[str, Any]:
        """Check and save the resulting weights and write the summary, which rank 0 returns."""
        if failed := self.checkpoints.finish_upload():
            self._note_upload(failed)
        left_after_step = self.progress.step
        if self.optim.result == "best":
            left_after_step = self._load_best()
        (peak_gib,) = all_sum(self.engine, [throughput.peak_gib()])
        export.save_result(self.model, self.tokenizer, self.out, start=self.start_digests, steps=left_after_step)
        if not self.log:
            return {}
        kinds = []
        for row in self.log.rows:
            step = row["step"] - 1
            kinds.append(f"{self._pattern_at(step)}, {stage_of(self.job.arm.curriculum, step)}")
        summary = TrainingSummary(
            **throughput.summary(self.log.rows, kinds),
            total_parameters=self.parameters,
            trainable=self.trainable,
            machine=self.machine,
            predicted=self.predicted,
            peak_gib=peak_gib,
            ranks=self.world,
            kernel=self.kernel,
            pattern=str(self._pattern_at(0)),
            pattern_at_the_end=str(self._pattern_at(self.optim.steps - 1)),
            resumed_from_step=self.resumed_from,
            left_after_step=left_after_step,
            notes=tuple(self.progress.notes),
            **self.job.choices(),
        )
        summary.write(self.out)
        if self.job.share:
            self.job.share.push(self.out)  # for the node that publishes it
        return summary.to_json()

    def _load_best(self) -> int:
        """Load the weights with the lowest validation loss and return their step."""
        validated = self.progress.validated
        if not validated:
            raise FloatingPointError("result 'best', but no validation loss was finite: lower learning_rate")
        best = min(validated, key=validated.__getitem__)
        if best != self.progress.step:
            self.checkpoints.load(self.engine, self.checkpoints.of_step(best))
        return best

    def _pattern_at(self, step: int) -> Pattern:
        """Return the pattern of a step: the arm's, or at the end the one it anneals to."""
        return self.job.trained_arm.attention.pattern_at(step, self.optim.steps)

    def _attend_by(self, pattern: Pattern) -> None:
        """Make the model use `pattern`. RuntimeError if another one is active afterwards."""
        now = active_pattern(self.model)
        if now is not None and (now.pattern, now.sequence) == (pattern, self.sequence):
            return
        asked = set_pattern(self.model, pattern, sequence=self.sequence)
        if (now := active_pattern(self.model)) != asked:
            raise RuntimeError(f"asked for attention {asked}, but {now} is active")

    def _held_out_rows(self) -> list[dict[str, Tensor]]:
        """Return this rank's part of the validation rows; none if validation is off."""
        if not self.optim.validate_every_steps:
            return []
        rows = validation_rows(Path(self.job.corpus), self.optim.validation_rows, drop_first=self.job.drops_first)
        return [part_of(row, self.sequence) for row in rows]

    def _probe_ids(self) -> Tensor:
        """Return the token ids on which sink mass is measured."""
        first_rows = range(min(PROBE_ROWS, len(self.rows)))
        ids_BT = self.rows.batch(first_rows, drop_first=self.job.drops_first)["input_ids"]
        # one token less than a row for all arms, since arms without a sink token have dropped it
        return ids_BT[:, : self.packed.seq_len - 1].to(self.engine.device)


def is_due(step: int, every: int, steps: int) -> bool:
    """Return whether `step` (from 0) is the first or the last, or completes another `every` steps; 0:
    never."""
    return every > 0 and (step == 0 or (step + 1) % every == 0 or step + 1 == steps)


def learning_rate(optim: OptimRecipe, peak: float, step: int) -> float:
    """Return the learning rate of a step (from 0): warmup, then constant or decaying to its
    minimum."""
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    begin = optim.warmup_steps
    if optim.schedule == "wsd":
        begin = optim.steps - optim.decay_steps
    passed = max(0, step - begin) / max(1, optim.steps - begin)
    falling = optim.min_lr_ratio, 1 - optim.min_lr_ratio
    if optim.schedule in ("linear", "wsd"):
        return peak * (falling[0] + falling[1] * (1 - passed))
    if optim.schedule == "cosine":
        return peak * (falling[0] + falling[1] * ((1 + math.cos(math.pi * passed)) / 2))
    return peak


def all_sum(engine: Any, values: list[float]) -> list[float]:
    """Return each value summed over the ranks, in float64, so that integers up to 2^53 are
    exact."""
    numbers = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(numbers)
    return numbers.tolist()
