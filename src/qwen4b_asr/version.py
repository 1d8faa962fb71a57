"""The version, in a module of its own: what records it must not import the package's front door."""

__version__ = "0.1.0"
