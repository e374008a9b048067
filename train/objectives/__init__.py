"""What is learnt: one file for each kind of task."""
