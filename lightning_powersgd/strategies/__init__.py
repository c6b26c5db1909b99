"""Lightning's strategies: the trainer's lifecycle, and nothing else."""
