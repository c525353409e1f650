"""The Kimi K2 paper as runnable notebooks on a thin library, one package per part of the paper."""

__version__ = "0.1.0"
