"""The training loop."""

import io
import math
import time
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from .batching import share
from .budget import Budget, learning_rate
from .checkpoint import Checkpoints
from .config import Config
from .data import (
    TrainingSet,
    held_out_batches,
    load,
    make_batches,
    make_source,
    training_normalisation,
)
from .decoding import count_errors
from .errors import ExampleError
from .folder import open_folder, write_whole
from .log import Log
from .memory import LargestBatch, peak_bytes, readable, used_bytes
from .model import Transducer, encoder_lengths
from .parallel import World, by_kind, clip_gradients, divide, join_world, whole_weights

# Names parameters in the optimizer's state, so that it may be divided differently when loaded.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


class Run:
    """One training run: model, optimizer, what was measured, and where it is written.

    Nothing that draws has a state: data and augmentation are functions of seed and index, dropout
    is one of seed, step and process. So weights, optimizer and the step are all of a checkpoint
    (`state_dict`), and a run continues with the numbers that it would have had.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.budget = Budget(config.steps, config.seconds, agree=world.agree)
        self.step = 0
        self.warmup_steps = min(config.warmup_steps, (config.steps or 10**9) // 10)
        self.wer = float("nan")

        open_folder(config, world)
        source = make_source(config, world)
        self.vocabulary = source.vocabulary
        self.normalisation = training_normalisation(source)
        self.held_out = held_out_batches(source, self.normalisation, config, world)

        # Else compiled code adds up the embedding's gradient in whatever order threads come.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.manual_seed(config.seed)
        model = Transducer(config, self.vocabulary.size).to(world.device)
        self.evaluated = Transducer(config, self.vocabulary.size).to(world.device).eval()
        self.model = divide(model, world, config.compile)
        self.parameters = by_kind(list(self.model.parameters()))
        self.optimizer = torch.optim.AdamW(
            [{"params": kind} for kind in self.parameters],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.records = 0
        self.checkpoints = Checkpoints(config.out / "checkpoints", world)
        if config.resume and (saved := self.checkpoints.all()):
            self.checkpoints.load(saved[-1], self)
            world.print(f"resumed at step {self.step}")
        self.log = Log(config.out, self.records) if world.rank == 0 else None

        batches = islice(make_batches(source, config), self.step, None)
        shares = (share(batch, world.part, world.parts) for batch in batches)
        dataset = TrainingSet(source, self.normalisation, config)
        self.training = load(dataset, shares, world.device)
        self.largest = LargestBatch(config, self.vocabulary.size)
        self.memory_before = peak_bytes(world.device)

    def train_step(self, progress: float, window: "Window") -> None:
        """One optimizer step on the next batch."""
        config = self.config
        share, batch = next(self.training)
        self.largest.add(encoder_lengths(batch.feature_lengths), batch.target_lengths)
        rate = learning_rate(config.learning_rate, self.step, self.warmup_steps, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed = np.random.SeedSequence((config.seed, self.step, self.world.part))
        torch.manual_seed(int(seed.generate_state(1)[0]))
        bfloat16 = config.dtype == "bfloat16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bfloat16):
            loss = share.weight * self.model(*batch)
        torch.autograd.backward(loss)
        norm = clip_gradients(self.parameters, config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        window.add(loss.detach(), norm, rate, share.total)

    def evaluate(self) -> None:
        """Word error rate on held-out data; also writes model.pt and training.png.

        Decoding takes as many steps as there are words, which differ between the processes: each
        decodes its share with weights of its own, gathered beforehand.
        """
        start = self.budget.elapsed
        self.evaluated.load_state_dict(whole_weights(self.model))
        counts = count_errors(self.evaluated, self.vocabulary, self.held_out)
        errors, words = self.world.mean(torch.tensor(counts, dtype=torch.float64)).tolist()
        self.wer = errors / words
        self.record(wer=self.wer)
        if self.log is not None:
            self._write_model()
            self.log.plot()
        self.budget.reserved_seconds = 2 * (self.budget.elapsed - start)

    def record(self, **values: float) -> None:
        """Add a line to metrics.jsonl."""
        self.records += 1
        if self.log is not None:
            self.log.add(self.step, self.budget.elapsed, values)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=BY_NAME),
            "step": self.step,
            "seconds": self.budget.elapsed,
            "records": self.records,
            "wer": self.wer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=BY_NAME)
        self.step = state["step"]
        self.budget.earlier_seconds = state["seconds"]
        self.records, self.wer = state["records"], state["wer"]

    def _write_model(self) -> None:
        content = io.BytesIO()
        torch.save(
            {
                "model": self.evaluated.state_dict(),
                "feature_mean": torch.from_numpy(self.normalisation.mean),
                "feature_std": torch.from_numpy(self.normalisation.std),
            },
            content,
        )
        write_whole(self.config.out / "model.pt", content.getvalue())


def train(config: Config) -> float:
    """Train, evaluate and write everything to `config.out`. Returns the last word error rate."""
    with join_world(config.parallel, config.device) as world:
        return _run(config, world)


def _run(config: Config, world: World) -> float:
    # A DistributedDataParallel that outlives the group may hang where it is freed: it joins Gloo's
    # threads, which may wait for the interpreter's lock. This frame frees it in time.
    run = Run(config, world)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    world.print(
        f"{parameters / 1e6:.1f} M parameters, {run.vocabulary.size} labels on {world.device}"
        + (f", {world.size} processes ({world.parallel})" if world.size > 1 else "")
    )
    first_step = run.step
    _loop(run)
    steps = run.step - first_step
    if config.compile and steps:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        world.print(f"compiled {graphs} graph{'s' if graphs != 1 else ''} in {steps} steps")
    world.print(
        f"held-out word error rate {run.wer:.1%} after {run.step} steps, {run.budget.elapsed:.0f} s"
    )
    if steps:
        world.print(run.largest.summary(run.memory_before, peak_bytes(world.device)))
    return run.wer


def _loop(run: Run) -> None:
    config, world = run.config, run.world
    bar_format = "{percentage:3.0f}%|{bar:20}| {elapsed}{postfix}"
    with tqdm(total=1.0, bar_format=bar_format, disable=world.rank > 0) as bar:
        bar.set_postfix_str("compiling" if config.compile else "")
        window = Window()
        progress = run.budget.progress(run.step)
        while progress < 1.0:
            run.train_step(progress, window)
            before, progress = progress, run.budget.progress(run.step)
            evaluation = int(progress * config.evaluations) > int(before * config.evaluations)
            checkpoint = run.step % config.checkpoint_every == 0
            if evaluation or checkpoint or window.steps == config.log_every:
                run.record(**window.measure(world), memory_bytes=used_bytes(world.device))
                # A model in warm-up says as much as it may: slow to decode, and no news.
                if evaluation and (run.step >= run.warmup_steps or progress == 1.0):
                    run.evaluate()
                    progress = run.budget.progress(run.step)
                if checkpoint or progress == 1.0:
                    run.checkpoints.save(run.step, run)
                window = Window()
            bar.update(progress - bar.n)
            if run.log is not None:
                bar.set_postfix_str(_status(run.log.records, run.step, run.wer))


class Window:
    """What training measured since the last line of metrics.jsonl."""

    def __init__(self) -> None:
        self.steps = self._utterances = 0
        self._rate = 0.0
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._start = time.monotonic()

    def add(self, loss: Tensor, norm: Tensor, rate: float, utterances: int) -> None:
        """Take a step into account; its tensors stay on their device, which need not wait."""
        self.steps += 1
        self._utterances += utterances
        self._rate = rate
        self._losses.append(loss)
        self._norms.append(norm)

    def measure(self, world: World) -> dict[str, float]:
        """Mean loss over steps and processes, gradient norm, learning rate and speed."""
        loss = float(world.mean(torch.stack(self._losses).mean()))
        norm = float(torch.stack(self._norms).mean())
        if not math.isfinite(loss + norm):
            # Before a checkpoint: those that there are stay good.
            raise ExampleError(f"loss {loss}, gradient norm {norm}: try a lower --learning-rate")
        return {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": self._rate,
            "utterances_per_second": self._utterances / (time.monotonic() - self._start),
        }


def _status(records: list[dict[str, Any]], step: int, wer: float) -> str:
    last: dict[str, Any] = next((r for r in reversed(records) if "loss" in r), {})
    if not last:
        return f"step {step}"
    return (
        f"step {step}, loss {last['loss']:.2f}, {last['utterances_per_second']:.0f} utt/s, "
        f"{readable(last['memory_bytes'])}" + ("" if math.isnan(wer) else f", WER {wer:.1%}")
    )
