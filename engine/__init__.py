"""What the training loop needs and a reader can skip: process groups, schedules, checkpoints, logs, flags."""
