"""What a job will need, in memory, disk and time, from a model's configuration alone; no torch."""
