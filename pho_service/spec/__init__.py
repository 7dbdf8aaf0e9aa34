"""What is asked and what is found, in plain values: no torch, no files of models."""
