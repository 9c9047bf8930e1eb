"""Policies measured: what they write, its rewards, and its divergence from the reference."""
