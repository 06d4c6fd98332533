"""kill -9 at random moments and inside checkpoint writes, resume, compare the weights."""
