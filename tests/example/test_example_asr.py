"""The speech recognition example: data, model, decoding, and a short training run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_support import ROOT, TINY, np, soundfile
from torch import Tensor

from examples.asr.augment import augment_audio, mask_features
from examples.asr.batching import share
from examples.asr.budget import Budget, learning_rate
from examples.asr.config import Config
from examples.asr.data import (
    Example,
    HeldOut,
    TrainingSet,
    collate,
    load,
    training_normalisation,
)
from examples.asr.decoding import count_errors, greedy_decode
from examples.asr.digits import VOCABULARY
from examples.asr.errors import ExampleError
from examples.asr.features import log_mel
from examples.asr.model import Transducer, encoder_lengths
from examples.asr.recordings import RecordedStrings, parse_name, read_recordings
from examples.asr.synthesis import SyntheticStrings, Voice, synthesise
from examples.asr.train import train

RATE = 8_000


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Two speakers, ten digits, two test and two training recordings of each."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for speaker in ("ann", "bob_2"):
        for digit in range(10):
            for index in (0, 4, 5, 12):
                time = np.arange(RATE // 5 + 100 * digit) / RATE
                tone = 0.1 * np.sin(2 * np.pi * (200 + 300 * digit) * time)
                audio = tone + 0.001 * rng.standard_normal(len(time))
                soundfile.write(folder / f"{digit}_{speaker}_{index}.wav", audio, RATE)
    (folder / "README.txt").write_text("not a recording")
    return folder


def tiny_model(**options: object) -> Transducer:
    torch.manual_seed(0)
    config = Config(**{**TINY, "dropout": 0.0, **options})
    return Transducer(config, VOCABULARY.size).eval()


def random_example(frames: int, labels: int, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    return Example(
        torch.randn(frames, 48, generator=generator),
        torch.randint(1, 11, (labels,), generator=generator),
    )


class TestRecordings:
    @pytest.mark.parametrize(
        ("name", "parsed"),
        [
            ("7_jackson_32.wav", (7, "jackson", 32)),
            ("0_van_der_berg_4.wav", (0, "van_der_berg", 4)),
            ("7_jackson.wav", None),
            ("12_jackson_3.wav", None),
            ("7_jackson_32.flac", None),
        ],
    )
    def test_names(self, name: str, parsed: tuple[int, str, int] | None) -> None:
        assert parse_name(name) == parsed

    def test_indices_up_to_four_are_the_test_split(self, recordings: Path) -> None:
        all_recordings, rate = read_recordings(recordings)
        assert rate == RATE
        assert len(all_recordings) == 80
        source = RecordedStrings(recordings, seed=0)
        test = [source.test(index) for index in range(source.test_size)]
        # Every one of the 40 test recordings is used equally often.
        assert sum(len(utterance.text.split()) for utterance in test) == 4 * 40
        spoken = [word for utterance in test for word in utterance.text.split()]
        assert [spoken.count(word) for word in VOCABULARY.words] == [16] * 10
        assert {r.index for s in source._test for r in s} == {0, 4}
        assert {r.index for speaker in source._training for r in speaker} == {5, 12}

    def test_strings_have_two_to_seven_digits_of_one_speaker(self, recordings: Path) -> None:
        source = RecordedStrings(recordings, seed=0)
        for index in range(50):
            utterance = source.training(index)
            labels = VOCABULARY.encode(utterance.text)
            assert 2 <= len(labels) <= 7
            speech = sum(RATE // 5 + 100 * (label - 1) for label in labels)
            pauses = len(utterance.audio) - speech
            assert 0 < pauses <= (2 * 0.25 + 6 * 0.25) * RATE
        assert all(2 <= len(source.test(i).text.split()) <= 7 for i in range(source.test_size))

    def test_same_seed_same_strings(self, recordings: Path) -> None:
        first, second = RecordedStrings(recordings, seed=3), RecordedStrings(recordings, seed=3)
        other = RecordedStrings(recordings, seed=4)
        for index in (5, 0):
            np.testing.assert_array_equal(first.training(index).audio, second.training(index).audio)
        assert any(first.training(i).text != other.training(i).text for i in range(3))
        np.testing.assert_array_equal(first.test(1).audio, other.test(1).audio)

    def test_unusable_folders_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ExampleError, match="is not a folder"):
            RecordedStrings(tmp_path / "absent", seed=0)
        with pytest.raises(ExampleError, match="no files named"):
            RecordedStrings(tmp_path, seed=0)
        soundfile.write(tmp_path / "1_ann_7.wav", np.zeros(800), RATE)
        with pytest.raises(ExampleError, match=r"index 0-4 \(test\)"):
            RecordedStrings(tmp_path, seed=0)
        (tmp_path / "2_ann_7.wav").write_bytes(b"no audio")
        with pytest.raises(ExampleError, match="cannot be read"):
            RecordedStrings(tmp_path, seed=0)


class TestSynthesis:
    def test_speaks_at_the_given_rate(self) -> None:
        slow = synthesise("seven three one", Voice("en-us+f3", 120, 50, 50))
        fast = synthesise("seven three one", Voice("en-us+f3", 240, 50, 50))
        assert slow.dtype == np.float32
        assert 0.01 < np.abs(slow).max() <= 1.0
        assert len(slow) > 1.4 * len(fast) > 0.3 * 22_050

    def test_does_not_depend_on_what_was_said_before(self) -> None:
        source = SyntheticStrings(seed=0, test_size=4)
        first = [source.training(index).audio for index in (0, 1, 2)]
        again = [source.training(index).audio for index in (2, 0)]
        np.testing.assert_array_equal(first[2], again[0])
        np.testing.assert_array_equal(first[0], again[1])
        assert not np.array_equal(first[0], SyntheticStrings(seed=1, test_size=4).training(0).audio)

    def test_test_voices_are_held_out(self) -> None:
        source = SyntheticStrings(seed=0, test_size=20)
        training = {name.split("+")[1] for name in source.training_voices}
        test = {name.split("+")[1] for name in source.test_voices}
        assert len(training) > 30
        assert len(test) > 10
        assert not training & test
        assert {source.test(i).speaker for i in range(20)} <= set(source.test_voices)

    def test_unknown_voice(self) -> None:
        with pytest.raises(ExampleError, match="no voice"):
            synthesise("one", Voice("xx-unknown+f3", 150, 50, 50))


class TestFeatures:
    def test_every_voice_rate_gives_ten_millisecond_frames(self) -> None:
        for rate in (8_000, 22_050):
            audio = np.random.default_rng(0).standard_normal(rate).astype(np.float32)
            assert log_mel(audio, rate).shape == (98, 48)

    def test_shorter_than_a_window(self) -> None:
        assert log_mel(np.zeros(10, np.float32), RATE).shape == (1, 48)

    def test_frames_do_not_depend_on_later_audio(self) -> None:
        audio = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
        np.testing.assert_array_equal(log_mel(audio[: RATE // 2], RATE), log_mel(audio, RATE)[:48])

    def test_augmentation_is_seeded(self) -> None:
        audio = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
        first, second, other = (augment_audio(audio, np.random.default_rng(s)) for s in (1, 1, 2))
        np.testing.assert_array_equal(first, second)
        assert len(first) != len(other)

    def test_masks_are_no_longer_than_told(self) -> None:
        features = np.ones((3_000, 48), np.float32)
        masked = mask_features(features, 1, np.random.default_rng(0))
        rows = (masked == 0).all(1)
        assert 2 < rows.sum() <= 6
        assert (mask_features(features, 90, np.random.default_rng(0)) == 0).all(1).sum() > 60


class TestModel:
    @pytest.mark.parametrize("lookahead", [0, 3])
    def test_sees_no_further_than_the_lookahead(self, lookahead: int) -> None:
        model = tiny_model(lookahead=lookahead)
        features = random_example(80, 3, seed=0).features.unsqueeze(0)
        changed = features.clone()
        changed[:, 41:] += 1.0
        with torch.no_grad():
            same = (model.encoder(features) == model.encoder(changed)).all(-1)[0]
        # Frame t sees features up to 4 (t + lookahead); 41 is the first that changed.
        assert same[: 11 - lookahead].all()
        assert not same[11 - lookahead]

    def test_padding_changes_nothing(self) -> None:
        model = tiny_model()
        short, long = random_example(50, 2, seed=1), random_example(97, 6, seed=2)
        alone, both = collate([short]), collate([short, long])
        valid = int(encoder_lengths(alone.feature_lengths))
        with torch.no_grad():
            torch.testing.assert_close(
                model.encoder(alone.features)[0], model.encoder(both.features)[0, :valid]
            )
            losses = [model(*collate([example])) for example in (short, long)]
            torch.testing.assert_close(model(*both), torch.stack(losses).sum())

    def test_predictor_steps_as_it_trains(self) -> None:
        predictor = tiny_model().predictor
        targets = torch.tensor([[3, 7, 1]])
        context = predictor.start(1, torch.device("cpu"))
        states = [predictor.step(context)]
        for label in targets[0]:
            context = torch.cat([context[:, 1:], label.view(1, 1)], dim=1)
            states.append(predictor.step(context))
        torch.testing.assert_close(predictor(targets), torch.stack(states, dim=1))

    def test_batches_are_the_same_for_any_number_of_workers(self, recordings: Path) -> None:
        source = RecordedStrings(recordings, seed=0)
        normalisation = training_normalisation(source)
        batches = []
        for workers in (0, 1):
            dataset = TrainingSet(source, normalisation, Config(workers=workers))
            shares = iter([share([0, 1, 2], 0, 1), share([3, 4, 5], 1, 2)])
            batches.append(list(load(dataset, shares, torch.device("cpu"))))
        for (first, one), (second, other) in zip(*batches, strict=True):
            assert first == second
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_compiled_step_is_one_graph_for_all_lengths(self, dtype: str) -> None:
        """Inductor makes code of the same graph whenever the example runs."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = tiny_model()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        tolerance = 1e-5 if dtype == "float32" else 3e-2
        for frames, labels in ((60, 3), (61, 4), (75, 2), (104, 6), (200, 7)):
            batch = collate([random_example(frames, labels, 3), random_example(frames // 2, 2, 4)])
            results = []
            for loss_function in (model, compiled):
                model.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                    loss = loss_function(*batch)
                loss.backward()
                gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
                results.append((loss.detach(), gradient))
            (loss, gradient), (compiled_loss, compiled_gradient) = results
            torch.testing.assert_close(compiled_loss, loss, rtol=tolerance, atol=tolerance)
            assert (compiled_gradient - gradient).norm() <= tolerance * gradient.norm()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class TestDecoding:
    @staticmethod
    def decode(frames: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Decode a joint that wants label `frames[b][t]` at frame t unless it was the last one."""

        def joint(encoder: Tensor, state: Tensor) -> Tensor:
            wanted = encoder[:, 0].long()
            repeated = wanted == state[:, 0].long()
            return torch.nn.functional.one_hot(wanted.masked_fill(repeated, 0), 11).float()

        encoder = torch.tensor(frames, dtype=torch.float32).unsqueeze(-1)
        start = torch.zeros(len(frames), 2, dtype=torch.int64)
        return greedy_decode(
            encoder, torch.tensor(lengths), start, lambda c: c[:, -1:].float(), joint
        )

    def test_follows_the_joint(self) -> None:
        frames = [[1, 1, 0, 2, 3], [0, 4, 5, 5, 9], [0, 0, 0, 0, 0]]
        assert self.decode(frames, [5, 4, 5]) == [[1, 2, 3], [4, 5], []]

    def test_limits_labels_per_frame(self) -> None:
        def always_one(encoder: Tensor, state: Tensor) -> Tensor:
            return torch.tensor([[0.0, 1.0]]).expand(len(encoder), 2)

        start = torch.zeros(1, 2, dtype=torch.int64)
        labels = greedy_decode(
            torch.zeros(1, 2, 1), torch.tensor([2]), start, lambda c: c[:, -1:].float(), always_one
        )
        assert labels == [[1] * 6]

    def test_errors_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # "one two three" and "four five": one substitution and one deletion in five words.
        batch = collate([random_example(8, 3, seed=0), random_example(8, 2, seed=1)])
        held_out = HeldOut(batch, ["one two three", "four five"])
        monkeypatch.setattr("examples.asr.decoding.transcribe", lambda *_: ["one two nine", "four"])
        assert count_errors(tiny_model(), VOCABULARY, [held_out]) == (2, 5)


class TestBudget:
    def test_whichever_ends_first(self) -> None:
        now = [0.0]
        budget = Budget(steps=100, seconds=50.0, clock=lambda: now[0])
        assert budget.progress(10) == pytest.approx(0.1)
        now[0] = 25.0
        assert budget.progress(10) == pytest.approx(0.5)
        budget.reserved_seconds = 25.0
        assert budget.progress(10) == 1.0

    def test_goes_on_from_an_earlier_run(self) -> None:
        budget = Budget(steps=None, seconds=50.0, clock=lambda: 7.0)
        budget.earlier_seconds = 20.0
        assert budget.progress(3) == pytest.approx(0.4)

    def test_learning_rate_warms_up_and_ends_at_zero(self) -> None:
        rates = [learning_rate(1.0, step, 10, step / 100) for step in range(101)]
        assert rates[0] == pytest.approx(0.1)
        assert max(rates) == max(rates[8:12])
        assert rates[100] == pytest.approx(0.0)


class TestTraining:
    @pytest.mark.parametrize("source", ["recorded", "synthetic"])
    def test_two_steps_write_everything(
        self, source: str, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        options = {**TINY, "compile": False, "steps": 2, "evaluations": 1, "test_strings": 4}
        data = recordings if source == "recorded" else None
        train(Config(data=data, out=out, **options))
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [2, 2]
        assert {"loss", "utterances_per_second", "memory_bytes"} <= records[0].keys()
        assert records[1]["wer"] >= 0.0
        assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
        model = torch.load(out / "model.pt")["model"]
        Transducer(Config(**TINY), VOCABULARY.size).load_state_dict(model)
        assert sorted(path.name for path in out.iterdir()) == [
            "checkpoints",
            "config.json",
            "metrics.jsonl",
            "model.pt",
            "tensorboard",
            "training.png",
        ]
        assert "the batched way would have needed" in capsys.readouterr().out

    @pytest.mark.slow
    def test_same_seed_same_run(self, recordings: Path, tmp_path: Path) -> None:
        losses = []
        for name in ("first", "second"):
            out = tmp_path / name
            options = {**TINY, "compile": False, "steps": 3, "evaluations": 1, "log_every": 1}
            train(Config(data=recordings, out=out, **options))
            lines = (out / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line).get("loss") for line in lines])
        assert losses[0] == losses[1]

    @pytest.mark.slow
    def test_command_line_errors_are_one_line(self, tmp_path: Path) -> None:
        # Run from elsewhere, as a folder.
        command = [sys.executable, str(ROOT / "examples" / "asr"), "--data", "absent"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert result.stderr == "error: --data absent is not a folder\n"
