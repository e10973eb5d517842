"""Digit strings spoken by eSpeak NG, driven through ctypes from its pip wheel."""

import _ctypes
import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np

from .digits import STRING_LENGTHS, VOCABULARY, digits_to_text, longest_string
from .errors import ExampleError
from .utterance import Audio, Utterance

SAMPLE_RATE = 22_050

# Constants of speak_lib.h (eSpeak NG 1.52).
_SYNCHRONOUS = 2
_CHARS_UTF8 = 1
_POSITION_CHARACTER = 1
_RATE, _PITCH, _RANGE = 1, 3, 4

_SynthCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)

ACCENTS = ("en-us", "en-029", "en-gb-scotland", "en-gb-x-rp")
HELD_OUT_VARIANTS = frozenset(
    {"Andrea", "Michael", "belinda", "caleb", "david", "f3", "ian", "linda", "m3", "m7", "pedro"}
)
# Robots, whispers and effects: nobody speaks like that.
_NOVELTY = re.compile(
    r"AnxiousAndy|Demonic|RicishayMax3|Storm|Tweaky|.*Robot|croak|fast|kaukovalta|klatt.*|"
    r"robosoft.*|whisperf?"
)


@dataclass(frozen=True)
class Voice:
    """How a string is spoken: rate in words per minute, pitch and pitch range in 0-100."""

    name: str
    rate: int
    pitch: int
    pitch_range: int


def voice_names() -> tuple[list[str], list[str]]:
    """Voices for training and for test, as accent+variant; no variant is in both."""
    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    variants = sorted(path.name for path in folder.iterdir() if " " not in path.name)
    if not HELD_OUT_VARIANTS.issubset(variants):
        raise ExampleError(f"eSpeak NG's voice variants are not in {folder}")
    training = [
        variant
        for variant in variants
        if variant not in HELD_OUT_VARIANTS and not _NOVELTY.fullmatch(variant)
    ]
    return (
        [f"{accent}+{variant}" for accent in ACCENTS for variant in training],
        [f"{accent}+{variant}" for accent in ACCENTS for variant in sorted(HELD_OUT_VARIANTS)],
    )


@contextmanager
def _fresh_library(seed: int) -> Iterator[ctypes.CDLL]:
    """The eSpeak library with its global state as at program start.

    Flutter, echo and oscillator phases live in static variables that neither espeak_Terminate
    nor a new voice resets, so an utterance would depend on those before it. Unloading the
    library does reset them, in about 2 ms.
    """
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        data_path = str(espeakng_loader.get_data_path()).encode()
        rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path, 0)
        if rate != SAMPLE_RATE:
            raise ExampleError(f"eSpeak NG did not start from {data_path.decode()}: {rate}")
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        yield library
        library.espeak_Terminate()
    finally:
        # Windows has no dlclose: there, utterances are only reproducible in order.
        close = getattr(_ctypes, "dlclose", None)
        if close is not None:
            close(library._handle)


def synthesise(text: str, voice: Voice, seed: int = 0) -> Audio:
    """Speak `text`. Not thread-safe: eSpeak is global to the process. Returns samples. [N]"""
    chunks: list[np.ndarray] = []

    def collect(samples: Any, count: int, _events: object) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    callback = _SynthCallback(collect)
    with _fresh_library(seed) as library:
        library.espeak_SetSynthCallback(callback)
        if library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ExampleError(f"eSpeak NG has no voice {voice.name}")
        library.espeak_SetParameter(_RATE, voice.rate, 0)
        library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        library.espeak_SetParameter(_RANGE, voice.pitch_range, 0)
        encoded = text.encode() + b"\0"
        status = library.espeak_Synth(
            encoded,
            ctypes.c_size_t(len(encoded)),
            ctypes.c_uint(0),
            _POSITION_CHARACTER,
            ctypes.c_uint(0),
            ctypes.c_uint(_CHARS_UTF8),
            None,
            None,
        )
    if status != 0 or not chunks:
        raise ExampleError(f"eSpeak NG could not speak {text!r} with {voice.name}")
    return np.concatenate(chunks).astype(np.float32) / 32768.0


class SyntheticStrings:
    """Digit strings in many voices, rates and pitches; the test voices are held out."""

    vocabulary = VOCABULARY
    sample_rate = SAMPLE_RATE
    seconds = None

    def __init__(self, seed: int, test_size: int) -> None:
        self.seed = seed
        self.test_size = test_size
        self.training_voices, self.test_voices = voice_names()

    def training(self, index: int) -> Utterance:
        """String `index` of the endless training set, in a training voice."""
        rng = np.random.default_rng((1, self.seed, index))
        return _speak(self.training_voices, longest_string(index), rng)

    def test(self, index: int) -> Utterance:
        """String `index` of the test set, in a held-out voice."""
        return _speak(self.test_voices, STRING_LENGTHS[1], np.random.default_rng((2, index)))


def _speak(voices: list[str], longest: int, rng: np.random.Generator) -> Utterance:
    size = rng.integers(STRING_LENGTHS[0], longest + 1)
    text = digits_to_text(rng.integers(0, 10, size=size))
    voice = Voice(
        name=voices[rng.integers(len(voices))],
        rate=int(rng.integers(130, 231)),
        pitch=int(rng.integers(25, 76)),
        pitch_range=int(rng.integers(20, 81)),
    )
    audio = synthesise(text, voice, seed=int(rng.integers(1, 2**31)))
    return Utterance(audio=audio, text=text, speaker=voice.name)
