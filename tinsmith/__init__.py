"""Tinsmith: a self-hosted server for the Tinker API."""

__version__ = "0.1.0"
