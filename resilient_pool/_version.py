"""The version, read by the build and by `resilient_pool.__version__`."""

__version__ = "0.1.0"
