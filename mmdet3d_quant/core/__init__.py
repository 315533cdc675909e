"""What every room knows: grids, quantizers, modes, ties, errors."""
