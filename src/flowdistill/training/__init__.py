"""The training engine: cohorts of students, one step, evaluation. It holds no method's name."""
