"""A thin library under the notebooks of the CausalDPO study (arXiv 2603.22335)."""

__version__ = "0.1.0"
