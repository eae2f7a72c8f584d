"""The heart of the library: the linear operator ``V -> Y = L^-1 V``."""

from .api import precondition, precondition_varlen

__all__ = ["precondition", "precondition_varlen"]
