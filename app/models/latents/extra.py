"""The packages that only the report of an autoencoder needs, of the optional extra `latents`."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from app.errors import UnavailableError

PACKAGES: Final = {"sklearn.decomposition": "scikit-learn", "matplotlib.figure": "matplotlib"}


def require(*modules: str) -> None:
    """Whether these of `PACKAGES`, by default all, can be imported; to be asked before any work is done.

    Raises:
        UnavailableError: `package_missing`.
    """
    for module in modules or PACKAGES:
        try:
            import_module(module)
        except ImportError as error:
            raise UnavailableError(
                "package_missing",
                f"{PACKAGES[module]} cannot be imported ({error}); the report of an autoencoder needs it: "
                "pip install 'seedpod[latents]', or leave the report out.",
            ) from error
