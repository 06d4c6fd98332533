"""What the suites share: options, cases from the networks, timing, checks, rows. It imports no suite."""
