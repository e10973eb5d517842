"""Runs of the example: killed and resumed, and divided among processes."""

from __future__ import annotations

import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from example_support import TINY, finish, measured, start, write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.asr.batching import bucketed
from examples.asr.config import Config
from examples.asr.errors import ExampleError
from examples.asr.librispeech import read_corpus, split
from examples.asr.train import Run, train

NUMBERS = ("loss", "gradient_norm", "learning_rate", "wer")

# Runs the command line; the process dies when it has done `moment` for the second time.
KILLED_IN_SECOND_SAVE = """
import os, signal, sys
from torch.distributed.checkpoint import FileSystemWriter
from examples.asr.__main__ import main

original, calls = FileSystemWriter.{moment}, []

def killed(*arguments, **named):
    result = original(*arguments, **named)
    calls.append(result)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

FileSystemWriter.{moment} = killed
sys.exit(main())
"""


@pytest.fixture
def options(tmp_path: Path) -> dict[str, object]:
    """A tiny run on a tiny corpus, as options of the command line."""
    write_corpus(tmp_path / "corpus", "train-a", speaker=1, count=11)
    write_corpus(tmp_path / "corpus", "train-b", speaker=2, count=12)
    write_corpus(tmp_path / "corpus", "dev-clean", speaker=3, count=5)
    return {
        **TINY,
        "librispeech": tmp_path / "corpus",
        "held_out": "dev-clean",
        "batch_seconds": 6,
        "vocab_size": 60,
        "warmup_steps": 2,
        "log_every": 1,
        "evaluations": 2,
        "compile": False,
    }


def train_alone(options: dict[str, object]) -> None:
    """In this process, on one thread as in a process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(Config(**options))
    finally:
        torch.set_num_threads(threads)


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt the run before this step."""
    original = Run.train_step

    def train_step(run: Run, *arguments: object) -> None:
        if run.step == step:
            raise KeyboardInterrupt
        original(run, *arguments)

    monkeypatch.setattr(Run, "train_step", train_step)


