"""Foundations of all rooms: grids, quantizers, modes, ties, errors."""
