"""What a model learns from: tasks, what answers them back, and rewards."""
