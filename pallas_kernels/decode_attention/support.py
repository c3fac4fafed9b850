"""What runs fused where: every shipped storage on every backend and generation, asked of the kernels themselves."""

from pallas_kernels.decode_attention import api, specs

# Column of the matrix -> implementation and chip.
CHIPS: dict[str, tuple[api.Implementation, str]] = {
    "CPU": ("xla_cpu", ""),
    "TPU v5e": ("mosaic_tpu", "v5e"),
    "TPU v5p": ("mosaic_tpu", "v5p"),
    "TPU v6e": ("mosaic_tpu", "v6e"),
    "TPU 7x": ("mosaic_tpu", "7x"),
    "H100, H200": ("mosaic_gpu", "sm_90"),
}

ALL = specs.STORAGES | specs.PLANES
SHAPE = specs.Shape(layers=2, batch=1, blocks=4, heads=8, group=4, channels=128)  # Llama-3-8B


def why_not(storage: str, column: str, shape: specs.Shape = SHAPE) -> str | None:
    """The reason why a storage is not fused in a column; None where it is."""
    kinds = ALL[storage]
    implementation, chip = CHIPS[column]
    if implementation == "mosaic_tpu":
        shape = specs.in_tpu_blocks(kinds, shape)
    k, v = (specs.abstract(kind, shape) for kind in (kinds.keys, kinds.values))
    try:
        api.check(k, v, shape.group, implementation, chip, kinds.pre_rope)
    except NotImplementedError as reason:
        return str(reason)
    return None


def markdown(shape: specs.Shape = SHAPE) -> str:
    """The matrix as a table: "fused", or the reason as a note below it."""
    notes: list[str] = []
    lines = ["| storage | " + " | ".join(CHIPS) + " |", "|---" * (len(CHIPS) + 1) + "|"]
    for storage in ALL:
        cells = []
        for column in CHIPS:
            reason = why_not(storage, column, shape)
            if reason is not None and reason not in notes:
                notes.append(reason)
            cells.append("fused" if reason is None else f"reference [^{notes.index(reason) + 1}]")
        lines.append(f"| {storage} | " + " | ".join(cells) + " |")
    return "\n".join(lines + [""] * bool(notes) + [f"[^{i}]: {note}" for i, note in enumerate(notes, 1)])
