"""DuQ, the differentiable and unified quantizer (PROFIT, section 4.1)."""
