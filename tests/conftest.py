"""Every test runs on the CPU with eight devices, so that sharding is tested wherever the suite runs."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
