"""Model families by name. A family is a module here that registers one class."""

from .registry import available, build, family, meta_model, options_of, register

__all__ = ["available", "build", "family", "meta_model", "options_of", "register"]
