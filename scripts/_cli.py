"""What the scripts share."""

import contextlib
import importlib.metadata
import platform
import sys

import kvjax


@contextlib.contextmanager
def one_line_errors():
    """Ends the script with one line on stderr and exit code 2 where the library refuses its input."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def versions() -> dict[str, str]:
    """What a report must name to be repeated."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"kvjax": kvjax.__version__, "python": platform.python_version()} | packages
