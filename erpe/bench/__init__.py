"""What things cost: interleaved rounds in one process, medians, and ratios to a reference in the same rounds."""
