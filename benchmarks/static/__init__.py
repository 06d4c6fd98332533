"""Every Triton kernel compiled for sm_80, sm_90 and gfx942: registers, spills, access widths."""
