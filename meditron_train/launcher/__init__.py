"""Who started this process, and which rank it is: alone, under torchrun, or under Slurm's srun."""
