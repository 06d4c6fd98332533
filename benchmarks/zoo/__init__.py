"""Which timm and torchvision models convert, and what still works on the converted model."""
