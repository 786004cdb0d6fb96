"""Statistics of evaluations, as pure functions of numbers."""
