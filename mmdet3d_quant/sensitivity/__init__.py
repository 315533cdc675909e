"""What the quantization of each layer costs in accuracy, and what it would cost to undo it."""
