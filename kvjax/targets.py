"""What a cache's attention is compiled for, a platform and its chip: "cpu", "gpu:sm_90", "tpu:v5p", "reference"."""

import jax

# What TPUs call themselves (`device_kind`) and what the kernels call them.
_TPUS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "7x", "TPU v7x": "7x"}
PLATFORMS = ("cpu", "gpu", "tpu", "reference")


def default_target(mesh: jax.sharding.Mesh | None = None) -> str:
    """Of the first device, of the mesh if there is one."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    if platform == "tpu":
        return f"tpu:{_TPUS.get(device.device_kind, device.device_kind)}"
    if platform == "gpu":
        return f"gpu:sm_{str(getattr(device, 'compute_capability', '')).replace('.', '')}"
    return platform if platform in PLATFORMS else "reference"


def split(target: str) -> tuple[str, str]:
    """Platform and chip; "" where the target names no chip."""
    platform, _, chip = target.partition(":")
    if platform not in PLATFORMS:
        raise ValueError(f"`target={target!r}` names no platform; use one of {', '.join(PLATFORMS)}, such as tpu:v5e.")
    return platform, chip
