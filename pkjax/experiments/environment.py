"""What numbers depend on besides what was asked for."""

import platform

import jax

import pkjax as pk

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """Name the versions and the device that numbers depend on."""
    device = jax.devices()[0]
    return {"pkjax": pk.__version__, "jax": jax.__version__, "python": platform.python_version(),
            "device": f"{device.platform} ({device.device_kind})",
            "precision": str(jax.dtypes.canonicalize_dtype(float))}
