"""Training: the loop, checkpoints that resume bit for bit, runs, their reports and exports."""
