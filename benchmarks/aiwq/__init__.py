"""What sampling AIWQ adds to a step, and its operator by layer."""

MEASURES = True
