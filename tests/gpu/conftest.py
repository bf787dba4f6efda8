"""The tiny models of all families, as in the parity tests."""

from tests.parity.conftest import bases, folders  # noqa: F401  (fixtures)