class TestFolder:
    def test_a_corpus_run_writes_everything(
        self, options: dict[str, object], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        train(Config(out=out, steps=3, **options))
        assert [step for step, _ in measured(out, "loss")] == [1, 2, 3]
        assert measured(out, "wer")[-1][1] > 0
        assert sorted(path.name for path in out.iterdir()) == [
            "checkpoints",
            "config.json",
            "metrics.jsonl",
            "model.pt",
            "tensorboard",
            "training.png",
            "vocabulary.model",
        ]
        events = EventAccumulator(str(out / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(
            [loss for _, loss in measured(out, "loss")]
        )

    @pytest.mark.slow
    def test_a_run_keeps_its_folder_its_data_and_its_shape(
        self, options: dict[str, object], tmp_path: Path
    ) -> None:
        config = Config(out=tmp_path / "out", steps=1, **options)
        train(config)
        with pytest.raises(ExampleError, match="holds a run: --resume continues it"):
            train(config)
        with pytest.raises(ExampleError, match="was started with --batch-seconds 6, not 7"):
            train(replace(config, resume=True, batch_seconds=7))
        with pytest.raises(ExampleError, match=r"--dilations \[1, 2\], not \[1\]"):
            train(replace(config, resume=True, dilations=(1,)))

    @pytest.mark.slow
    def test_two_checkpoints_are_kept(self, options: dict[str, object], tmp_path: Path) -> None:
        out = tmp_path / "out"
        train(Config(out=out, steps=11, checkpoint_every=3, **options))
        names = sorted(path.name for path in (out / "checkpoints").iterdir())
        assert names == ["step-11", "step-9"]

    @pytest.mark.slow
    def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(
        self, options: dict[str, object], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        config = Config(out=out, steps=9, checkpoint_every=1, learning_rate=1e30, **options)
        with pytest.raises(ExampleError, match=r"loss .*, gradient norm .*: try a lower"):
            train(config)
        assert not (out / "checkpoints" / "step-9").exists()


class TestResuming:
    @pytest.mark.slow
    @pytest.mark.parametrize("killed_before", [1, 7])
    def test_an_interrupted_run_goes_on_with_the_same_numbers(
        self,
        killed_before: int,
        options: dict[str, object],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        options["log_every"] = 3  # windows that a checkpoint cuts
        config = Config(out=tmp_path / "whole", steps=10, checkpoint_every=2, **options)
        train(config)
        broken = replace(config, out=tmp_path / "broken")
        with monkeypatch.context() as context:
            interrupt(context, killed_before)
            with pytest.raises(KeyboardInterrupt):
                train(broken)
        train(replace(broken, resume=True))
        assert measured(broken.out, *NUMBERS) == measured(config.out, *NUMBERS)

    @pytest.mark.slow
    def test_a_finished_run_goes_on_only_with_more_steps(
        self, options: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = Config(out=tmp_path / "out", steps=4, resume=True, **options)
        train(config)
        before = (config.out / "metrics.jsonl").read_text()
        rate = train(config)
        assert (config.out / "metrics.jsonl").read_text() == before
        assert [rate] == measured(config.out, "wer")[-1][1:]
        assert "resumed at step 4" in capsys.readouterr().out
        train(replace(config, steps=6))
        assert [step for step, _ in measured(config.out, "loss")] == [1, 2, 3, 4, 5, 6]

    @pytest.mark.slow
    def test_killed_while_saving(self, options: dict[str, object], tmp_path: Path) -> None:
        options |= {"steps": 5, "checkpoint_every": 2}
        train_alone({**options, "out": tmp_path / "whole"})
        for moment in ("write_data", "finish"):
            broken = tmp_path / moment
            code = KILLED_IN_SECOND_SAVE.format(moment=moment)
            process = start({**options, "out": broken}, program=("-c", code))
            output, _ = process.communicate()
            assert process.returncode == -signal.SIGKILL, output
            names = sorted(path.name for path in (broken / "checkpoints").iterdir())
            assert names == ["partial", "step-2"]
            train_alone({**options, "out": broken, "resume": True})
            names = sorted(path.name for path in (broken / "checkpoints").iterdir())
            assert names == ["step-4", "step-5"]
            assert measured(broken, *NUMBERS) == measured(tmp_path / "whole", *NUMBERS)
            events = EventAccumulator(str(broken / "tensorboard")).Reload()
            assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


class TestProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("parallel", "runs"),
        [
            # Steps at which a run ends, and by how many processes; the next resumes it.
            ("ddp", ((3, 1), (5, 2))),
            ("fsdp", ((3, 2), (5, 1))),
            ("tp", ((3, 2), (5, 1))),
        ],
        ids=["ddp", "fsdp", "tp"],
    )
    def test_two_train_as_one_and_resume_each_other(
        self,
        parallel: str,
        runs: tuple[tuple[int, int], ...],
        options: dict[str, object],
        tmp_path: Path,
    ) -> None:
        options["dropout"] = 0.0
        entries, _ = split(read_corpus(tmp_path / "corpus"), "dev-clean")
        batches = bucketed([entry.seconds for entry in entries], 6, seed=0)
        sizes = [len(batch) for batch in islice(batches, 5)]
        assert {size % 2 for size in sizes} == {0, 1}, sizes

        alone = {**options, "out": tmp_path / "alone"}
        together = {**options, "out": tmp_path / "together"}
        for steps, processes in runs:
            resumed = {"steps": steps, "resume": True}
            train(Config(**alone, **resumed))
            if processes == 1:
                train(Config(**together, **resumed))
            else:
                output = finish({**together, **resumed, "parallel": parallel}, processes)
                assert output.count("held-out word error rate") == 1
            for one, two in zip(
                measured(tmp_path / "alone", "loss", "gradient_norm"),
                measured(tmp_path / "together", "loss", "gradient_norm"),
                strict=True,
            ):
                assert two == pytest.approx(one, rel=1e-4)

    def test_a_mode_needs_its_processes(
        self, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = Config(out=tmp_path / "out", steps=1, **options)
        with pytest.raises(ExampleError, match="--parallel ddp needs torchrun"):
            train(replace(config, parallel="ddp"))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ExampleError, match="2 processes need --parallel ddp, fsdp or tp"):
            train(config)
