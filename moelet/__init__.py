"""moelet: pretrain a small Mixture-of-Experts GPT on the hardware you have."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import torch and the model only when they are asked for (PEP 562)."""
    if name == "load":
        from moelet.storage.checkpoint import load

        return load
    raise AttributeError(f"module 'moelet' has no attribute '{name}'")
