"""Adder networks in JAX, distilled to CNN accuracy by PKKD."""

__version__ = "0.1.0"
