"""Training: parameter groups, schedules and the loop."""
