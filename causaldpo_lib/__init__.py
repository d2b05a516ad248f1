"""A thin library under the notebooks of the CausalDPO study (arXiv 2603.22335)."""

import os

# Before torch loads: OpenMP threads that spin while they wait slow every other process of a busy machine tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
