"""``python -m rnnt_op``: the ``rnnt-op`` command."""

import sys

from rnnt_op.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
