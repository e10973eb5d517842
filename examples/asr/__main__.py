"""Command line: `python -m examples.asr` in the repository root, `python PATH/asr` anywhere."""

import inspect
import sys
from pathlib import Path

EXTRAS = {
    "espeakng_loader",
    "jiwer",
    "kaldi_native_fbank",
    "matplotlib",
    "numpy",
    "psutil",
    "sentencepiece",
    "soundfile",
    "tensorboard",
    "tqdm",
    "tyro",
}


def main() -> int:
    """Train with the options on the command line and return the exit status."""
    try:
        import tyro

        from examples.asr.config import Config
        from examples.asr.errors import ExampleError
        from examples.asr.train import train
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"error: {error.name} is missing: pip install 'rnnt-op[examples]'", file=sys.stderr)
        return 2
    try:
        train(tyro.cli(Config, prog="examples.asr", description=inspect.getdoc(Config)))
    except ExampleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    if not __package__:
        # Run as a folder (`python PATH/examples/asr`): only that folder is on the path.
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(main())
