"""Random changes of the training audio and features that keep the words."""

import numpy as np

from .features import LogMel
from .utterance import Audio

SPEED = (0.9, 1.1)
GAIN_DB = (-12.0, 6.0)
NOISE_PROBABILITY = 0.5
NOISE_SNR_DB = (15.0, 40.0)
FREQUENCY_MASKS, FREQUENCY_MASK_BINS = 2, 5
# Long utterances get a mask in time for each five seconds.
TIME_MASKS, FRAMES_PER_TIME_MASK = 2, 500


def augment_audio(audio: Audio, rng: np.random.Generator) -> Audio:
    """Speed with pitch, gain and additive coloured noise. [N] -> [N']"""
    audio = _resample(audio, np.exp(rng.uniform(*np.log(SPEED))))
    audio = audio * np.float32(10 ** (rng.uniform(*GAIN_DB) / 20))
    if rng.random() < NOISE_PROBABILITY:
        noise = rng.standard_normal(len(audio) + 1, dtype=np.float32)
        # Between white (0) and low-pass (0.9): rooms and cars are not white.
        colour = np.float32(rng.uniform(0.0, 0.9))
        noise = noise[1:] + colour * noise[:-1]
        snr = 10 ** (rng.uniform(*NOISE_SNR_DB) / 20)
        scale = np.sqrt(np.mean(audio**2) / np.mean(noise**2)) / snr
        audio = audio + np.float32(scale) * noise
    return np.asarray(audio, np.float32)


def mask_features(features: LogMel, longest: int, rng: np.random.Generator) -> LogMel:
    """SpecAugment (Park et al. 2019) without warping, on normalised features. [T, 48]

    longest: Frames of the longest mask in time.
    """
    features = features.copy()
    frames, bins = features.shape
    for _ in range(FREQUENCY_MASKS):
        width = int(rng.integers(0, FREQUENCY_MASK_BINS + 1))
        start = int(rng.integers(0, bins - width + 1))
        features[:, start : start + width] = 0.0
    for _ in range(max(TIME_MASKS, frames // FRAMES_PER_TIME_MASK)):
        width = int(rng.integers(0, min(longest, frames) + 1))
        start = int(rng.integers(0, frames - width + 1))
        features[start : start + width] = 0.0
    return features


def _resample(audio: Audio, speed: float) -> Audio:
    # Linear interpolation dulls the highest frequencies a little: one more variation.
    positions = np.arange(0, len(audio) - 1, speed)
    resampled: Audio = np.interp(positions, np.arange(len(audio)), audio).astype(np.float32)
    return resampled
