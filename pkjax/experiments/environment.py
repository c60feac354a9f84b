"""What results depend on besides the settings."""

import platform

import jax

import pkjax as pk

__all__ = ["environment", "versions"]


def versions() -> dict[str, str]:
    """Name the versions that results depend on, without touching a device."""
    return {"pkjax": pk.__version__, "jax": jax.__version__, "python": platform.python_version()}


def environment() -> dict[str, str]:
    """Name the versions, the device and the precision that results depend on."""
    device = jax.devices()[0]
    return {**versions(), "device": f"{device.platform} ({device.device_kind})",
            "precision": str(jax.dtypes.canonicalize_dtype(float))}
