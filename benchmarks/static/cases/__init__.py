"""What the static suite compiles: one module an operator, each with `cases(target)`, the list of its StaticCases there."""
