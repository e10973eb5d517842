"""The training loop."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .budget import Budget, learning_rate
from .config import Config
from .data import (
    Batch,
    TrainingSet,
    make_source,
    test_batches,
    training_batches,
    training_normalisation,
)
from .decoding import word_error_rate
from .errors import ExampleError
from .memory import LargestBatch, peak_bytes, readable, used_bytes
from .model import Transducer, encoder_lengths
from .plot import plot_training

LossFunction = Callable[[Batch], Tensor]


def make_loss_function(model: Transducer, config: Config) -> LossFunction:
    """The differentiable loss of a batch, compiled as one graph with dynamic lengths.

    Its backward is compiled with it: differentiating the loss runs the graph that AOTAutograd
    derived.
    """
    device_type = next(model.parameters()).device.type

    def forward(*batch: Tensor) -> Tensor:
        autocast = torch.autocast(device_type, torch.bfloat16, enabled=config.dtype == "bfloat16")
        with autocast:
            loss: Tensor = model(*batch)
        return loss

    if not config.compile:
        return lambda batch: forward(*batch)
    compiled = torch.compile(forward, fullgraph=True)

    def loss_function(batch: Batch) -> Tensor:
        torch._dynamo.mark_dynamic(batch.features, 1)
        torch._dynamo.mark_dynamic(batch.targets, 1)
        return compiled(*batch)

    return loss_function


class Run:
    """One training run: model, optimizer, what was measured, and where it is written."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.budget = Budget(config.steps, config.seconds)
        self.device = _device(config.device)
        self.step = 0
        self.warmup_steps = min(config.warmup_steps, (config.steps or 10**9) // 10)
        self.records: list[dict[str, Any]] = []
        torch.manual_seed(config.seed)

        source = make_source(config)
        self.normalisation = training_normalisation(source)
        self.test = test_batches(source, self.normalisation, config.batch_size, self.device)
        dataset = TrainingSet(source, self.normalisation, config.seed)
        self.training = training_batches(dataset, config, self.device)

        self.model = Transducer(config).to(self.device)
        self.loss_function = make_loss_function(self.model, config)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.largest = LargestBatch(config)
        self.memory_before = peak_bytes(self.device)
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            (config.out / "metrics.jsonl").write_text("")
        except OSError as error:
            raise ExampleError(f"--out {config.out} cannot be written: {error}") from error

    def train_step(self) -> Tensor:
        """One optimizer step on the next batch. Returns its loss, detached. []"""
        batch = next(self.training)
        self.largest.add(encoder_lengths(batch.feature_lengths), batch.target_lengths)
        config = self.config
        rate = learning_rate(
            config.learning_rate, self.step, self.warmup_steps, self.budget.progress(self.step)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss_function(batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def evaluate(self) -> float:
        """Held-out word error rate; also writes checkpoint.pt and training.png."""
        start = self.budget.elapsed
        wer = word_error_rate(self.model, self.test)
        self.record(wer=wer)
        save_checkpoint(self, self.config.out / "checkpoint.pt")
        plot_training(self.records, self.config.out / "training.png")
        self.budget.reserved_seconds = 2 * (self.budget.elapsed - start)
        return wer

    def record(self, **values: float) -> None:
        """Append a line to metrics.jsonl."""
        line = {"step": self.step, "seconds": round(self.budget.elapsed, 2), **values}
        self.records.append(line)
        with (self.config.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def train(config: Config) -> float:
    """Train, evaluate and write everything to `config.out`. Returns the last word error rate."""
    run = Run(config)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    words = sum(int(batch.target_lengths.sum()) for batch in run.test)
    print(f"{parameters / 1e6:.1f} M parameters on {run.device}; {words} held-out words")
    wer, mark = float("nan"), 1 / config.evaluations
    window = Window()
    bar_format = "{percentage:3.0f}%|{bar:20}| {elapsed}{postfix}"
    with tqdm(total=1.0, bar_format=bar_format) as bar:
        progress = 0.0
        bar.set_postfix_str("compiling" if config.compile else "")
        while progress < 1.0:
            window.add(run.train_step(), config.batch_size)
            progress = run.budget.progress(run.step)
            due = progress >= mark
            if due or window.steps == config.log_every:
                run.record(**window.measure(), memory_bytes=used_bytes(run.device))
                window = Window()
            if due:
                # A model in warm-up says as much as it may: slow to decode, and no news.
                if run.step >= run.warmup_steps or progress == 1.0:
                    wer = run.evaluate()
                    progress = run.budget.progress(run.step)
                    window = Window()
                mark = (math.floor(progress * config.evaluations) + 1) / config.evaluations
            bar.update(progress - bar.n)
            bar.set_postfix_str(_status(run.records, run.step, wer))
    if config.compile:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        print(f"compiled {graphs} graph{'s' if graphs != 1 else ''} in {run.step} steps")
    print(f"held-out word error rate {wer:.1%} after {run.step} steps, {run.budget.elapsed:.0f} s")
    print(run.largest.summary(run.memory_before, peak_bytes(run.device)))
    return wer


class Window:
    """Loss and speed since the last line of metrics.jsonl."""

    def __init__(self) -> None:
        self.steps = self.utterances = 0
        self._losses: list[Tensor] = []
        self._start = time.monotonic()

    def add(self, loss: Tensor, utterances: int) -> None:
        """Take a step into account; its loss stays on its device, which need not wait."""
        self.steps += 1
        self.utterances += utterances
        self._losses.append(loss)

    def measure(self) -> dict[str, float]:
        """Mean loss and utterances per second."""
        loss = float(torch.stack(self._losses).mean())
        seconds = time.monotonic() - self._start
        return {"loss": loss, "utterances_per_second": self.utterances / seconds}


def save_checkpoint(run: Run, path: Path) -> None:
    """Write model, optimizer, normalisation, step and config, whole or not at all."""
    options = asdict(run.config)
    checkpoint = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in options.items()},
        "feature_mean": torch.from_numpy(run.normalisation.mean),
        "feature_std": torch.from_numpy(run.normalisation.std),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
    except RuntimeError as error:
        raise ExampleError(f"--device {name} is no torch device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ExampleError(f"--device {name}: torch finds no CUDA device")
    return device


def _status(records: list[dict[str, Any]], step: int, wer: float) -> str:
    last: dict[str, Any] = next((r for r in reversed(records) if "loss" in r), {})
    if not last:
        return f"step {step}"
    return (
        f"step {step}, loss {last['loss']:.2f}, {last['utterances_per_second']:.0f} utt/s, "
        f"{readable(last['memory_bytes'])}" + ("" if math.isnan(wer) else f", WER {wer:.1%}")
    )
