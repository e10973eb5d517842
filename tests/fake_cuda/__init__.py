"""The CUDA path up to the driver, on machines without a GPU that have a torch for CUDA.

``fake_gpu`` runs it with tensors that have everything but data (``FakeTensorMode``) and cubins that
NVRTC made; torch sees to it that devices, shapes and dtypes of its own operations fit, and the
driver's stand-in that launches fit what the cubins say of their kernels.
"""

import sys

from places import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # which has what a cubin says
