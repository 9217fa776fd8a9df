"""Model families by name. A family is a module here that registers one class."""

from .registry import available, build, family, options_of, register

__all__ = ["available", "build", "family", "options_of", "register"]
