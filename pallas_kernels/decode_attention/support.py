"""What runs fused where: every shipped storage on every backend and generation, asked of the kernels themselves."""

from pallas_kernels.decode_attention import api, specs

# Column of the matrix -> implementations and chip.
CHIPS: dict[str, tuple[tuple[api.Implementation, ...], str]] = {
    "CPU": (("xla_cpu", "numba_cpu"), ""),
    "TPU v5e": (("mosaic_tpu",), "v5e"),
    "TPU v5p": (("mosaic_tpu",), "v5p"),
    "TPU v6e": (("mosaic_tpu",), "v6e"),
    "TPU 7x": (("mosaic_tpu",), "7x"),
    "H100, H200": (("mosaic_gpu",), "sm_90"),
}

ALL = specs.STORAGES | specs.PLANES
SHAPE = specs.Shape(layers=2, batch=1, blocks=4, heads=8, group=4, channels=128)  # Llama-3-8B


def why_not(storage: str, column: str, shape: specs.Shape = SHAPE) -> str | None:
    """The reason why a storage is not fused in a column; None where it is."""
    reasons = _reasons(storage, column, shape)
    return reasons[0] if all(reasons) else None


def _reasons(storage: str, column: str, shape: specs.Shape) -> list[str | None]:
    """Why not, of each implementation; None of one that reads the storage."""
    kinds = ALL[storage]
    implementations, chip = CHIPS[column]
    if "mosaic_tpu" in implementations:
        shape = specs.in_tpu_blocks(kinds, shape)
    k, v = (specs.abstract(kind, shape) for kind in (kinds.keys, kinds.values))
    reasons: list[str | None] = []
    for implementation in implementations:
        try:
            api.check(k, v, shape.group, implementation, chip, kinds.pre_rope)
            reasons.append(None)
        except NotImplementedError as reason:
            reasons.append(str(reason))
    return reasons


def markdown(shape: specs.Shape = SHAPE) -> str:
    """The matrix as a table: "fused" or not, with notes below it: why not, or by which of two it is alone."""
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"[^{notes.index(text) + 1}]"

    lines = ["| storage | " + " | ".join(CHIPS) + " |", "|---" * (len(CHIPS) + 1) + "|"]
    for storage in ALL:
        cells = []
        for column in CHIPS:
            reasons = _reasons(storage, column, shape)
            alone = [name for name, reason in zip(CHIPS[column][0], reasons) if reason is None]
            if reasons[0] is None:
                cells.append("fused")
            else:
                cells.append(f"fused {note(f'by {alone[0]} alone')}" if alone else f"reference {note(reasons[0])}")
        lines.append(f"| {storage} | " + " | ".join(cells) + " |")
    return "\n".join(lines + [""] * bool(notes) + [f"[^{i}]: {note}" for i, note in enumerate(notes, 1)])
