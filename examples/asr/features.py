"""Log-mel filterbank features at the source's own sample rate."""

from collections.abc import Iterable
from dataclasses import dataclass

import kaldi_native_fbank
import numpy as np
import numpy.typing as npt

from .utterance import Audio

# A multiple of 16: where padding is fused into a load, compiled CPU code (torch 2.13) reads whole
# vectors, past the end of a tensor whose rows end in a partial one.
MEL_BINS = 48
FRAME_MS = 25.0
SHIFT_MS = 10.0
# Speech carries little above; also keeps the mel bins alike between sources.
HIGHEST_HZ = 8_000.0

LogMel = npt.NDArray[np.float32]


def log_mel(audio: Audio, sample_rate: int) -> LogMel:
    """Log-mel energies of 25 ms windows every 10 ms; no window looks past its end. [T, 48]"""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = sample_rate
    options.frame_opts.frame_length_ms = FRAME_MS
    options.frame_opts.frame_shift_ms = SHIFT_MS
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = MEL_BINS
    options.mel_opts.high_freq = min(HIGHEST_HZ, sample_rate / 2)
    extractor = kaldi_native_fbank.OnlineFbank(options)
    window = round(FRAME_MS / 1000 * sample_rate)
    padded = np.pad(audio, (0, max(0, window - len(audio))))
    extractor.accept_waveform(sample_rate, padded)
    extractor.input_finished()
    frames = range(extractor.num_frames_ready)
    return np.stack([extractor.get_frame(frame) for frame in frames]).astype(np.float32)


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each mel bin over the training data.

    Fixed statistics, because those of the utterance itself would look ahead to its end.
    """

    mean: LogMel  # [48]
    std: LogMel  # [48]

    def __call__(self, features: LogMel) -> LogMel:
        """Zero mean and unit variance on average, so that zero is a neutral padding. [T, 48]"""
        return (features - self.mean) / self.std


def measure_normalisation(utterances: Iterable[LogMel]) -> Normalisation:
    """Statistics over the frames of some training utterances, each [T, 48]."""
    frames = np.concatenate(list(utterances))
    return Normalisation(mean=frames.mean(0), std=frames.std(0) + 1e-3)
