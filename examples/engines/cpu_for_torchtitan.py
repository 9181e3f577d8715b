"""Lets the CPU stand in for the GPU that torchtitan wants, and torch 2.13 for a newer one; import it first."""

from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    torch._utils._get_available_device_type = lambda: "cpu"  # noqa: SLF001 - what torchtitan asks
    memory = SimpleNamespace(total_memory=2**34)
    torch.cpu.get_device_name = lambda device=None: "CPU"
    torch.cpu.get_device_properties = lambda device=None: memory
    torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda device=None: None
    torch.cpu.memory_stats = lambda device=None: {}
    torch.cpu.current_device = lambda: 0

if not hasattr(torch.distributed, "set_timeout"):
    torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout  # noqa: SLF001
