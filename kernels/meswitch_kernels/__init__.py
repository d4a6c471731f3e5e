"""Fused linear operators for a base weight plus a mixture of low-bit expert deltas."""
