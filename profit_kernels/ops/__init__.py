"""One folder per operator: reference (the maths), op (schema and registrations), kernels and launch (Triton)."""
