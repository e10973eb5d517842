"""The example on a corpus: reading it, its subwords, and how it is cut into batches."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from example_support import WORDS, np, soundfile, write_corpus

from examples.asr.batching import bucketed, consecutive, share
from examples.asr.config import Config
from examples.asr.data import Example, collate, make_batches
from examples.asr.errors import ExampleError
from examples.asr.librispeech import LibriSpeech, read_corpus, split
from examples.asr.model import Transducer
from examples.asr.vocabulary import BLANK, Subwords, Words, learn_subwords

TEXTS = [" ".join(WORDS[i:j]) for i in range(len(WORDS)) for j in range(i + 1, len(WORDS) + 1)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for number, subset in enumerate(("train-a", "train-b", "dev-clean", "test-clean")):
        write_corpus(folder, subset, speaker=number, count=5)
    return folder


class TestCorpus:
    def test_audio_belongs_to_its_transcript(self, corpus: Path) -> None:
        source = LibriSpeech(*split(read_corpus(corpus), "dev-clean"), Words(tuple(WORDS)))
        assert source.sample_rate == 8_000
        assert source.test_size == 5
        for index in range(10):
            utterance = source.training(index)
            assert utterance.speaker in ("0", "1")
            assert len(utterance.audio) / 8_000 == pytest.approx(source.seconds[index])
            assert 1 <= len(source.vocabulary.encode(utterance.text)) <= 5
            assert source.training(index + 10 * 3).text == utterance.text
        assert {source.test(index).speaker for index in range(5)} == {"2"}

    def test_the_order_is_not_that_of_the_speakers(self, corpus: Path) -> None:
        training, _ = split(read_corpus(corpus), "dev-clean")
        subsets = [entry.subset for entry in training]
        assert subsets != sorted(subsets)
        assert training == split(read_corpus(corpus), "dev-clean")[0]

    def test_a_share_is_held_out(self, corpus: Path) -> None:
        training, test = split(read_corpus(corpus), 0.25)
        assert (len(training), len(test)) == (8, 2)
        assert {entry.subset for entry in training + test} == {"train-a", "train-b"}
        assert not {entry.path for entry in training} & {entry.path for entry in test}

    def test_unusable_folders_are_named(self, corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(ExampleError, match="is not a folder"):
            read_corpus(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ExampleError, match="no files named"):
            read_corpus(tmp_path / "empty")
        with pytest.raises(ExampleError, match=r"--held-out dev-other leaves 10 .* and 0 for test"):
            split(read_corpus(corpus), "dev-other")
        write_corpus(corpus, "train-c", speaker=9, count=1, rate=16_000)
        with pytest.raises(ExampleError, match=r"mixes sample rates \[8000, 16000\]"):
            read_corpus(corpus)
        (corpus / "train-c" / "9" / "7" / "9-7-0000.flac").unlink()
        with pytest.raises(ExampleError, match=r"9-7-0000\.flac cannot be read"):
            read_corpus(corpus)

    def test_only_mono_is_read(self, corpus: Path) -> None:
        training, test = split(read_corpus(corpus), 0.25)
        soundfile.write(training[0].path, np.zeros((800, 2)), 8_000)
        with pytest.raises(ExampleError, match=r"must be mono and not empty, got shape \(800, 2\)"):
            LibriSpeech(training, test, Words(())).training(0)


class TestSubwords:
    def test_there_and_back(self) -> None:
        vocabulary = Subwords(learn_subwords(TEXTS, size=30))
        assert vocabulary.size == 30
        for text in TEXTS:
            labels = vocabulary.encode(text)
            assert BLANK not in labels
            assert max(labels) < vocabulary.size
            assert vocabulary.decode(labels) == text

    def test_a_small_corpus_yields_fewer(self) -> None:
        assert 25 < Subwords(learn_subwords(TEXTS, size=500)).size < 200

    def test_fewer_than_the_letters_are_refused(self) -> None:
        with pytest.raises(ExampleError, match="--vocab-size 5"):
            learn_subwords(TEXTS, size=5)


class TestBatches:
    SECONDS = np.random.default_rng(0).gamma(4.0, 3.0, size=997).clip(0.5, 35.0).tolist()

    def epochs(self, limit: float, count: int, seed: int = 0) -> list[list[list[int]]]:
        """The batches of the first epochs, which index i // 997 tells apart."""
        batches = bucketed(self.SECONDS, limit, seed)
        result: list[list[list[int]]] = [[] for _ in range(count)]
        for batch in batches:
            epoch = batch[0] // len(self.SECONDS)
            if epoch == count:
                return result
            result[epoch].append(batch)
        raise AssertionError("batches never end")

    @pytest.mark.parametrize("limit", [35.0, 100.0, 1000.0, 1e6])
    def test_every_utterance_once_an_epoch_within_the_limit(self, limit: float) -> None:
        for epoch, batches in enumerate(self.epochs(limit, 2)):
            start = epoch * len(self.SECONDS)
            indices = sorted(index for batch in batches for index in batch)
            assert indices == list(range(start, start + len(self.SECONDS)))
            for batch in batches:
                longest = max(self.SECONDS[index - start] for index in batch)
                assert longest * len(batch) <= limit

    def test_there_is_little_padding_and_few_batches(self) -> None:
        (batches,) = self.epochs(300.0, 1)
        padded = sum(len(b) * max(self.SECONDS[index] for index in b) for b in batches)
        assert padded < 1.1 * sum(self.SECONDS)
        assert len(batches) < 1.2 * sum(self.SECONDS) / 300

    def test_seed_and_epoch_decide_who_meets_whom(self) -> None:
        first, second = self.epochs(300.0, 2)
        assert [first, second] == self.epochs(300.0, 2)
        assert first != self.epochs(300.0, 1, seed=1)[0]
        count = len(self.SECONDS)
        assert {frozenset(i % count for i in b) for b in second} != {frozenset(b) for b in first}

    def test_batches_are_not_in_order_of_duration(self) -> None:
        longest = [self.SECONDS[batch[-1]] for batch in self.epochs(300.0, 1)[0]]
        assert longest != sorted(longest)
        assert longest != sorted(longest, reverse=True)

    def test_strings_follow_each_other(self) -> None:
        assert list(islice(consecutive(3), 2)) == [[0, 1, 2], [3, 4, 5]]

    @pytest.mark.parametrize("parts", [1, 2, 3, 5])
    @pytest.mark.parametrize("size", [1, 2, 7, 15])
    def test_shares_are_disjoint_and_complete(self, size: int, parts: int) -> None:
        batch = list(range(100, 100 + size))
        shares = [share(batch, part, parts) for part in range(parts)]
        assert sorted(i for s in shares if s.weight for i in s.indices) == batch
        assert all(s.indices and s.total == size for s in shares)
        assert sum(s.weight * len(s.indices) for s in shares) / parts == pytest.approx(1)

    @pytest.mark.parametrize(("size", "parts"), [(5, 2), (5, 3), (2, 3)])
    def test_shares_have_the_gradient_of_the_whole(self, size: int, parts: int) -> None:
        generator = torch.Generator().manual_seed(0)
        examples = [
            Example(torch.randn(20 + 9 * i, 48, generator=generator), torch.arange(1, 2 + i % 3))
            for i in range(size)
        ]
        model = Transducer(Config(dim=16, joint_dim=16, dilations=(1,), dropout=0.0), 11)
        parameters = tuple(model.parameters())

        def gradients(indices: list[int], weight: float) -> torch.Tensor:
            loss = weight * model(*collate([examples[index] for index in indices]))
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

        shares = [share(list(range(size)), part, parts) for part in range(parts)]
        averaged = sum(gradients(s.indices, s.weight) for s in shares) / parts
        expected = gradients(list(range(size)), 1 / size)
        assert (averaged - expected).norm() < 1e-5 * expected.norm()

    def test_an_utterance_longer_than_a_batch_is_an_error(self, corpus: Path) -> None:
        source = LibriSpeech(*split(read_corpus(corpus), 0.1), Words(tuple(WORDS)))
        with pytest.raises(ExampleError, match=r"--batch-seconds 0\.2 is less than the longest"):
            make_batches(source, Config(batch_seconds=0.2))
