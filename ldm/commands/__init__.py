"""What the commands that draw have in common. The scripts know their arguments, and nothing else."""
