"""`make gpu`: the GPU tests and the suites ops, step and aiwq within a time limit."""
